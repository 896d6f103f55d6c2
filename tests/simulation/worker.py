"""What a worker process does: production drivers and cores, put together as `worker_*` do it.

`worker_primary` and `worker_backup` wire the same parts to a real QEMU; here they are simulated.
Each function below has its counterpart of the same order of steps there.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.scenarios.simulation import MS
from tests.simulation.channel import SimulatedChannel
from tests.simulation.network import SimulatedSocket
from tests.simulation.peer import GREET_NS, SimulatedConnection, SimulatedPeer
from tests.simulation.qemu import Qemu
from tests.simulation.standby import TrackedStandby

from holdfast_agent.checkpoint.backup import BackupDriver
from holdfast_agent.checkpoint.capture import Capturer
from holdfast_agent.checkpoint.figures import BackupFigures, PrimaryFigures
from holdfast_agent.checkpoint.primary import PrimaryDriver, PrimaryParts
from holdfast_agent.checkpoint.seeding import Seeding
from holdfast_agent.checkpoint.wants import Wants
from holdfast_agent.checkpoint.worker_messages import (
    Finished,
    Introduced,
    Ordered,
    PeerConnected,
    WantSeedingFailed,
)
from holdfast_agent.core.backup import BackupMachine
from holdfast_agent.core.epoch import PrimaryMachine
from holdfast_agent.core.failures import (
    MonitorBusy,
    PeerLost,
    VirtualMachineFailed,
    VirtualMachineGone,
)
from holdfast_agent.core.frames import FrameRejected
from holdfast_agent.core.memory_map import PAGE_SIZE_BYTES, empty_rows
from holdfast_agent.core.page_content import ReadBase
from holdfast_agent.core.pages import OwedPages
from holdfast_agent.core.payloads import Hello
from holdfast_agent.core.slabs import SlabPool
from holdfast_agent.memory import zero_pages
from holdfast_agent.transport.opening import PeerRefused, greet
from holdfast_agent.worker_order import hello_of
from holdfast_api.messages import Assignment
from holdfast_api.words import Role, Severity

if TYPE_CHECKING:
    from tests.simulation.host import SimulatedHost

SLAB_PAGES = 4
LAST_WORD_NS = 3_000 * MS
PRIMARY_NS = 60_000 * MS
EXPECTED_NS = 10_000 * MS
EXPECTED_RETRY_NS = 100 * MS
CONNECT_NS = 2_000 * MS


@dataclass(eq=False)
class Worker:
    """One worker process of one host."""

    host: "SimulatedHost"
    assignment: Assignment
    mode: str
    channel: SimulatedChannel
    sock: SimulatedSocket | None = None
    qemu: Qemu | None = None

    @property
    def vm_name(self) -> str:
        return self.assignment.vm

    @property
    def generation(self) -> int:
        return self.assignment.generation

    def run(self) -> None:
        if self.assignment.role is Role.BACKUP:
            self._back_up()
        elif self.mode == "protect":
            self._protect()
        else:
            self._recover(is_certain=self.mode == "clean")

    def wants(self) -> Wants:
        return Wants(
            self.channel,
            vm=self.vm_name,
            host=self.host.name,
            generation=self.generation,
            new_claim_name=self.host.new_claim_name,
        )

    def introduction(self, qemu: Qemu | None) -> Introduced:
        """Return who this worker is, as `worker_order.introduction`."""
        is_guest = qemu is not None and not qemu.is_standby
        return Introduced(
            vm=self.vm_name,
            host=self.host.name,
            generation=self.generation,
            role=self.assignment.role,
            pid=1,
            qemu_pid=0 if qemu is None else qemu.pid,
            qemu_start_ticks=0 if qemu is None else qemu.pid,
            facts=qemu.facts() if qemu is not None and is_guest else None,
            qmp_socket="monitor",
        )

    def say_last_word(self, outcome: str, *, vm_lives: bool) -> None:
        kernel, clock = self.host.kernel, self.host.clock
        kernel.log(self.host.name, f"worker of {self.vm_name} g{self.generation} ends: {outcome}")
        self.channel.send(Finished(outcome=outcome, vm_lives=vm_lives))
        deadline_ns = clock.now_ns() + LAST_WORD_NS
        while not self.channel.is_drained and clock.now_ns() < deadline_ns:
            kernel.wait(self.channel.filenos(), 50 * MS)
            self.channel.receive()
            self.channel.flush()
        self.channel.close()

    # --- primary ----------------------------------------------------------------------------------

    def _protect(self) -> None:
        try:
            qemu = self._attach(keeps_closed=False)
        except (VirtualMachineFailed, OSError) as error:
            why = f"the VM can not be protected: {error}"
            self.channel.send(WantSeedingFailed(generation=self.generation, reason=why))
            self.say_last_word(why, vm_lives=True)
            return
        vm_lives = True
        try:
            peer = self._find_backup(qemu)
        except (PeerLost, PeerRefused, FrameRejected) as error:
            outcome = f"the backup could not be reached: {error}"
            self.channel.send(WantSeedingFailed(generation=self.generation, reason=outcome))
        else:
            driver = self._driver(qemu, peer)
            outcome = driver.run()
            vm_lives = driver.vm_lives
        self._detach(qemu, outcome, vm_lives=vm_lives)

    def _recover(self, *, is_certain: bool) -> None:
        try:
            qemu = self._attach(keeps_closed=not is_certain)
        except VirtualMachineGone as error:
            self.say_last_word(f"there is nothing to recover: {error}", vm_lives=False)
            return
        except VirtualMachineFailed as error:  # uncaught in production: the worker just ends
            self.host.kernel.log(self.host.name, f"worker of {self.vm_name} fails: {error}")
            self.channel.hang_up()
            return
        outcome, vm_lives = "the plugs were taken out", True
        if not is_certain:
            driver = self._driver(qemu, None)
            outcome = driver.recover()
            vm_lives = driver.vm_lives
        self._detach(qemu, outcome, vm_lives=vm_lives)

    def _attach(self, *, keeps_closed: bool) -> Qemu:
        """Take the monitor, install the plug. Raises VirtualMachineFailed."""
        kernel = self.host.kernel
        kernel.sleep(kernel.between_ns(MS, 20 * MS))
        qemu = self.host.qemus.guest_on(self.host.name, self.vm_name)
        if qemu is None:
            if any(standby.is_busy for standby in self.host.qemus.on(self.host.name, self.vm_name)):
                raise MonitorBusy("another client holds the monitor")
            raise VirtualMachineGone("nobody listens, or a standby that was never brought to life")
        if qemu.is_busy:
            raise MonitorBusy("another client holds the monitor")
        qemu.user = self.host.process_of(self)
        self.qemu = qemu
        self.channel.introduce(self.introduction(qemu))
        blocking = [i for i in qemu.facts().issues if i.severity is Severity.BLOCKING]
        if blocking and self.mode == "protect":
            raise VirtualMachineFailed("; ".join(issue.message for issue in blocking))
        left_something = qemu.plug.left_something
        if keeps_closed:
            qemu.plug.hold()
        else:
            qemu.plug.release_all()
            if left_something or self.mode == "clean":
                qemu.vm.resume_if_ours()
        ran = qemu.vm.is_running
        if ran:
            qemu.vm.stop()
            qemu.vm.resume()
        return qemu

    def _detach(self, qemu: Qemu, outcome: str, *, vm_lives: bool) -> None:
        if vm_lives and qemu.is_alive:
            qemu.plug.release_all()
            qemu.plug.remove()
        qemu.user = None
        self.say_last_word(outcome, vm_lives=vm_lives)

    def _find_backup(self, qemu: Qemu) -> SimulatedPeer:
        """Connect to the backup's worker and be welcomed. Raises PeerLost, PeerRefused."""
        assignment = self.assignment
        assert assignment.peer is not None
        hello = hello_of(
            assignment,
            self.host.name,
            blocks=(("ram", qemu.vm.memory_map.size_bytes),),
            spec={"incarnation": qemu.incarnation, "has_disk": qemu.vm.has_disk},
        )
        kernel, clock = self.host.kernel, self.host.clock
        deadline_ns = clock.now_ns() + EXPECTED_NS
        while True:
            self.sock = self.host.dial(assignment.peer, CONNECT_NS)
            connection = self._connection(self.sock, Role.PRIMARY, hello)
            try:
                greet(connection, hello, GREET_NS / 1e9)
            except PeerRefused as refused:
                connection.close()
                if refused.refusal.code != "not-expected" or clock.now_ns() > deadline_ns:
                    raise
                kernel.sleep(EXPECTED_RETRY_NS)
            except (PeerLost, FrameRejected):
                connection.close()
                raise
            else:
                return self._peer(connection, hello)

    def _connection(self, sock: SimulatedSocket, role: Role, hello: Hello) -> SimulatedConnection:
        return SimulatedConnection(
            self.host.kernel,
            self.host.clock,
            sock,
            role=role,
            generation=self.generation,
            keepalive_ms=hello.keepalive_ms,
            silence_limit_ms=hello.silence_limit_ms,
            received_frames=1 if role is Role.BACKUP else 0,
        )

    def _peer(
        self,
        connection: SimulatedConnection,
        hello: Hello,
        read_base: ReadBase | None = None,
    ) -> SimulatedPeer:
        rules = self.host.rules
        return SimulatedPeer(
            connection,
            map_page_count=hello.memory_map.page_count,
            silence_limit_ms=hello.silence_limit_ms,
            read_base=read_base,
            on_checkpoint=lambda epoch: rules.checkpoint_sent(self, epoch),
            on_acknowledge=lambda epoch: rules.acknowledges(self, epoch),
        )

    def _driver(self, qemu: Qemu, peer: SimulatedPeer | None) -> PrimaryDriver:
        vm, clock, kernel = qemu.vm, self.host.clock, self.host.kernel
        self.host.rules.watch_primary(self, qemu)
        page_count = vm.memory_map.page_count
        capturer = Capturer(
            vm=vm,
            plug=qemu.plug,
            tracker=vm,
            memory=vm,
            slabs=SlabPool(
                SLAB_PAGES * PAGE_SIZE_BYTES, (page_count + SLAB_PAGES) * PAGE_SIZE_BYTES
            ),
            owed=OwedPages(page_count),
            now_ns=clock.now_ns,
        )
        seeding = None
        if peer is not None:
            seeding = Seeding(
                vm=vm,
                tracker=vm,
                memory=vm,
                peer=peer,
                slab=empty_rows(SLAB_PAGES),
                zero_pages=zero_pages,
                now_ns=clock.now_ns,
            )
        return PrimaryDriver(
            machine=PrimaryMachine(self.generation),
            host=self.host.name,
            parts=PrimaryParts(
                vm=vm,
                plug=qemu.plug,
                signal=qemu.plug,
                capturer=capturer,
                peer=peer,
                seeding=seeding,
            ),
            agent=self.channel,
            wants=self.wants(),
            figures=PrimaryFigures(
                vm=self.vm_name, generation=self.generation, tracker=vm.name, plug=qemu.plug.name
            ),
            assignment=self.assignment,
            now_ns=clock.now_ns,
            wait=kernel.wait,
        )

    # --- backup -----------------------------------------------------------------------------------

    def _back_up(self) -> None:
        kernel = self.host.kernel
        arrived = self._wait_for_primary()
        if arrived is None:
            self.say_last_word("no primary came", vm_lives=False)
            return
        hello, self.sock = arrived
        kernel.sleep(kernel.between_ns(20 * MS, 200 * MS))
        qemu = self.host.start_standby(self, int(hello.spec["incarnation"]))
        qemu.vm.has_disk = bool(hello.spec["has_disk"])
        self.qemu = qemu
        self.channel.introduce(self.introduction(qemu))
        standby = TrackedStandby(kernel, self, qemu)
        connection = self._connection(self.sock, Role.BACKUP, hello)
        try:
            connection.welcome()
        except PeerLost as lost:
            connection.close()
            standby.destroy()
            self.say_last_word(f"the primary left before it was welcomed: {lost}", vm_lives=False)
            return
        driver = BackupDriver(
            machine=BackupMachine(self.generation),
            host=self.host.name,
            standby=standby,
            peer=self._peer(connection, hello, standby.memory.copy_out),
            agent=self.channel,
            wants=self.wants(),
            figures=BackupFigures(vm=hello.vm, generation=hello.generation),
            now_ns=self.host.clock.now_ns,
            wait=kernel.wait,
        )
        outcome = driver.run()
        if not driver.vm_lives:
            standby.destroy()
        qemu.user = None
        self.say_last_word(outcome, vm_lives=driver.vm_lives)

    def _wait_for_primary(self) -> tuple[Hello, SimulatedSocket] | None:
        kernel, clock = self.host.kernel, self.host.clock
        deadline_ns = clock.now_ns() + PRIMARY_NS
        while clock.now_ns() < deadline_ns:
            kernel.wait(self.channel.filenos(), deadline_ns - clock.now_ns())
            for message, descriptor in self.channel.receive():
                if isinstance(message, PeerConnected) and descriptor is not None:
                    sock, hello = self.host.handed_over.pop(descriptor)
                    return hello, sock
                if isinstance(message, Ordered) and message.assignment.generation > self.generation:
                    return None
        return None
