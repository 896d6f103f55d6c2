"""Runs a scenario: the production drivers and cores of one generation, in a simulated world.

A script has one thing a line: `policy FIELD=VALUE ...` first, then `at 100ms WHAT`, where WHAT is
one of the phrases of `PHRASES`, and at last `end 600ms`. What happens is written down in simulated
milliseconds. Beside that log, every run is held against the rules:

* whoever promotes or lets all output go owns the record, in a newer generation (INV-4);
* nothing is acknowledged after the claim was asked for (INV-3);
* a promoted standby has exactly the memory of its primary at the epoch acknowledged last;
* whatever the outside ever heard is one history, and it is in the memory of the side that goes on;
* at most one side goes on.
"""

import functools
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tests.scenarios.control import BACKUP, ORDER_NS, PRIMARY, VM, Agent, Arbiter
from tests.scenarios.guest import SimulatedStandby, SimulatedVm
from tests.scenarios.link import PeerEnd, connect
from tests.scenarios.plug import Outside, SimulatedPlug
from tests.scenarios.simulation import MS, Process, World

from holdfast_agent.checkpoint.backup import BackupDriver
from holdfast_agent.checkpoint.capture import Capturer
from holdfast_agent.checkpoint.figures import BackupFigures, PrimaryFigures
from holdfast_agent.checkpoint.primary import PrimaryDriver, PrimaryParts
from holdfast_agent.checkpoint.seeding import Seeding
from holdfast_agent.checkpoint.wants import Wants
from holdfast_agent.core.backup import BackupMachine
from holdfast_agent.core.epoch import PrimaryMachine
from holdfast_agent.core.memory_map import PAGE_SIZE_BYTES, PageRows, empty_rows
from holdfast_agent.core.pages import OwedPages
from holdfast_agent.core.slabs import SlabPool
from holdfast_agent.memory import zero_pages
from holdfast_api import transitions
from holdfast_api.messages import Assignment
from holdfast_api.records import Policy
from holdfast_api.words import Phase, Role

SLAB_PAGES = 4
RESTART_NS = 20 * MS


@dataclass
class Host:
    """One side: its VM, its agent and the worker that runs now."""

    name: str
    vm: SimulatedVm
    agent: Agent
    end: PeerEnd
    worker: Process | None = None
    has_power: bool = True

    @property
    def has_worker(self) -> bool:
        return self.worker is not None and not self.worker.has_ended


