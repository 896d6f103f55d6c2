"""A host: its agent, which is the production supervisor, ledger and reporter, and its workers.

The agent runs on a simulated loop; its ledger is real files, kept through every crash. What the
supervisor does to the machine (start a program, connect to a socket, look for a pid, kill it) ends
here instead of in the operating system; see `in_place_of_the_machine`.
"""

import itertools
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

from tests.scenarios.simulation import MS
from tests.simulation.agent import Agent
from tests.simulation.channel import SimulatedChannel, SimulatedLink
from tests.simulation.control_plane import Controller
from tests.simulation.guest import GuestVm, History, TrackedPlug
from tests.simulation.kernel import Clock, Kernel, SimulatedProcess
from tests.simulation.network import Network, SimulatedSocket
from tests.simulation.peer import SimulatedConnection
from tests.simulation.qemu import Qemu, Qemus
from tests.simulation.rules import Rules
from tests.simulation.worker import Worker

from holdfast_agent import supervisor
from holdfast_agent.checkpoint.worker_messages import Introduced, PeerConnected
from holdfast_agent.core.failures import PeerLost
from holdfast_agent.core.frames import FrameEncoder, FrameKind, FrameRejected
from holdfast_agent.core.payloads import Hello, Refusal, decode_json
from holdfast_api.messages import Assignment
from holdfast_api.words import ClaimReason, Role


@dataclass(eq=False)
class Cluster:
    """What all hosts share."""

    kernel: Kernel
    network: Network
    qemus: Qemus
    rules: Rules
    controllers: list[Controller]
    folder: Path
    histories: dict[str, History]
    talks: float
    hosts: "dict[str, SimulatedHost]" = field(default_factory=dict)
    channels: dict[Path, SimulatedChannel] = field(default_factory=dict)


class Program:
    """A started program, as asyncio's `Process` asks its transport."""

    def __init__(self, agent: Agent) -> None:
        self.process: SimulatedProcess | None = None
        self._code: int | None = None
        self._waiting = agent.loop.create_future()

    def ended(self) -> None:
        self._code = 0
        if not self._waiting.done():
            self._waiting.set_result(0)

    def get_returncode(self) -> int | None:
        return self._code

    def get_pid(self) -> int:
        return 1

    async def _wait(self) -> int:
        await self._waiting
        return 0

    def kill(self) -> None:
        if self.process is not None:
            self.process.is_killed = True
        self.ended()


