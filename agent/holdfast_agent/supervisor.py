"""Carries out this host's assignments: starts, adopts and informs workers; lets go of lost VMs.

Touches the ledger, worker processes and their sockets, and, where no worker is left to do it, a
QEMU by signal. Level-triggered: `apply` gets the full set of assignments again and again and brings
what is into line with what is ordered; absence from the set means nothing.

Order of things for one assignment: an order of an older generation is refused, and so is the same
generation with other content; then a worker that lives is told; then, without one, it is decided
from the ledger what must be done:

| ordered role, phase     | no worker lives                                                   |
|-------------------------|-------------------------------------------------------------------|
| none                    | destroy what the ledger says is held                              |
| backup                  | start a backup worker, once in a generation; if that died:        |
|                         | destroy what it left, which nobody can promote any more           |
| primary, seeding        | start a primary worker, once in a generation; again: report failed |
| primary, protected      | the worker died: start one that claims, then goes on or destroys  |
| primary, unprotected    | if the last one died: start one that takes plugs out, and finds   |
|                         | out whether a standby that won was ever brought to life           |
| primary, releasing      | the same, then report released                                    |
| primary, ended, retired | let go of a QEMU that is shut down; forget the holding            |
"""

import asyncio
import json
import logging
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from weakref import WeakValueDictionary

from holdfast_agent.checkpoint.worker_messages import (
    Decided,
    Finished,
    Happened,
    Introduced,
    Noted,
    Ordered,
    PeerTurnedAway,
    Reported,
    ToAgent,
    WantClaim,
    WantSeeded,
    WantSeedingFailed,
)
from holdfast_agent.config import AgentConfig
from holdfast_agent.core.failures import VirtualMachineFailed
from holdfast_agent.host.ledger import Ledger, LedgerEntry
from holdfast_agent.host.processes import is_alive, kill_and_wait
from holdfast_agent.host.reporter import Outbox
from holdfast_agent.host.vms import VmFinder
from holdfast_agent.host.worker_link import WorkerLink, WorkerUnreachable
from holdfast_agent.hypervisor.holding import remove_remains
from holdfast_api.messages import Assignment, Claim, ClaimVerdict, EventReport, Holding
from holdfast_api.records import WorkerReport
from holdfast_api.words import EventKind, Generation, Phase, Role, VmId

LOGGER = logging.getLogger(__name__)
WORKER_START_SECONDS = 20.0
ADOPTION_SECONDS = 5.0
ADOPTION_AGAIN_SECONDS = 0.5
"""All other orders of this VM wait for it."""
LOG_LIMIT_BYTES = 4 << 20
ORDERS_AT_ONCE_MAX = 4
"""A worker that starts needs a core for most of a second."""


