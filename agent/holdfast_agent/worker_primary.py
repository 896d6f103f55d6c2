"""A primary's worker: puts the adapters together for `checkpoint.primary`, and takes them apart.

Touches the VM's QEMU (monitor, memory, filters) and one TCP connection to the backup's worker.
Whatever way it ends, what it added to a VM that goes on is taken out again; only if the process is
killed do the plugs stay, holding, and the next worker (`recover`) decides.
"""

import contextlib
import logging
import time
from dataclasses import dataclass

from holdfast_agent.checkpoint.capture import Capturer
from holdfast_agent.checkpoint.figures import PrimaryFigures
from holdfast_agent.checkpoint.ports import (
    DirtyTracker,
    MemoryCopier,
    OutputPlug,
    OutputSignal,
)
from holdfast_agent.checkpoint.primary import PrimaryDriver, PrimaryParts
from holdfast_agent.checkpoint.seeding import Seeding
from holdfast_agent.checkpoint.worker_messages import Happened
from holdfast_agent.core.epoch import PrimaryMachine
from holdfast_agent.core.failures import PeerLost, VirtualMachineFailed, VirtualMachineGone
from holdfast_agent.core.frames import DEFAULT_LIMITS, FrameRejected
from holdfast_agent.core.memory_map import MemoryMap, empty_rows
from holdfast_agent.core.pages import OwedPages
from holdfast_agent.core.preface import Preface
from holdfast_agent.core.slabs import SlabPool
from holdfast_agent.core.vm_spec import VmSpec
from holdfast_agent.host.agent_channel import AgentChannel
from holdfast_agent.hypervisor.holding import argv_of
from holdfast_agent.hypervisor.machine import QemuMachine
from holdfast_agent.hypervisor.preflight import Examination, examine
from holdfast_agent.hypervisor.saving import status_of
from holdfast_agent.memory import TRACKERS, GuestMemory, choose_tracker, zero_pages
from holdfast_agent.network.filter_plug import FilterPlug, UnbufferedPlug
from holdfast_agent.network.output_signal import SilentSignal
from holdfast_agent.network.selection import Plug, leftover_plug, make_plug, outlook_of
from holdfast_agent.transport.connection import FrameConnection
from holdfast_agent.transport.identity import Identity, IdentityUnusable
from holdfast_agent.transport.opening import PeerRefused, greet, reach
from holdfast_agent.transport.peer import FramePeer
from holdfast_agent.transport.rdma.moving import Carrier, choose
from holdfast_agent.worker_order import (
    SEEDING_SILENCE_SECONDS,
    WorkerOrder,
    hello_of,
    hurry,
    introduction,
    say_last_word,
    say_seeding_failed,
)
from holdfast_api.words import EventKind, Role, Severity

LOGGER = logging.getLogger(__name__)
CONNECT_SECONDS = 2.0
GREET_SECONDS = 15.0
EXPECTED_SECONDS = 10.0
"""So long a backup may take to learn that it is one."""
EXPECTED_RETRY_SECONDS = 0.1


@dataclass
class Attached:
    """Everything a primary's worker has opened on its VM; `close` undoes it."""

    machine: QemuMachine
    spec: VmSpec
    memory: MemoryCopier
    tracker: DirtyTracker
    plug: OutputPlug
    signal: OutputSignal

    def close(self, *, vm_lives: bool) -> None:
        """Take out what was added to a VM that lives on; let go of one that is gone."""
        self.tracker.close()
        self.memory.close()
        if vm_lives:
            try:
                self.plug.release_all()
                self.plug.remove()
            except VirtualMachineFailed as error:
                LOGGER.warning("taking the plugs out: %s", error)
        else:
            self.plug.discard()
        self.machine.close()


def protect(order: WorkerOrder) -> None:
    """Seed the backup and checkpoint until this generation is over for this host."""
    channel = AgentChannel(order.socket, introduction(order))
    try:
        attached = _attach(order, channel)
    except (VirtualMachineFailed, OSError, ValueError) as error:
        LOGGER.exception("the VM can not be protected")
        _give_up(order, channel, f"the VM can not be protected: {error}")
        return
    vm_lives = True
    try:
        peer, carrier = _find_backup(order, attached)
    except (PeerLost, PeerRefused, FrameRejected, IdentityUnusable) as error:
        outcome = f"the backup could not be reached: {error}"
        say_seeding_failed(channel, order.assignment.generation, outcome)
    else:
        if carrier.fell_back:
            _tell_of_fallback(order, channel, carrier)
        driver = _driver(order, channel, attached, peer, carrier.name)
        outcome = driver.run()
        vm_lives = driver.vm_lives
    attached.close(vm_lives=vm_lives)
    LOGGER.info("finished: %s", outcome)
    say_last_word(channel, outcome, vm_lives=vm_lives)


