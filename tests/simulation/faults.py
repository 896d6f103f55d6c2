"""What goes wrong, drawn from the seed: one fault after the other, each with its own end.

A fault is counted when it takes effect: a kill when there was something to kill, a doubled frame
when it arrives. Requests of an operator come the same way, since they, too, come at bad moments.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.scenarios.simulation import MS
from tests.simulation.host import SimulatedHost
from tests.simulation.kernel import SECOND

from holdfast_agent.checkpoint.primary import CAPTURE_FAILURES_MAX

if TYPE_CHECKING:
    from tests.simulation.cluster import Simulation

SAVES_GIVEN_UP = CAPTURE_FAILURES_MAX


@dataclass(frozen=True)
class Fault:
    """A kind of fault, how often it is drawn, and the names under which it is counted."""

    weight: int
    happen: "Callable[[Faults], None]"
    counted: tuple[str, ...]


class Faults:
    """The bad luck of one simulation."""

    def __init__(self, simulation: "Simulation", *, pause_ns: int) -> None:
        self.simulation = simulation
        self.kernel, self.network = simulation.kernel, simulation.network
        self.happened = simulation.happened
        self.random = simulation.kernel.random
        self.is_over = False
        self._pause_ns = pause_ns
        self._ends: list[Callable[[], None]] = []
        self._kinds = list(KINDS)
        self._weights = [fault.weight * self.random.choice((0, 1, 1, 3)) for fault in KINDS]
        if not any(self._weights):
            self._weights = [fault.weight for fault in KINDS]
        self._next()

    def _next(self) -> None:
        self.kernel.after(int(self.random.expovariate(1 / self._pause_ns)), self._strike)

    def _strike(self) -> None:
        if not self.is_over:
            self.random.choices(self._kinds, self._weights)[0].happen(self)
            self._next()

    def stop(self) -> None:
        """End all faults, now."""
        self.is_over = True
        while self._ends:
            self._ends[0]()

    def _for_a_while(self, end: Callable[[], None], least_ns: int, most_ns: int) -> None:
        """Have `end` called once, at a random time or when all faults end."""

        def once() -> None:
            if once in self._ends:
                self._ends.remove(once)
                end()

        self._ends.append(once)
        self.kernel.after(self.random.randint(least_ns, most_ns), once)

    def _count(self, what: str, text: str) -> None:
        self.happened[what] += 1
        self.kernel.log("FAULT", f"{what}: {text}")

    def _host(self) -> SimulatedHost:
        return self.random.choice(self.simulation.hosts)

    def _busy_host(self) -> SimulatedHost:
        """Draw a host that has something to lose."""
        names = sorted({qemu.host for qemu in self.simulation.qemus.alive()})
        return self.simulation.cluster.hosts[self.random.choice(names)] if names else self._host()

    # --- the network ------------------------------------------------------------------------------

    def _cut(self, what: str, pairs: list[tuple[str, str]]) -> None:
        self._count(what, ", ".join(f"{a} -> {b}" for a, b in pairs))
        for source, target in pairs:
            self.network.block(source, target)

        def heal() -> None:
            self.kernel.log("FAULT", f"healed: {pairs}")
            for source, target in pairs:
                self.network.unblock(source, target)

        self._for_a_while(heal, 50 * MS, 8 * SECOND)

    def cut_one_way(self) -> None:
        parties = self.simulation.parties()
        source, target = self.random.sample(parties, 2)
        self._cut("cut one way", [(source, target)])

    def cut_both_ways(self) -> None:
        source, target = self.random.sample(self.simulation.parties(), 2)
        self._cut("cut both ways", [(source, target), (target, source)])

    def isolate(self) -> None:
        name = self._busy_host().name
        others = [party for party in self.simulation.parties() if party != name]
        pairs = [(name, o) for o in others] + [(o, name) for o in others]
        self._cut("host isolated", pairs)

    def cut_from_control(self) -> None:
        name = self._busy_host().name
        pairs = [(name, c.name) for c in self.simulation.controllers]
        if self.random.random() < 0.5:
            pairs = [(b, a) for a, b in pairs]
        self._cut("host cut from controllers", pairs)

    def slow_network(self) -> None:
        name = self._busy_host().name
        factor = self.random.choice((5.0, 30.0, 100.0))
        self._count("network slow", f"{name}, {factor} times")
        self.network.slow[name] = factor

        def end() -> None:
            self.network.slow.pop(name, None)

        self._for_a_while(end, 200 * MS, 4 * SECOND)

    def break_connection(self) -> None:
        ends = self.network.live_sockets()
        if ends:
            end = self.random.choice(ends)
            self._count("connection broken", f"{end.host} - {end.other.host}")
            end.reset()
            if self.random.random() < 0.5:
                end.other.reset()

    def damage(self) -> None:
        ends = self.network.live_sockets()
        if ends:
            end = self.random.choice(ends)
            end.damage = self.random.choice(("doubled", "flipped", "replayed", "replayed"))

    # --- processes and hosts ----------------------------------------------------------------------

    def kill_worker(self) -> None:
        host = self._busy_host()
        if host.workers:
            worker, process = self.random.choice(host.workers)
            self._count("worker killed", f"{process.name} as {worker.assignment.role}")
            self.kernel.end(process)

    def kill_agent(self) -> None:
        host = self._busy_host()
        if host.agent.loop.is_alive:
            self._count("agent killed", host.name)
            host.kill_agent()
            self._for_a_while(host.start_agent, 100 * MS, 4 * SECOND)

    def kill_host(self) -> None:
        self._kill_hosts([self._busy_host()])

    def kill_pair(self) -> None:
        """Power fails for both hosts of a VM, not quite at the same moment."""
        records = [r for r in self.simulation.rules.records.values() if r.backup is not None]
        if records and self.random.random() < 0.3:
            record = self.random.choice(records)
            assert record.backup is not None
            pair = [self.simulation.cluster.hosts[n] for n in (record.primary, record.backup)]
            self.happened["both hosts of a VM lost"] += 1
            self._kill_hosts(pair)

    def _kill_hosts(self, hosts: list[SimulatedHost]) -> None:
        for host in hosts:
            if host.has_power:
                self._count("host lost power", host.name)
                host.lose_power()
                self._for_a_while(host.get_power, SECOND // 2, 10 * SECOND)

    def kill_qemu(self) -> None:
        qemus = list(self.simulation.qemus.alive())
        if qemus:
            qemu = self.random.choice(qemus)
            what = "QEMU of a standby died" if qemu.is_standby else "QEMU of a guest died"
            self._count(what, f"{qemu.vm_name} on {qemu.host}")
            qemu.vm.crash()

    def freeze_worker(self) -> None:
        host = self._busy_host()
        if host.workers:
            _, process = self.random.choice(host.workers)
            length_ns = self.random.choice((100 * MS, 700 * MS, 3 * SECOND, 8 * SECOND))
            self._count("worker frozen", f"{process.name} for {length_ns / MS} ms")
            process.frozen_until_ns = self.kernel.now_ns + length_ns

    def freeze_agent(self) -> None:
        host = self._busy_host()
        self._count("agent frozen", host.name)
        host.agent.loop.frozen_until_ns = self.kernel.now_ns + self.random.randint(0, 8 * SECOND)

    def freeze_controller(self) -> None:
        controller = self.random.choice(self.simulation.controllers)
        self._count("controller frozen", controller.name)
        controller.loop.frozen_until_ns = self.kernel.now_ns + self.random.randint(0, 8 * SECOND)

    def kill_controller(self) -> None:
        controller = self.random.choice(self.simulation.controllers)
        if controller.answers:
            self._count("controller killed", controller.name)
            controller.kill()
            self._for_a_while(controller.start, 100 * MS, 4 * SECOND)

    def saves_fail(self) -> None:
        guests = [q for q in self.simulation.qemus.alive() if not q.is_standby]
        if guests:
            qemu = self.random.choice(guests)
            qemu.vm.failing_saves = self.random.choice((1, 1, 2, SAVES_GIVEN_UP))
            qemu.failing_saves_total += qemu.vm.failing_saves
            self._count("saves of devices fail", f"{qemu.vm_name}, {qemu.vm.failing_saves} times")

    def slow_everything(self) -> None:
        self._count("everything slow", "")
        self.kernel.slowness = self.random.choice((3.0, 15.0))

        def end() -> None:
            self.kernel.slowness = 1.0

        self._for_a_while(end, 200 * MS, 3 * SECOND)

    # --- the store and the clocks -----------------------------------------------------------------

    def store_down(self) -> None:
        store = self.simulation.store
        if store.is_up:
            self._count("store down", "")
            store.is_up = False

            def end() -> None:
                store.is_up = True

            self._for_a_while(end, 200 * MS, 8 * SECOND)

    def store_times_out(self) -> None:
        store = self.simulation.store
        store.timeouts = self.random.choice((0.1, 0.4, 0.8))

        def end() -> None:
            store.timeouts = 0.0

        self._for_a_while(end, 500 * MS, 6 * SECOND)

    def lag_watch(self) -> None:
        controller = self.random.choice(self.simulation.controllers)
        self._count("watch runs behind", controller.name)
        controller.etcd.lag(self.random.randint(200 * MS, 3 * SECOND))
        self._for_a_while(lambda: controller.etcd.lag(0), 500 * MS, 6 * SECOND)

    def jump_clock(self) -> None:
        controller = self.random.choice(self.simulation.controllers)
        self._count("wall clock jumped", controller.name)
        controller.wall_clock.offset_seconds += self.random.choice((-3600.0, -1.0, 1.0, 86400.0))

    def operate(self) -> None:
        """Have an operator do something."""
        self.simulation.operator.act()


def _fault(weight: int, happen: Callable[[Faults], None], *counted: str) -> Fault:
    return Fault(weight, happen, counted)


KINDS = (
    _fault(6, Faults.cut_one_way, "cut one way"),
    _fault(6, Faults.cut_both_ways, "cut both ways"),
    _fault(5, Faults.isolate, "host isolated"),
    _fault(4, Faults.cut_from_control, "host cut from controllers"),
    _fault(4, Faults.slow_network, "network slow"),
    _fault(6, Faults.break_connection, "connection broken"),
    _fault(6, Faults.damage, "frame doubled", "bit flipped", "old frames replayed"),
    _fault(8, Faults.kill_worker, "worker killed"),
    _fault(5, Faults.kill_agent, "agent killed"),
    _fault(6, Faults.kill_host, "host lost power"),
    _fault(1, Faults.kill_pair, "both hosts of a VM lost"),
    _fault(4, Faults.kill_qemu, "QEMU of a standby died", "QEMU of a guest died"),
    _fault(6, Faults.freeze_worker, "worker frozen"),
    _fault(3, Faults.freeze_agent, "agent frozen"),
    _fault(3, Faults.freeze_controller, "controller frozen"),
    _fault(3, Faults.kill_controller, "controller killed"),
    _fault(3, Faults.saves_fail, "saves of devices fail"),
    _fault(2, Faults.slow_everything, "everything slow"),
    _fault(4, Faults.store_down, "store down"),
    _fault(6, Faults.store_times_out, "store timeout, done", "store timeout, not done"),
    _fault(3, Faults.lag_watch, "watch runs behind"),
    _fault(2, Faults.jump_clock, "wall clock jumped"),
    _fault(8, Faults.operate, "operator asked"),
)
COUNTED = tuple(name for fault in KINDS for name in fault.counted)