class Scenario:
    """One generation of one VM on two hosts."""

    def __init__(self, policy: Policy) -> None:
        self.world = world = World()
        self.arbiter = Arbiter(world, policy)
        self.generation = self.arbiter.record.generation
        self.outside = Outside(world)
        self.plug = SimulatedPlug(world, PRIMARY, self.outside.nic_of(PRIMARY))
        keepalive = {
            "keepalive_ms": policy.keepalive_ms,
            "silence_limit_ms": policy.silence_limit_ms,
        }
        ends = connect(world, PRIMARY, BACKUP, **keepalive)
        nics = (self.plug.nic, self.outside.nic_of(BACKUP))
        self.hosts = {
            name: Host(name, SimulatedVm(world, name, nic), Agent(world, self.arbiter, name), end)
            for name, nic, end in zip((PRIMARY, BACKUP), nics, ends, strict=True)
        }
        self.primary, self.backup = self.hosts[PRIMARY], self.hosts[BACKUP]
        self.standby = SimulatedStandby(world, BACKUP, self.backup.vm)
        self.stood: dict[int, PageRows] = {}
        self.acknowledged = 0
        self._claims = itertools.count(1)
        self._watch()

    def _watch(self) -> None:
        """Hold the rules at the moments that matter."""

        def sent(epoch: int) -> None:
            self.stood[epoch] = self.primary.vm.stood_with

        def acknowledges(epoch: int) -> None:
            assert not self.backup.agent.has_asked, "acknowledged after the claim (INV-3)"
            assert epoch == self.acknowledged + 1
            self.acknowledged = epoch

        self.primary.end.on_checkpoint = sent
        self.backup.end.on_acknowledge = acknowledges
        self.plug.on_release_all = lambda: self._must_own(PRIMARY)
        self.standby.on_promote = self._check_promotion
        self.primary.agent.on_order = self._primary_ordered
        self.backup.agent.on_order = self._backup_ordered

    def _must_own(self, host: str) -> None:
        record = self.arbiter.record
        assert record.primary == host, f"{host} goes on without the claim (INV-4)"
        assert record.generation > self.generation, f"{host} goes on too early (INV-4)"

    def _check_promotion(self) -> None:
        self._must_own(BACKUP)
        same = self.stood[self.acknowledged] == self.backup.vm.memory
        assert same.all(), f"pages {np.flatnonzero(~same.all(axis=1))} are not the primary's"

    # --- workers ----------------------------------------------------------------------------------

    def begin(self) -> None:
        """Boot the guest and start both workers."""
        self.primary.vm.boot()
        self.backup.worker = self.world.start(BACKUP, self._run_backup)
        self.primary.worker = self.world.start(PRIMARY, lambda: self._run_primary(recover=False))

    def _wants(self, host: Host) -> Wants:
        return Wants(
            host.agent,
            vm=VM,
            host=host.name,
            generation=self.generation,
            new_claim_name=lambda: f"claim-{next(self._claims):04}",
        )

    def _run_primary(self, *, recover: bool) -> None:
        driver = self._primary_driver(recover=recover)
        if recover:
            self.plug.hold()
        outcome = driver.recover() if recover else driver.run()
        if driver.vm_lives:
            self.plug.release_all()
            self.plug.remove()
        self._ended(self.primary, outcome, "lives" if driver.vm_lives else "is gone")

    def _primary_driver(self, *, recover: bool) -> PrimaryDriver:
        vm, world = self.primary.vm, self.world
        slabs = SlabPool(
            SLAB_PAGES * PAGE_SIZE_BYTES, (vm.memory_map.page_count + SLAB_PAGES) * PAGE_SIZE_BYTES
        )
        capturer = Capturer(
            vm=vm,
            plug=self.plug,
            tracker=vm,
            memory=vm,
            slabs=slabs,
            owed=OwedPages(vm.memory_map.page_count),
            now_ns=world.now,
        )
        seeding = Seeding(
            vm=vm,
            tracker=vm,
            memory=vm,
            peer=self.primary.end,
            slab=empty_rows(SLAB_PAGES),
            zero_pages=zero_pages,
            now_ns=world.now,
        )
        return PrimaryDriver(
            machine=PrimaryMachine(self.generation),
            host=PRIMARY,
            parts=PrimaryParts(
                vm=vm,
                plug=self.plug,
                signal=self.plug,
                capturer=capturer,
                peer=None if recover else self.primary.end,
                seeding=None if recover else seeding,
            ),
            agent=self.primary.agent,
            wants=self._wants(self.primary),
            figures=PrimaryFigures(
                vm=VM, generation=self.generation, tracker=vm.name, plug=self.plug.name
            ),
            assignment=self.arbiter.assignment_of(PRIMARY),
            now_ns=world.now,
            wait=world.wait,
        )

    def _run_backup(self) -> None:
        driver = BackupDriver(
            machine=BackupMachine(self.generation),
            host=BACKUP,
            standby=self.standby,
            peer=self.backup.end,
            agent=self.backup.agent,
            wants=self._wants(self.backup),
            figures=BackupFigures(vm=VM, generation=self.generation),
            now_ns=self.world.now,
            wait=self.world.wait,
        )
        outcome = driver.run()
        if not driver.vm_lives:
            self.standby.destroy()
        self._ended(self.backup, outcome, "lives" if driver.vm_lives else "is gone")

    def _ended(self, host: Host, outcome: str, fate: str) -> None:
        self.world.log(host.name, f"worker ends: {outcome}; its VM {fate}")
        self.world.after(ORDER_NS, host.agent.pass_order_on)

    # --- what the agents do without a worker (the rows of the supervisor's table that matter) -----

    def _primary_ordered(self, order: Assignment) -> None:
        if self.primary.has_worker:
            return
        if order.role is Role.NONE and self.primary.vm.is_alive:
            self.world.log(PRIMARY, "the agent destroys the VM")
            self.primary.vm.kill()
        elif order.phase is Phase.RELEASING:
            self.arbiter.change(transitions.retire(self.arbiter.record, PRIMARY, order.generation))
        elif order.phase is Phase.PROTECTED and self.primary.vm.is_alive:
            self.world.log(PRIMARY, "a new worker claims")
            self.primary.worker = self.world.start(PRIMARY, lambda: self._run_primary(recover=True))

    def _backup_ordered(self, order: Assignment) -> None:
        if order.role is Role.NONE and not self.backup.has_worker:
            self.standby.destroy()

    # --- what scripts can say ---------------------------------------------------------------------

    def guest_sends(self, text: str) -> None:
        promoted = self.standby.was_promoted
        (self.backup if promoted else self.primary).vm.say(text)

    def guest_shuts_down(self) -> None:
        self.primary.vm.shut_down()

    def somebody_pauses(self) -> None:
        self.primary.vm.pause()

    def somebody_resumes(self) -> None:
        self.primary.vm.unpause()

    def kill(self, host: str) -> None:
        """Power fails: VM, worker and agent are gone, and nobody is told."""
        side = self.hosts[host]
        side.has_power = side.agent.has_power = False
        side.end.lose_power()
        side.vm.is_alive = side.vm.is_running = False
        if side.worker is not None:
            self.world.kill(side.worker)

    def kill_worker(self, host: str) -> None:
        """The worker dies, its VM does not; the kernel hangs up, the agent notices."""
        side = self.hosts[host]
        assert side.worker is not None
        self.world.kill(side.worker)
        side.end.close()
        if host == PRIMARY:
            self.plug.lose_holder()
        self.world.after(RESTART_NS, side.agent.pass_order_on)

    def qemu_dies(self, host: str) -> None:
        self.hosts[host].vm.crash()

    def saves_fail(self, count: str) -> None:
        self.primary.vm.failing_saves = int(count)

    def cut(self, host: str) -> None:
        self.hosts[host].end.cut()

    def heal(self, host: str) -> None:
        self.hosts[host].end.heal()

    def slow(self, host: str, latency_ms: str) -> None:
        self.hosts[host].end.out.latency_ns = int(latency_ms) * MS

    def store(self, state: str) -> None:
        self.arbiter.is_up = state == "up"

    def reach(self, host: str, verb: str) -> None:
        self.hosts[host].agent.reaches_store = verb == "finds"

    def misses(self, host: str, count: str) -> None:
        self.hosts[host].agent.answers_lost = int(count)

    def verdict_delay(self, host: str, delay_ms: str) -> None:
        self.hosts[host].agent.verdict_delay_ns = int(delay_ms) * MS

    def handover(self) -> None:
        self.arbiter.change(transitions.request_handover(self.arbiter.record, None))

    def release(self) -> None:
        self.arbiter.change(transitions.release(self.arbiter.record))

    # --- the end ----------------------------------------------------------------------------------

    def finish(self) -> None:
        """Say how things stand, and hold the rules that only show at the end."""
        going_on = []
        for side in self.hosts.values():
            held = side is self.primary and (self.plug.is_holding or self.plug.is_walled)
            state = "gone"
            if side.vm.is_alive:
                state = "running" if side.vm.is_running else "standing"
                state += ", output held" if held else ""
            if state == "running":
                going_on.append(side.name)
            self.world.log("end", f"the VM on {side.name} is {state}")
        assert len(going_on) <= 1, "two sides go on"
        survivor = (self.backup if self.standby.was_promoted else self.primary).vm
        for packet, host in self.outside.heard:
            remembered = survivor.text_of(packet.index)
            assert remembered == packet.text, f"{packet} of {host} is not explained: {remembered!r}"
        assert self.world.lines