def recover(order: WorkerOrder, *, is_certain: bool) -> None:
    """Take over the VM from a worker that died; unless `is_certain`, claim first.

    A monitor that does not answer now ends this worker; its agent starts the next one.
    """
    channel = AgentChannel(order.socket, introduction(order))
    try:
        attached = _attach(order, channel, keeps_closed=not is_certain)
    except VirtualMachineGone as error:
        LOGGER.warning("there is nothing to recover: %s", error)
        say_last_word(channel, f"there is nothing to recover: {error}", vm_lives=False)
        return
    outcome, vm_lives = "the plugs were taken out", True
    if not is_certain:
        driver = _driver(order, channel, attached, None)
        outcome = driver.recover()
        vm_lives = driver.vm_lives
    attached.close(vm_lives=vm_lives)
    say_last_word(channel, outcome, vm_lives=vm_lives)


def _give_up(order: WorkerOrder, channel: AgentChannel, why: str) -> None:
    say_seeding_failed(channel, order.assignment.generation, why)
    say_last_word(channel, why, vm_lives=True)


def _tell_of_fallback(order: WorkerOrder, channel: AgentChannel, carrier: Carrier) -> None:
    LOGGER.warning("no RDMA: %s", carrier.fell_back)
    event = order.wants(channel).event(
        EventKind.TRANSPORT_FELL_BACK,
        f"checkpoints go over TCP and not RDMA: {carrier.fell_back}",
        {"backup": order.assignment.peer, "transport": carrier.name},
    )
    channel.send(Happened(event=event))


def _attach(order: WorkerOrder, channel: AgentChannel, *, keeps_closed: bool = False) -> Attached:
    """Open monitor, memory, tracker and plug.

    With `keeps_closed` nothing leaves from here on; otherwise what an earlier worker left closed is
    opened. Raises VirtualMachineFailed, OSError or ValueError, with nothing left open.
    """
    with contextlib.ExitStack() as stack:
        machine = QemuMachine.attach(order.qmp_socket)
        stack.callback(machine.close)
        if status_of(machine.qmp) == "inmigrate":
            raise VirtualMachineGone("it is a standby that was never brought to life")
        found = examine(
            machine.qmp, machine.pid, argv_of(machine.pid), outlook_of(order.config.plug)
        )
        channel.introduce(introduction(order, found))
        blocking = [issue for issue in found.issues if issue.severity is Severity.BLOCKING]
        if blocking and order.mode == "protect":
            raise VirtualMachineFailed("; ".join(issue.message for issue in blocking))
        memory_map = MemoryMap.of_sizes((block.name, block.size_bytes) for block in found.blocks)
        spec = machine.spec(order.assignment.vm, memory_map)
        plug, signal = _plug(order, machine, found)
        plug.install()
        stack.callback(plug.remove)
        if keeps_closed:
            plug.hold()
        else:
            # A guest that stands was stopped by the worker that died, unless nothing was held.
            was_left = plug.leftover_held or order.mode == "clean"
            plug.release_all()
            if was_left:
                machine.resume_if_ours()
        memory = GuestMemory(machine.pid, found.blocks, memory_map)
        stack.callback(memory.close)
        tracker = _tracker(order, machine, found, memory)
        stack.pop_all()
    return Attached(machine, spec, memory, tracker, plug, signal)


def _plug(
    order: WorkerOrder, machine: QemuMachine, found: Examination
) -> tuple[Plug | UnbufferedPlug, OutputSignal]:
    """Return what holds the output: what an earlier worker left, or the best there is."""
    policy = order.assignment.policy
    taps = [nic.tap for nic in found.nics]
    left = leftover_plug(machine.qmp, taps)
    if policy.output == "unbuffered" and left is None:
        return UnbufferedPlug(), SilentSignal()
    plug = make_plug(
        left or found.plug or FilterPlug.name,
        machine.qmp,
        netdev_ids=machine.netdev_ids(),
        taps=taps,
        limit_bytes=policy.held_limit_bytes,
    )
    return plug, plug.signal