class Supervisor:
    """All workers of this host."""

    def __init__(
        self,
        config: AgentConfig,
        ledger: Ledger,
        outbox: Outbox,
        finder: VmFinder,
    ) -> None:
        """Remember whom to ask; `adopt` finds the workers that already live."""
        self._config = config
        self._ledger = ledger
        self._outbox = outbox
        self._finder = finder
        self._links: dict[VmId, WorkerLink] = {}
        self._reports: dict[VmId, WorkerReport] = {}
        self._orders: dict[VmId, Assignment] = {}
        self._claims: dict[str, asyncio.Task[None]] = {}
        self._verdicts: dict[str, ClaimVerdict] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._locks: WeakValueDictionary[VmId, asyncio.Lock] = WeakValueDictionary()
        self._at_once = asyncio.Semaphore(ORDERS_AT_ONCE_MAX)
        self._run = config.run_dir / "workers"
        self.turned_away = 0
        """Peers that connected to a worker and were not whom it expected."""

    # --- what others ask --------------------------------------------------------------------------

    def reports(self) -> tuple[WorkerReport, ...]:
        """Return the newest report of every living worker."""
        return tuple(self._reports[vm] for vm in self._links if vm in self._reports)

    def holdings(self) -> tuple[Holding, ...]:
        """Return what this host holds; a VM or standby whose process is gone is not held."""
        return tuple(
            Holding(vm=entry.vm, generation=entry.generation, role=entry.role)
            for entry in self._ledger.entries()
            if entry.role is not Role.NONE
            and (entry.vm in self._links or is_alive(entry.qemu_pid, entry.qemu_start_ticks))
        )

    def busy_vms(self) -> frozenset[VmId]:
        """Return the VMs whose monitor a worker uses."""
        return frozenset(self._links)

    def backup_link(self, vm: VmId, generation: Generation) -> WorkerLink | None:
        """Return the living backup worker of this generation, for a primary that connects.

        None once it has a standby: its primary is there, and no other can come in a generation.
        """
        link = self._links.get(vm)
        if link is None or link.introduction.generation != generation:
            return None
        is_waiting = link.introduction.role is Role.BACKUP and not link.introduction.qemu_pid
        return link if is_waiting else None

    # --- adoption and the end ---------------------------------------------------------------------

    async def adopt(self) -> None:
        """Find the workers an earlier agent left running; remove the sockets of dead ones."""
        self._run.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in sorted(self._run.glob("*.sock")):
            await self._adopt_at(path, ADOPTION_SECONDS)

    async def _adopt_at(self, path: Path, seconds: float) -> bool:
        """Connect to the worker at `path`; return False if one may live there and is silent."""
        try:
            link = await WorkerLink.connect(path, seconds)
        except WorkerUnreachable as error:
            LOGGER.info("no worker behind %s", error)
            if error.is_dead:
                _remove(path)
            return error.is_dead
        LOGGER.info("adopted the worker of %s", link.introduction.vm)
        self._attach(link)
        return True

    async def _adopt_later(self, assignment: Assignment) -> bool:
        """Try again what was silent when we looked last; return False if it is still.

        A worker that was stopped for a while may be the only one that can go on with its VM.
        """
        if assignment.role is Role.NONE:
            return True  # what is held is destroyed, whoever lives
        stem = f"{assignment.vm}."
        answered = True
        for path in sorted(self._run.glob(f"{stem}*.sock")):
            generation = path.name.removeprefix(stem).removesuffix(".sock")
            is_newest = generation == str(assignment.generation)
            if generation.isdigit() and (is_newest or assignment.role is Role.PRIMARY):
                answered &= await self._adopt_at(path, ADOPTION_AGAIN_SECONDS)
        return answered

    async def close(self) -> None:
        """Hang up on all workers; they go on."""
        for task in [*self._claims.values(), *self._tasks]:
            task.cancel()
        await asyncio.gather(*self._claims.values(), *self._tasks, return_exceptions=True)
        for link in self._links.values():
            link.close()

    # --- assignments ------------------------------------------------------------------------------

    async def apply(self, assignments: tuple[Assignment, ...]) -> None:
        """Bring this host into line with its assignments; returns when all were carried out.

        VM by VM in the order of the calls; different VMs do not wait for each other's workers.
        """
        done = await asyncio.gather(
            *(self._apply(assignment) for assignment in assignments), return_exceptions=True
        )
        for error in done:  # the first one; all were given their chance
            if error is not None:
                raise error

    async def _apply(self, assignment: Assignment) -> None:
        async with self._locks.setdefault(assignment.vm, asyncio.Lock()), self._at_once:
            try:
                if self._accept(assignment):
                    await self._carry_out(assignment)
            except (OSError, VirtualMachineFailed) as error:  # a full disk, a stubborn process
                LOGGER.error("%s can not be carried out now: %s", assignment.vm, error)  # noqa: TRY400 - it comes again

    def _accept(self, assignment: Assignment) -> bool:
        entry = self._ledger.entry(assignment.vm)
        content = f"{assignment.role}:{assignment.peer}"
        if assignment.generation < entry.generation:
            return False
        if assignment.generation == entry.generation and entry.content not in ("", content):
            LOGGER.error("%s: order %s contradicts %s", assignment.vm, content, entry.content)
            return False
        self._ledger.update(assignment.vm, generation=assignment.generation, content=content)
        return True

    async def _carry_out(self, assignment: Assignment) -> None:
        vm = assignment.vm
        if vm not in self._links and not await self._adopt_later(assignment):
            LOGGER.warning("a worker of %s may live and does not answer", vm)
            return
        link = self._links.get(vm)
        if link is not None:
            if self._orders.get(vm) != assignment:
                self._orders[vm] = assignment
                await link.send(Ordered(assignment=assignment))
            return
        self._orders[vm] = assignment
        entry = self._ledger.entry(vm)
        if assignment.role is Role.NONE:
            await self._destroy(entry, "another host goes on with this VM")
        elif assignment.role is Role.BACKUP:
            if entry.worker_generation < assignment.generation:
                await self._destroy(entry, "left by an earlier generation")
                await self._start(assignment, "protect")
            else:
                await self._destroy(entry, "its worker died, and none follows in a generation")
        else:
            await self._carry_out_primary(assignment, entry)

    async def _carry_out_primary(self, assignment: Assignment, entry: LedgerEntry) -> None:
        vm, phase = assignment.vm, assignment.phase
        if phase in (Phase.ENDED, Phase.RETIRED):
            if phase is Phase.ENDED:
                await self._destroy(entry, "the guest has ended")
            self._ledger.forget(vm)
            return
        entry = self._hold_if_found(entry)
        alive = is_alive(entry.qemu_pid, entry.qemu_start_ticks)
        fresh = entry.worker_generation < assignment.generation
        if phase is Phase.SEEDING and fresh and alive:
            if assignment.peer_address is not None:
                await self._start(assignment, "protect")
        elif phase is Phase.SEEDING and not fresh:
            self._outbox.seeding_failed(vm, assignment.generation, "the worker died")
        elif phase is Phase.PROTECTED and alive:
            await self._start(assignment, "recover")
        elif phase in (Phase.UNPROTECTED, Phase.RELEASING):
            if alive and (entry.is_plugged or entry.is_standby):
                await self._start(assignment, "clean")
            elif phase is Phase.RELEASING:
                self._outbox.released(vm, assignment.generation)

    def _hold_if_found(self, entry: LedgerEntry) -> LedgerEntry:
        """Note the QEMU that runs here for a VM we are the primary of."""
        if entry.role is not Role.NONE and is_alive(entry.qemu_pid, entry.qemu_start_ticks):
            return entry
        facts = self._finder.facts_of(entry.vm)
        if facts is None:
            return entry
        return self._ledger.update(
            entry.vm,
            role=Role.PRIMARY,
            is_standby=False,
            qemu_pid=facts.pid,
            qemu_start_ticks=facts.start_ticks,
        )

    async def _destroy(self, entry: LedgerEntry, why: str) -> None:
        """End a QEMU without a worker, by signal: an orderly exit would let held output leave."""
        if entry.role is Role.NONE:
            return
        LOGGER.warning("destroying %s: %s", entry.vm, why)
        lived = is_alive(entry.qemu_pid, entry.qemu_start_ticks)
        gone = await asyncio.to_thread(kill_and_wait, entry.qemu_pid, entry.qemu_start_ticks)
        if not gone:
            LOGGER.error("QEMU %s of %s does not die", entry.qemu_pid, entry.vm)
            return
        await self._remove_remains(entry.vm)
        self._ledger.forget(entry.vm)
        if lived:
            self._outbox.event(
                EventReport(
                    kind=EventKind.VM_DESTROYED,
                    host=self._config.host,
                    vm=entry.vm,
                    generation=entry.generation,
                    message=f"{entry.vm} was destroyed on {self._config.host}: {why}",
                )
            )

    async def _remove_remains(self, vm: VmId) -> None:
        """Remove taps and folder of a QEMU that Holdfast started here, if there are any."""
        await asyncio.to_thread(remove_remains, vm, self._config.run_dir)

    # --- workers ----------------------------------------------------------------------------------

    async def _start(self, assignment: Assignment, mode: str) -> None:
        """Start a worker and wait until it has introduced itself."""
        vm = assignment.vm
        self._ledger.update(
            vm,
            worker_generation=assignment.generation,
            is_plugged=assignment.role is Role.PRIMARY,
        )
        path = self._run / f"{vm}.{assignment.generation}.sock"
        order = {
            "mode": mode,
            "socket": str(path),
            "qmp_socket": str(self._finder.socket_of(vm)),
            "assignment": assignment.model_dump(mode="json"),
            "config": self._config.model_dump(mode="json"),
        }
        logs = self._config.state_dir / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / f"worker-{vm}.log"
        append = log.exists() and log.stat().st_size < LOG_LIMIT_BYTES
        with log.open("ab" if append else "wb") as file:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "holdfast_agent.worker", json.dumps(order)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self._spawn(self._reap(process))
        link = await self._connect(path, process)
        if link is None:
            LOGGER.error("the worker of %s did not start; see %s", vm, log)
            return
        self._attach(link)
        LOGGER.info("worker of %s started: %s as %s", vm, mode, assignment.role)

    async def _connect(self, path: Path, process: asyncio.subprocess.Process) -> WorkerLink | None:
        deadline = asyncio.get_running_loop().time() + WORKER_START_SECONDS
        while asyncio.get_running_loop().time() < deadline and process.returncode is None:
            try:
                return await WorkerLink.connect(path, 5.0)
            except WorkerUnreachable:  # it has not bound its socket, or does not listen yet
                await asyncio.sleep(0.02)
        if process.returncode is None:
            process.kill()
        return None

    async def _reap(self, process: asyncio.subprocess.Process) -> None:
        await process.wait()

    def _attach(self, link: WorkerLink) -> None:
        self._links[link.introduction.vm] = link
        self._note_holding(link.introduction)
        self._spawn(self._serve(link))

    async def _serve(self, link: WorkerLink) -> None:
        """Listen to a worker until it is gone; then look again at what is ordered."""
        vm = link.introduction.vm
        try:
            await link.read(self._handle)
        finally:
            link.close()
            if self._links.get(vm) is link:
                del self._links[vm]
                self._reports.pop(vm, None)
        # Not when cancelled: a worker outlives its agent, and the next one finds it by this file.
        link.path.unlink(missing_ok=True)
        LOGGER.info("worker of %s has gone", vm)
        await self._finder.look(self.busy_vms())
        order = self._orders.get(vm)
        if order is not None:
            await self.apply((order,))
        self._outbox.beat_now()

    async def _handle(self, link: WorkerLink, message: ToAgent) -> None:
        vm = link.introduction.vm
        match message:
            case Introduced():
                self._note_holding(message)
            case Reported():
                changed = vm not in self._reports or (
                    self._reports[vm].phase is not message.report.phase
                )
                self._reports[vm] = message.report
                if changed:
                    self._outbox.beat_now()
            case WantClaim():
                await self._claim(link, message.claim)
            case WantSeeded() | WantSeedingFailed():
                self._tell_of_seeding(link, message)
            case Happened():
                self._outbox.event(message.event)
            case PeerTurnedAway():
                self.turned_away += 1
                LOGGER.warning("worker of %s turned a peer away: %s", vm, message.reason)
            case Finished():
                LOGGER.info("worker of %s finished: %s", vm, message.outcome)
                if message.vm_lives:
                    self._ledger.update(vm, is_plugged=False, is_standby=False)
                else:  # what a worker calls gone must be gone (INV-6)
                    entry = self._ledger.entry(vm)
                    await asyncio.to_thread(kill_and_wait, entry.qemu_pid, entry.qemu_start_ticks)
                    self._ledger.forget(vm)
                    await self._remove_remains(vm)

    def _tell_of_seeding(self, link: WorkerLink, want: WantSeeded | WantSeedingFailed) -> None:
        vm, generation = link.introduction.vm, want.generation
        if isinstance(want, WantSeeded):
            self._outbox.seeded(vm, generation, self._noted(link, "seeded"))
        else:
            noted = self._noted(link, "seeding-failed")
            self._outbox.seeding_failed(vm, generation, want.reason, noted)

    def _note_holding(self, introduction: Introduced) -> None:
        if introduction.facts is not None:
            self._finder.remember(introduction.facts, Path(introduction.qmp_socket))
        entry = self._ledger.entry(introduction.vm)
        if introduction.qemu_pid and entry.generation >= introduction.generation:
            role = introduction.role if entry.role is not Role.PRIMARY else Role.PRIMARY
            self._ledger.update(
                introduction.vm,
                role=role,
                is_standby=introduction.role is Role.BACKUP,
                qemu_pid=introduction.qemu_pid,
                qemu_start_ticks=introduction.qemu_start_ticks,
            )

    def _noted(self, link: WorkerLink, what: str) -> Callable[[], None]:
        message = Noted.model_validate({"what": what})
        return lambda: self._spawn(self._send(link, message))

    async def _send(self, link: WorkerLink, message: Noted | Decided) -> None:
        await link.send(message)

    # --- claims -----------------------------------------------------------------------------------

    async def _claim(self, link: WorkerLink, claim: Claim) -> None:
        """Start asking, once for each claim; a verdict known already is told again."""
        if claim.claim in self._verdicts:
            await link.send(Decided(claim=claim.claim, verdict=self._verdicts[claim.claim]))
        elif claim.claim not in self._claims:
            task = asyncio.create_task(self._ask(claim))
            self._claims[claim.claim] = task

    async def _ask(self, claim: Claim) -> None:
        try:
            verdict = await self._outbox.claim(claim)
        finally:
            self._claims.pop(claim.claim, None)
        if verdict.record is not None:  # without one nothing is decided; the worker asks again
            self._verdicts = {claim.claim: verdict, **dict(list(self._verdicts.items())[:63])}
        LOGGER.warning("claim of %s: %s", claim.vm, verdict.explanation)
        self._note_win(claim, verdict)
        link = self._links.get(claim.vm)
        if link is not None:
            await link.send(Decided(claim=claim.claim, verdict=verdict))

    def _note_win(self, claim: Claim, verdict: ClaimVerdict) -> None:
        """Write down that this host goes on, as of the generation that it won.

        The record may have gone on since: what it orders now must not look like a contradiction
        when it comes.
        """
        record = verdict.record
        if not verdict.won or record is None or record.role_of(claim.host) is not Role.PRIMARY:
            return
        changes: dict[str, object] = {"role": Role.PRIMARY}
        if self._ledger.entry(claim.vm).generation <= claim.generation:
            changes |= {"generation": claim.generation + 1, "content": f"{Role.PRIMARY}:None"}
        self._ledger.update(claim.vm, **changes)

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
