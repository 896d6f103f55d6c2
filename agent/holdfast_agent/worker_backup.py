"""A backup's worker: waits for its primary, starts the standby, and runs `checkpoint.backup`.

Touches one connection and the standby's QEMU. If it ends in any way but promoted, the standby
is destroyed; if the process is killed, the agent destroys what the ledger and the standby's folder
name.
"""

import contextlib
import logging
import socket
import time

from holdfast_agent.checkpoint.backup import BackupDriver
from holdfast_agent.checkpoint.figures import BackupFigures
from holdfast_agent.checkpoint.waiting import wait_readable
from holdfast_agent.checkpoint.worker_messages import Ordered, PeerConnected, PeerTurnedAway
from holdfast_agent.core.backup import BackupMachine
from holdfast_agent.core.failures import PeerLost, VirtualMachineFailed
from holdfast_agent.core.frames import FrameRejected
from holdfast_agent.core.payloads import Hello, Refusal
from holdfast_agent.core.preface import Preface
from holdfast_agent.core.vm_spec import VmSpec
from holdfast_agent.host.agent_channel import AgentChannel
from holdfast_agent.hypervisor.standby import QemuStandby
from holdfast_agent.memory import GuestMemory
from holdfast_agent.transport.admission import Admitted, Expected, Reception
from holdfast_agent.transport.connection import FrameConnection
from holdfast_agent.transport.identity import Identity
from holdfast_agent.transport.opening import refuse, welcome
from holdfast_agent.transport.peer import FramePeer
from holdfast_agent.transport.rdma.moving import await_choice, make_offer
from holdfast_agent.transport.stream import Stream
from holdfast_agent.worker_order import (
    SEEDING_SILENCE_SECONDS,
    WorkerOrder,
    hurry,
    introduction,
    say_last_word,
)
from holdfast_api.words import Role

LOGGER = logging.getLogger(__name__)
STAGING_ROOM_BYTES = 64 << 20
"""A checkpoint has each page and its number at most once, and a last frame may be half empty."""
PAGE_NUMBER_SIZE_BYTES = 8
PRIMARY_SECONDS = 60.0
"""So long a backup waits for its primary to connect."""


def protect(order: WorkerOrder) -> None:
    """Back up one VM in one generation, to the end."""
    channel = AgentChannel(order.socket, introduction(order))
    arrived = _wait_for_primary(order, channel)
    if arrived is None:
        say_last_word(channel, "no primary came", vm_lives=False)
        return
    hello, stream = arrived.hello, arrived.stream
    standby = _start_standby(order, hello, stream)
    if standby is None:
        say_last_word(channel, "the standby did not start", vm_lives=False)
        return
    channel.introduce(introduction(order, qemu_pid=standby.pid))
    vm_lives = False
    try:
        outcome, vm_lives = _serve(order, channel, hello, stream, standby)
    finally:
        if vm_lives:
            standby.into_machine().close()
        else:
            standby.destroy()
    LOGGER.info("finished: %s", outcome)
    say_last_word(channel, outcome, vm_lives=vm_lives)


def _serve(
    order: WorkerOrder,
    channel: AgentChannel,
    hello: Hello,
    stream: Stream,
    standby: QemuStandby,
) -> tuple[str, bool]:
    connection = _connection(order, hello, stream)
    try:
        _welcome(connection, hello, order.config.rdma_address)
    except (PeerLost, FrameRejected) as lost:
        connection.close()
        return f"the primary left before it was welcomed: {lost}", False
    driver = BackupDriver(
        machine=BackupMachine(order.assignment.generation),
        host=order.config.host,
        standby=standby,
        peer=FramePeer(
            connection,
            map_page_count=hello.memory_map.page_count,
            silence_limit_seconds=hello.silence_limit_ms / 1000,
            read_base=standby.memory.copy_out,
        ),
        agent=channel,
        wants=order.wants(channel),
        figures=BackupFigures(vm=hello.vm, generation=hello.generation),
        now_ns=time.monotonic_ns,
        hurry=hurry,
    )
    return driver.run(), driver.vm_lives


def _welcome(connection: FrameConnection, hello: Hello, rdma_address: str) -> None:
    """Welcome the primary, over RDMA if both want that. Raises PeerLost or FrameRejected."""
    listener = make_offer(rdma_address) if hello.rdma and rdma_address else None
    if listener is None:
        welcome(connection)
        return
    try:
        welcome(connection, listener.offer)
    except PeerLost:
        listener.close()
        raise
    await_choice(connection, listener)


def _wait_for_primary(order: WorkerOrder, channel: AgentChannel) -> Admitted | None:
    """Wait until the primary has connected and was let in; None when it is no use waiting."""
    assignment = order.assignment
    if assignment.peer is None:
        return None
    expected = Expected(
        assignment.vm, assignment.generation, primary=assignment.peer, backup=order.config.host
    )
    deadline = time.monotonic() + PRIMARY_SECONDS
    with contextlib.closing(Reception(expected, Identity.of(order.config))) as reception:
        while time.monotonic() < deadline:
            remaining_ns = int((deadline - time.monotonic()) * 1e9)
            wait_readable([*channel.filenos(), reception.fileno()], remaining_ns)
            for message, descriptor in channel.receive(takes_descriptors=True):
                if isinstance(message, PeerConnected) and descriptor is not None:
                    preface = Preface(message.vm, message.generation, message.tls)
                    sock = socket.socket(fileno=descriptor)
                    reception.greet(sock, preface, message.address)
                if (
                    isinstance(message, Ordered)
                    and message.assignment.generation > assignment.generation
                ):
                    return None
            for result in reception.results():
                if isinstance(result, Admitted):
                    return result
                LOGGER.warning("turned away: %s", result)
                channel.send(PeerTurnedAway(reason=result[:1000]))
    return None


def _start_standby(order: WorkerOrder, hello: Hello, stream: Stream) -> QemuStandby | None:
    """Start the standby, or tell the primary why there is none."""
    try:
        spec = VmSpec.model_validate(hello.spec)
        standby = QemuStandby(spec, run_dir=order.config.run_dir, state_dir=order.config.state_dir)
        standby.start(lambda pid, blocks: GuestMemory(pid, blocks, hello.memory_map))
    except (VirtualMachineFailed, OSError, ValueError) as error:
        LOGGER.exception("the standby did not start")
        explanation = str(error)[:1000]
        refuse(stream, hello.generation, Refusal(code="standby-failed", explanation=explanation))
        stream.close()
        return None
    return standby


def _connection(order: WorkerOrder, hello: Hello, stream: Stream) -> FrameConnection:
    return FrameConnection(
        stream,
        role=Role.BACKUP,
        generation=order.assignment.generation,
        silence_limit_seconds=max(SEEDING_SILENCE_SECONDS, hello.silence_limit_ms / 1000),
        keepalive_seconds=hello.keepalive_ms / 1000,
        received_frames=1,
        staging_limit_bytes=hello.memory_map.size_bytes
        + hello.memory_map.page_count * PAGE_NUMBER_SIZE_BYTES
        + STAGING_ROOM_BYTES,
    )