def _tracker(
    order: WorkerOrder, machine: QemuMachine, found: Examination, memory: GuestMemory
) -> DirtyTracker:
    """Start the best tracker there is, while the guest stands for a moment."""
    preference = TRACKERS if order.config.tracker == "auto" else (order.config.tracker,)
    if found.running:
        machine.stop()
    try:
        choice = choose_tracker(
            found.identity.pid,
            found.blocks,
            memory,
            preference=preference,
            accelerator=found.identity.accelerator,
        )
    finally:
        if found.running:
            machine.resume()
    for name, reason in choice.passed_over:
        LOGGER.info("tracker %s was passed over: %s", name, reason)
    return choice.tracker


def _find_backup(order: WorkerOrder, attached: Attached) -> tuple[FramePeer, Carrier]:
    """Connect to the backup's worker and be welcomed.

    Raises PeerLost, PeerRefused, FrameRejected or IdentityUnusable.
    """
    assignment, policy = order.assignment, order.assignment.policy
    assert assignment.peer is not None
    assert assignment.peer_address is not None
    identity = Identity.of(order.config)
    preface = Preface(assignment.vm, assignment.generation, tls=identity is not None)
    spec = attached.spec
    hello = hello_of(
        assignment,
        order.config.host,
        spec.blocks,
        spec.model_dump(mode="json"),
        has_rdma=bool(order.config.rdma_address),
    )
    deadline = time.monotonic() + EXPECTED_SECONDS
    while True:
        connection = FrameConnection(
            reach(assignment.peer_address, preface, assignment.peer, identity, CONNECT_SECONDS),
            role=Role.PRIMARY,
            generation=assignment.generation,
            silence_limit_seconds=max(SEEDING_SILENCE_SECONDS, policy.silence_limit_ms / 1000),
            keepalive_seconds=policy.keepalive_ms / 1000,
        )
        try:
            welcome = greet(connection, hello, GREET_SECONDS)
            carrier = choose(connection, welcome, policy.transport, order.config.rdma_address)
        except PeerRefused as refused:
            connection.close()
            if refused.refusal.code != "not-expected" or time.monotonic() > deadline:
                raise
            time.sleep(EXPECTED_RETRY_SECONDS)
        except (PeerLost, FrameRejected):
            connection.close()
            raise
        else:
            peer = FramePeer(
                connection,
                map_page_count=attached.spec.memory_map.page_count,
                silence_limit_seconds=policy.silence_limit_ms / 1000,
                delta_cache_bytes=order.config.delta_cache_bytes,
            )
            return peer, carrier


def _driver(
    order: WorkerOrder,
    channel: AgentChannel,
    attached: Attached,
    peer: FramePeer | None,
    transport: str = "",
) -> PrimaryDriver:
    memory_map = attached.memory.memory_map
    slab_size_bytes = DEFAULT_LIMITS.slab_size_bytes
    slabs = SlabPool(
        slab_size_bytes,
        memory_map.size_bytes + slab_size_bytes,
        made=peer.register if peer is not None else lambda _: None,
    )
    capturer = Capturer(
        vm=attached.machine,
        plug=attached.plug,
        tracker=attached.tracker,
        memory=attached.memory,
        slabs=slabs,
        owed=OwedPages(memory_map.page_count),
        now_ns=time.monotonic_ns,
    )
    seeding = None
    if peer is not None:
        slab = empty_rows(slabs.pages_per_slab)
        peer.register(slab)
        seeding = Seeding(
            vm=attached.machine,
            tracker=attached.tracker,
            memory=attached.memory,
            peer=peer,
            slab=slab,
            zero_pages=zero_pages,
            now_ns=time.monotonic_ns,
            bytes_per_second=order.config.seeding_bytes_per_second,
        )
    assignment = order.assignment
    return PrimaryDriver(
        machine=PrimaryMachine(assignment.generation),
        host=order.config.host,
        parts=PrimaryParts(
            attached.machine, attached.plug, attached.signal, capturer, peer, seeding
        ),
        agent=channel,
        wants=order.wants(channel),
        figures=PrimaryFigures(
            vm=assignment.vm,
            generation=assignment.generation,
            tracker=attached.tracker.name,
            plug=attached.plug.name,
            transport=transport,
        ),
        assignment=assignment,
        now_ns=time.monotonic_ns,
        hurry=hurry,
    )