SIDE = "(primary|backup)"
PHRASES: tuple[tuple[str, Callable[..., None]], ...] = (
    (r"guest sends (.+)", Scenario.guest_sends),
    (r"guest shuts down", Scenario.guest_shuts_down),
    (r"somebody pauses the VM", Scenario.somebody_pauses),
    (r"somebody resumes the VM", Scenario.somebody_resumes),
    (rf"kill {SIDE}", Scenario.kill),
    (rf"kill worker of {SIDE}", Scenario.kill_worker),
    (rf"QEMU of {SIDE} dies", Scenario.qemu_dies),
    (r"next (\d+) saves fail", Scenario.saves_fail),
    (rf"cut what {SIDE} sends", Scenario.cut),
    (rf"heal what {SIDE} sends", Scenario.heal),
    (rf"slow what {SIDE} sends to (\d+)ms", Scenario.slow),
    (r"store (up|down)", Scenario.store),
    (rf"{SIDE} (loses|finds) the store", Scenario.reach),
    (rf"{SIDE} misses (\d+) answers?", Scenario.misses),
    (rf"verdicts to {SIDE} take (\d+)ms", Scenario.verdict_delay),
    (r"order handover", Scenario.handover),
    (r"order release", Scenario.release),
)


class ScriptNotUnderstood(Exception):  # noqa: N818 - reads as a sentence where it is raised
    """A line of a script says what nobody knows."""


def run_script(text: str) -> str:
    """Run the script; return its log. Raises AssertionError when a rule is broken."""
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    fields: dict[str, Any] = {"keepalive_ms": 20, "output_triggered": False}
    if lines and lines[0].startswith("policy "):
        fields |= dict(word.split("=") for word in lines.pop(0).split()[1:])
    end = re.fullmatch(r"end (\d+)ms", lines.pop())
    if end is None:
        raise ScriptNotUnderstood("the last line must be `end ...ms`")
    scenario = Scenario(Policy.model_validate(fields))
    for line in lines:
        _schedule(scenario, line)
    try:
        scenario.begin()
        scenario.world.run(int(end[1]) * MS)
        scenario.finish()
    except BaseException:
        scenario.world.log("BROKEN", "a rule was broken here")
        raise
    finally:
        scenario.world.close()
    return "\n".join(scenario.world.lines) + "\n"


def _happen(
    scenario: Scenario, what: str, method: Callable[..., None], words: tuple[str, ...]
) -> None:
    scenario.world.log("script", what)
    method(scenario, *words)


def _schedule(scenario: Scenario, line: str) -> None:
    timed = re.fullmatch(r"at ([\d.]+)ms (.+)", line)
    if timed is None:
        raise ScriptNotUnderstood(line)
    what = timed[2]
    for pattern, method in PHRASES:
        found = re.fullmatch(pattern, what)
        if found:
            happens = functools.partial(_happen, scenario, what, method, found.groups())
            scenario.world.at(int(float(timed[1]) * MS), happens)
            return
    raise ScriptNotUnderstood(f"{line}: {what!r} is no phrase of `PHRASES`")