class SimulatedHost:
    """One hypervisor."""

    def __init__(self, cluster: Cluster, name: str, clock: Clock) -> None:
        self.cluster = cluster
        self.name = name
        self.clock = clock
        self.kernel, self.network = cluster.kernel, cluster.network
        self.qemus, self.rules = cluster.qemus, cluster.rules
        self.folder = cluster.folder / name
        self.has_power = True
        self.boots = 0
        self.workers: list[tuple[Worker, SimulatedProcess]] = []
        self.handed_over: dict[int, tuple[SimulatedSocket, Hello]] = {}
        self._numbers = itertools.count(1)
        self.agent = self._new_agent()

    def _new_agent(self) -> Agent:
        return Agent(self, self.cluster.controllers)

    def new_claim_name(self) -> str:
        return f"claim-of-{self.name}-{next(self._numbers):06}"

    # --- VMs --------------------------------------------------------------------------------------

    def boot_vm(self, vm_name: str, incarnation: int, *, has_disk: bool) -> Qemu:
        """An operator starts the VM here."""
        qemu = self._new_qemu(vm_name, incarnation)
        qemu.vm.has_disk = has_disk
        qemu.vm.start(qemu.vm.history.begin(incarnation))
        return qemu

    def start_standby(self, worker: Worker, incarnation: int) -> Qemu:
        """Start a QEMU that does not run; one that an earlier worker left is ended first."""
        self.remove_remains(worker.vm_name)
        qemu = self._new_qemu(worker.vm_name, incarnation)
        qemu.is_standby = qemu.is_ours = True
        qemu.user = self.process_of(worker)
        return qemu

    def _new_qemu(self, vm_name: str, incarnation: int) -> Qemu:
        cluster = self.cluster
        plug = TrackedPlug(self.kernel, self.name)
        vm = GuestVm(self.kernel, self.name, plug.nic, cluster.histories[vm_name], cluster.talks)
        qemu = Qemu(self.qemus.new_pid(), self.name, vm_name, vm, plug, incarnation)
        self.qemus.add(qemu)
        self.rules.watch_qemu(qemu)
        return qemu

    def remove_remains(self, vm_name: str) -> None:
        """End what Holdfast started here for this VM."""
        for qemu in self.qemus.on(self.name, vm_name):
            if qemu.is_ours:
                self.rules.product_ends(qemu)
                qemu.vm.crash()

    # --- workers ----------------------------------------------------------------------------------

    def start_program(self, arguments: tuple[str, ...]) -> Program:
        """Start a worker from its command line, after the time that Python takes to start."""
        order = json.loads(arguments[-1])
        program = Program(self.agent)
        boots = self.boots
        delay_ns = self.kernel.between_ns(10 * MS, 120 * MS)

        def start() -> None:
            if self.has_power and self.boots == boots and program.get_returncode() is None:
                self._start_worker(order, program)

        self.kernel.after(delay_ns, start)
        return program

    def _start_worker(self, order: dict[str, Any], program: Program) -> None:
        assignment = Assignment.model_validate(order["assignment"])
        path = Path(order["socket"])
        introduction = Introduced(
            vm=assignment.vm,
            host=self.name,
            generation=assignment.generation,
            role=assignment.role,
            pid=1,
        )
        channel = SimulatedChannel(self.kernel, path, introduction)
        worker = Worker(self, assignment, order["mode"], channel)
        self.rules.worker_started(worker)
        name = f"{self.name}/{assignment.vm}"
        self.kernel.log(name, f"{order['mode']}s as {assignment.role} in g{assignment.generation}")

        def body() -> None:
            try:
                worker.run()
            finally:
                self._worker_ended(worker, program)

        process = self.kernel.spawn(name, self.clock, body)
        channel.process = program.process = process
        self.cluster.channels[path] = channel
        self.workers.append((worker, process))

    def _worker_ended(self, worker: Worker, program: Program) -> None:
        """The kernel cleans up after a process, whatever way it ended."""
        was_killed = self.process_of(worker).is_killed
        if worker.sock is not None:
            worker.sock.hang_up()
        worker.channel.hang_up()
        qemu = worker.qemu
        if qemu is not None and qemu.user is not None and was_killed:
            qemu.user = None
            if not qemu.is_standby:
                qemu.plug.lose_holder()
        program.ended()
        self.workers = [(w, p) for w, p in self.workers if w is not worker]

    def process_of(self, worker: Worker) -> SimulatedProcess:
        return next(process for other, process in self.workers if other is worker)

    # --- peers ------------------------------------------------------------------------------------

    def dial(self, target: str, timeout_ns: int) -> SimulatedSocket:
        """Connect to another host's agent. Raises PeerLost."""
        network = self.network
        self.kernel.sleep(network.latency_ns(self.name, target))
        if not (network.passes(self.name, target) and network.passes(target, self.name)):
            self.kernel.sleep(timeout_ns)
            raise PeerLost(ClaimReason.PEER_SILENT, f"{target} did not answer")
        there = self.cluster.hosts[target]
        if not there.agent.loop.is_alive:
            raise PeerLost(ClaimReason.STREAM_BROKEN, f"{target}: connection refused")
        near, far = network.connect(self.name, target)
        there.accept(far)
        return near

    def accept(self, sock: SimulatedSocket) -> None:
        """Read the HELLO of a primary and hand the connection on, as `peer_listener` does."""
        agent = self.agent
        connection = SimulatedConnection(
            self.kernel, self.clock, sock, role=Role.BACKUP, generation=None
        )

        def arrived() -> None:
            agent.loop.call_soon(greet)

        def greet() -> None:
            if sock.on_arrival is not arrived:
                return  # it was read already
            try:
                frame = connection.receive()
            except (FrameRejected, PeerLost):
                sock.on_arrival = lambda: None
                sock.close()
                return
            if frame is not None and frame.kind is FrameKind.HELLO:
                sock.on_arrival = lambda: None
                hello = decode_json(Hello, frame.payload)
                agent.loop.spawn(self._hand_over(agent, sock, hello))

        sock.on_arrival = arrived

    async def _hand_over(self, agent: Agent, sock: SimulatedSocket, hello: Hello) -> None:
        link = agent.supervisor.backup_link(hello.vm, hello.generation)
        if link is None:
            refusal = Refusal(code="not-expected", explanation="not the backup, or not yet")
            encoder = FrameEncoder(sender=Role.BACKUP, generation=hello.generation)
            parts = [refusal.model_dump_json().encode()]
            views, _ = encoder.encode(FrameKind.REFUSED, 0, parts)
            if not sock.is_over:
                sock.send(views)
                sock.close()
            return
        number = next(self._numbers)
        self.handed_over[number] = sock, hello
        await link.send(
            PeerConnected(vm=hello.vm, generation=hello.generation, tls=False, address="wire"),
            number,
        )

    # --- what befalls it --------------------------------------------------------------------------

    def kill_agent(self) -> None:
        self.agent.loop.kill()
        for worker, _ in self.workers:
            worker.channel.link = None

    def start_agent(self) -> None:
        if self.has_power and not self.agent.loop.is_alive:
            self.agent = self._new_agent()

    def lose_power(self) -> None:
        self.has_power = False
        self.boots += 1
        self.network.power_off(self.name)
        self.kill_agent()
        for qemu in self.qemus.on(self.name):
            qemu.vm.is_alive = qemu.vm.is_running = False
        for _, process in list(self.workers):
            self.kernel.end(process)
        shutil.rmtree(self.folder / "run", ignore_errors=True)

    def get_power(self) -> None:
        self.has_power = True
        self.network.power_on(self.name)
        self.start_agent()


@contextmanager
def in_place_of_the_machine(cluster: Cluster) -> Iterator[None]:
    """Have production supervisors act on the simulated machines of `cluster`."""

    def is_alive(pid: int, _start_ticks: int) -> bool:
        return cluster.qemus.find(pid) is not None

    def kill_and_wait(pid: int, _start_ticks: int) -> bool:
        qemu = cluster.qemus.find(pid)
        if qemu is not None:
            cluster.rules.product_ends(qemu)
            qemu.vm.crash()
        return True

    def remove_remains(vm: str, run_dir: Path) -> None:
        cluster.hosts[run_dir.parent.name].remove_remains(vm)

    class Links:
        @staticmethod
        async def connect(path: Path, _timeout_seconds: float) -> SimulatedLink:
            return await SimulatedLink.open(cluster.channels.get(path), path)

    with patch.multiple(
        cast("Any", supervisor),
        is_alive=is_alive,
        kill_and_wait=kill_and_wait,
        remove_remains=remove_remains,
        WorkerLink=Links,
    ):
        yield
