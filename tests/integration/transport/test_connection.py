"""FrameConnection over real sockets: whole streams, broken streams, silent peers."""

import hashlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.integration.transport.loopback import (
    CONNECTION_ID,
    DEADLINE_SECONDS,
    Sockets,
    next_frame,
    over,
)

from holdfast_agent.core.failures import PeerLost
from holdfast_agent.core.frames import (
    MEBIBYTE,
    FrameEncoder,
    FrameKind,
    FrameLimits,
    FrameRejected,
    RejectionCode,
)
from holdfast_agent.transport.buffers import MAX_FREE_BUFFERS, StagingLimitReached
from holdfast_agent.transport.connection import MAX_READ_AHEAD, FrameConnection
from holdfast_api.words import ClaimReason, Role

Pair = Callable[..., Sockets]


def until_rejected(connection: FrameConnection) -> FrameRejected:
    with pytest.raises(FrameRejected) as caught:
        next_frame(connection)
    return caught.value


def until_lost(connection: FrameConnection) -> PeerLost:
    with pytest.raises(PeerLost) as caught:
        next_frame(connection)
    return caught.value


def raw_frames(payloads: list[bytes]) -> bytes:
    """The bytes of PAGES frames as the primary of `over` sends them."""
    encoder = FrameEncoder(sender=Role.PRIMARY, generation=7)
    encoder.sequence = 1
    encoder.connection = CONNECTION_ID
    frames = (encoder.encode(FrameKind.PAGES, 1, [payload])[0] for payload in payloads)
    return b"".join(view for frame in frames for view in frame)


# --- whole streams --------------------------------------------------------------------------------


def test_100_mebibytes_arrive_intact(sockets: Pair) -> None:
    primary_socket, backup_socket = sockets()
    primary, backup = over(primary_socket, Role.PRIMARY), over(backup_socket, Role.BACKUP)
    slab = np.random.default_rng(1).integers(0, 255, 4 * MEBIBYTE, dtype=np.uint8)
    sent = hashlib.sha256()
    received = hashlib.sha256()

    def receive() -> None:
        for _ in range(25):
            received.update(next_frame(backup).payload)

    reader = threading.Thread(target=receive)
    reader.start()
    for number in range(25):
        slab[::4096] = number
        sent.update(slab.data)
        primary.send(FrameKind.PAGES, 1, [slab])
    reader.join(DEADLINE_SECONDS)
    assert not reader.is_alive()
    assert received.digest() == sent.digest()
    assert backup.counters.received_bytes == primary.counters.sent_bytes == 25 * (len(slab) + 64)
    assert backup.counters.received_frames == primary.counters.sent_frames == 25


def test_frames_survive_tiny_buffers_and_writes_in_part(sockets: Pair) -> None:
    primary_socket, backup_socket = sockets(buffer_bytes=4096)
    primary, backup = over(primary_socket, Role.PRIMARY), over(backup_socket, Role.BACKUP)
    payloads = [bytes([number]) * size for number, size in enumerate((1, 0, 65, 300_000, 99_999))]
    received: list[bytes] = []

    def receive() -> None:
        received.extend(bytes(next_frame(backup).payload) for _ in payloads)

    reader = threading.Thread(target=receive)
    reader.start()
    for payload in payloads:
        half = len(payload) // 2
        primary.send(FrameKind.PAGES, 1, [payload[:half], b"", payload[half:]])
    reader.join(DEADLINE_SECONDS)
    assert received == payloads


def test_a_frame_of_more_buffers_than_one_write_takes_arrives(sockets: Pair) -> None:
    primary_socket, backup_socket = sockets()
    primary, backup = over(primary_socket, Role.PRIMARY), over(backup_socket, Role.BACKUP)
    primary.send(FrameKind.PAGES, 1, [bytes([number % 251]) for number in range(3000)])
    expected = bytes(number % 251 for number in range(3000))
    assert bytes(next_frame(backup).payload) == expected


def test_a_frame_that_drips_in_byte_by_byte_is_returned_once_and_only_when_whole(
    sockets: Pair,
) -> None:
    raw, backup_socket = sockets()
    backup = over(backup_socket, Role.BACKUP)
    stream = raw_frames([b"payload"])
    for position in range(len(stream)):
        assert backup.receive() is None
        raw.sendall(stream[position : position + 1])
        assert select.select([backup], [], [], DEADLINE_SECONDS)[0]
    frame = backup.receive()
    assert frame is not None
    assert bytes(frame.payload) == b"payload"
    assert backup.receive() is None


def test_keepalives_are_taken_in_silence_and_count_as_heard(sockets: Pair) -> None:
    primary_socket, backup_socket = sockets()
    primary, backup = over(primary_socket, Role.PRIMARY), over(backup_socket, Role.BACKUP)
    before = backup.last_heard_ns
    due = primary.keepalive_due_at_ns
    primary.send_keepalive()
    assert primary.keepalive_due_at_ns > due
    assert select.select([backup], [], [], DEADLINE_SECONDS)[0]
    assert backup.receive() is None
    assert backup.last_heard_ns > before
    assert backup.counters.received_frames == 1


def test_any_frame_puts_the_next_keepalive_off(sockets: Pair) -> None:
    primary_socket, _ = sockets()
    primary = over(primary_socket, Role.PRIMARY)
    due = primary.keepalive_due_at_ns
    primary.send(FrameKind.PAGES, 1, [b"x"])
    assert primary.keepalive_due_at_ns > due


# --- broken streams -------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [64 + 5 + 1, 64 + 5 + 63, 64 + 5 + 64, 64 + 5 + 64 + 4])
def test_a_stream_that_ends_within_a_frame_yields_only_whole_frames(
    sockets: Pair, cut: int
) -> None:
    raw, backup_socket = sockets()
    backup = over(backup_socket, Role.BACKUP)
    raw.sendall(raw_frames([b"first", b"other"])[:cut])
    raw.shutdown(socket.SHUT_WR)
    assert bytes(next_frame(backup).payload) == b"first"
    lost = until_lost(backup)
    assert lost.reason == ClaimReason.STREAM_BROKEN
    assert "within a frame" in lost.explanation
    assert until_lost(backup).reason == ClaimReason.STREAM_BROKEN


def test_a_half_closed_peer_is_lost_after_its_last_frame(sockets: Pair) -> None:
    raw, backup_socket = sockets()
    backup = over(backup_socket, Role.BACKUP)
    raw.sendall(raw_frames([b"first"]))
    raw.shutdown(socket.SHUT_WR)
    next_frame(backup)
    assert "between frames" in until_lost(backup).explanation


def test_what_came_before_a_reset_can_still_be_received(sockets: Pair) -> None:
    primary_socket, backup_socket = sockets()
    primary, backup = over(primary_socket, Role.PRIMARY), over(backup_socket, Role.BACKUP)
    backup.send(FrameKind.ACKNOWLEDGE, 1)
    assert select.select([primary_socket], [], [], DEADLINE_SECONDS)[0]  # unread: will reset
    primary.send(FrameKind.FAREWELL, 0, [b"{}"])
    assert select.select([backup], [], [], DEADLINE_SECONDS)[0]
    primary.close()
    lost: PeerLost | None = None
    for epoch in range(2, 1000):
        try:
            backup.send(FrameKind.ACKNOWLEDGE, epoch)
        except PeerLost as error:
            lost = error
            break
        select.select([], [], [], 0.001)
    assert lost is not None
    assert lost.reason == ClaimReason.STREAM_BROKEN
    backup.send_keepalive()  # raises nothing, sends nothing
    assert next_frame(backup).kind is FrameKind.FAREWELL
    with pytest.raises(PeerLost):
        backup.send(FrameKind.ACKNOWLEDGE, 1001)


@pytest.mark.parametrize("position", [3, 40, 50, 64, 1_000_000])
def test_one_byte_damaged_on_the_way_ends_the_connection(sockets: Pair, position: int) -> None:
    primary_socket, proxy_in = sockets()
    proxy_out, backup_socket = sockets()
    primary, backup = over(primary_socket, Role.PRIMARY), over(backup_socket, Role.BACKUP)

    def damage() -> None:
        seen = 0
        while data := bytearray(proxy_in.recv(65536)):
            if seen <= position < seen + len(data):
                data[position - seen] ^= 0x10
            seen += len(data)
            proxy_out.sendall(data)
        proxy_out.shutdown(socket.SHUT_WR)

    proxy_in.setblocking(True)
    proxy_out.setblocking(True)
    proxy = threading.Thread(target=damage)
    proxy.start()
    primary.send(FrameKind.PAGES, 1, [bytes(2_000_000)])
    primary.send(FrameKind.PAGES, 1, [b"this one is sound, and must not be believed either"])
    primary.end_sending()
    until_rejected(backup)
    until_rejected(backup)
    assert backup.counters.rejected_frames == 1
    assert backup.counters.received_frames == 0
    backup.discard_until_end(time.monotonic_ns() + 10**10)
    proxy.join(DEADLINE_SECONDS)
    assert not proxy.is_alive()


def test_a_replayed_frame_ends_the_connection(sockets: Pair) -> None:
    raw, backup_socket = sockets()
    backup = over(backup_socket, Role.BACKUP)
    raw.sendall(raw_frames([b"again"]) * 2)
    next_frame(backup)
    assert until_rejected(backup).code is RejectionCode.WRONG_SEQUENCE


def test_a_frame_of_another_connection_ends_the_connection(sockets: Pair) -> None:
    raw, backup_socket = sockets()
    backup = over(backup_socket, Role.BACKUP)
    backup.bind(CONNECTION_ID + 1)
    raw.sendall(raw_frames([b"x"]))
    assert until_rejected(backup).code is RejectionCode.WRONG_CONNECTION


# --- silence --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel_helps", [True, False])
def test_a_peer_that_takes_no_data_is_lost_by_silence(sockets: Pair, *, kernel_helps: bool) -> None:
    primary_socket, _ = sockets(buffer_bytes=4096)
    primary = over(primary_socket, Role.PRIMARY, silence_limit_seconds=0.2)
    if not kernel_helps:
        primary_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 0)
    with pytest.raises(PeerLost) as caught:
        primary.send(FrameKind.PAGES, 1, [bytes(4 * MEBIBYTE)])
    assert caught.value.reason == ClaimReason.PEER_SILENT
    with pytest.raises(PeerLost, match="ended before"):
        primary.send(FrameKind.PAGES, 1, [b"x"])


def test_a_slow_peer_that_does_take_data_is_not_lost(sockets: Pair) -> None:
    primary_socket, backup_socket = sockets(buffer_bytes=65536)
    primary = over(primary_socket, Role.PRIMARY, silence_limit_seconds=0.8)
    size = 64 + 2 * MEBIBYTE
    taken = 0

    def take_slowly() -> None:
        nonlocal taken
        paused = 0
        backup_socket.setblocking(True)
        while taken < size and (data := backup_socket.recv(65536)):
            taken += len(data)
            if taken - paused > 200_000:
                paused = taken
                select.select([], [], [], 0.3)

    reader = threading.Thread(target=take_slowly)
    reader.start()
    began = time.monotonic()
    primary.send(FrameKind.PAGES, 1, [bytes(2 * MEBIBYTE)])
    reader.join(DEADLINE_SECONDS)
    assert taken == size
    assert time.monotonic() - began > 0.8, "the reader was not slow enough to prove anything"


def test_a_primary_that_waits_to_send_reads_what_the_backup_says(sockets: Pair) -> None:
    primary_socket, backup_socket = sockets(buffer_bytes=4096)
    primary = over(primary_socket, Role.PRIMARY, silence_limit_seconds=0.3)
    backup = over(backup_socket, Role.BACKUP)
    for _ in range(50):
        backup.send_keepalive()
    for epoch in range(MAX_READ_AHEAD + 10):
        backup.send(FrameKind.ACKNOWLEDGE, epoch)
    with pytest.raises(PeerLost):
        primary.send(FrameKind.PAGES, 1, [bytes(4 * MEBIBYTE)])
    assert primary.has_read_ahead
    assert len(primary._read_ahead) == MAX_READ_AHEAD
    epochs = [next_frame(primary).epoch for _ in range(MAX_READ_AHEAD + 10)]
    assert epochs == list(range(MAX_READ_AHEAD + 10))
    assert not primary.has_read_ahead


def test_a_primary_that_waits_to_send_notices_a_bad_frame(sockets: Pair) -> None:
    primary_socket, raw = sockets(buffer_bytes=4096)
    primary = over(primary_socket, Role.PRIMARY)
    raw.sendall(b"HTTP/1.1 400 Bad Request\r\n" + bytes(64))
    with pytest.raises(FrameRejected, match="bad-magic"):
        primary.send(FrameKind.PAGES, 1, [bytes(4 * MEBIBYTE)])
    with pytest.raises(PeerLost, match="ended before"):
        primary.send(FrameKind.PAGES, 1, [b"x"])


def test_unread_bytes_are_no_silence(sockets: Pair) -> None:
    now = 1_000_000_000
    primary_socket, backup_socket = sockets()
    primary = over(primary_socket, Role.PRIMARY)
    backup = over(backup_socket, Role.BACKUP, silence_limit_seconds=1e-6, clock=lambda: now)
    assert [backup.judge_silence(now + turn) for turn in (400, 800)] == [False, False]
    assert backup.judge_silence(now + 1000)
    assert backup.silence_due_at_ns == now + 1000
    primary.send_keepalive()
    assert select.select([backup], [], [], DEADLINE_SECONDS)[0]
    assert not backup.judge_silence(now + 1200)
    backup.receive()
    assert backup.silence_due_at_ns == now + 1000  # heard at `now`, by the clock that stands still
    assert backup.judge_silence(now + 1001) is False


LISTENER = """
import socket, sys, select, time
from holdfast_agent.transport.connection import FrameConnection
from holdfast_agent.transport.tcp import TcpStream
from holdfast_api.words import Role
limit = float(sys.argv[2])
connection = FrameConnection(TcpStream(socket.socket(fileno=int(sys.argv[1]))), role=Role.BACKUP,
    generation=7, silence_limit_seconds=limit, keepalive_seconds=limit / 5, received_frames=1)
connection.bind(4711)
suspected = False
print("ready", flush=True)
last = time.monotonic()
while True:
    select.select([connection], [], [], limit / 10)
    now = time.monotonic()
    if now - last > limit:
        print("slept", flush=True)
    last = now
    # Judged before anything is received: the worst order for somebody who has just slept.
    if connection.judge_silence(time.monotonic_ns()):
        print("suspected", flush=True)
        sys.exit()
    before = connection.counters.received_frames
    connection.receive()
    if before // 10 != connection.counters.received_frames // 10:
        print("heard", flush=True)
"""


def lines_until(process: "subprocess.Popen[str]", word: str) -> list[str]:
    assert process.stdout is not None
    lines: list[str] = []
    while not lines or lines[-1] != word:
        assert select.select([process.stdout], [], [], DEADLINE_SECONDS)[0], lines
        line = process.stdout.readline()
        assert line, lines
        lines.append(line.strip())
    return lines


def test_a_process_that_was_stopped_does_not_suspect_a_peer_that_lives(tcp_sockets: Pair) -> None:
    limit = 1.0
    primary_socket, backup_socket = tcp_sockets()  # a TLS session can not go to another process
    primary = over(primary_socket, Role.PRIMARY, silence_limit_seconds=30)
    ended = threading.Event()

    def live() -> None:
        while not ended.wait(limit / 20):
            primary.send_keepalive()

    agent = str(Path(__file__).parents[3] / "agent")
    api = str(Path(__file__).parents[3] / "api")
    with subprocess.Popen(
        [sys.executable, "-u", "-c", LISTENER, str(backup_socket.fileno()), str(limit)],
        pass_fds=[backup_socket.fileno()],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": f"{agent}:{api}"},
        text=True,
        bufsize=1,
    ) as process:
        heart = threading.Thread(target=live)
        heart.start()
        try:
            lines_until(process, "heard")
            process.send_signal(signal.SIGSTOP)
            select.select([], [], [], 1.5 * limit)  # the sleep itself is what is tested
            process.send_signal(signal.SIGCONT)
            seen = lines_until(process, "slept") + lines_until(process, "heard")
            assert "suspected" not in seen
            ended.set()
            assert lines_until(process, "suspected")
        finally:
            ended.set()
            heart.join(DEADLINE_SECONDS)
            process.kill()


# --- memory ---------------------------------------------------------------------------------------

LIMITS = FrameLimits(slab_size_bytes=64 * 4096, index_size_bytes=4096)
BUFFER_BYTES = 65 * 4096


def test_a_kept_payload_stays_and_an_unkept_buffer_is_used_again(sockets: Pair) -> None:
    primary_socket, backup_socket = sockets()
    primary = over(primary_socket, Role.PRIMARY, limits=LIMITS)
    backup = over(backup_socket, Role.BACKUP, limits=LIMITS)
    frames = []
    for number in range(3):
        primary.send(FrameKind.PAGES, 1, [bytes([number]) * BUFFER_BYTES])
        frames.append(next_frame(backup))
        if number == 0:
            backup.keep(frames[0])
    assert bytes(frames[0].payload) == bytes(BUFFER_BYTES)
    assert backup.kept_bytes == BUFFER_BYTES
    assert frames[1].buffer is frames[2].buffer
    with pytest.raises(AssertionError):
        backup.keep(frames[0])
    backup.give_back(frames[0])
    assert backup.kept_bytes == 0
    with pytest.raises(AssertionError):
        backup.give_back(frames[0])


def test_a_payload_cannot_be_written_to(sockets: Pair) -> None:
    primary_socket, backup_socket = sockets()
    primary, backup = over(primary_socket, Role.PRIMARY), over(backup_socket, Role.BACKUP)
    primary.send(FrameKind.PAGES, 1, [b"x"])
    assert next_frame(backup).payload.readonly


@pytest.mark.parametrize("size", [BUFFER_BYTES, 70_000, 100])
def test_no_more_is_kept_than_the_limit_allows(sockets: Pair, size: int) -> None:
    primary_socket, backup_socket = sockets()
    primary = over(primary_socket, Role.PRIMARY, limits=LIMITS)
    backup = over(backup_socket, Role.BACKUP, limits=LIMITS, staging_limit_bytes=2 * size)
    for _ in range(2):
        primary.send(FrameKind.PAGES, 1, [bytes(size)])
        backup.keep(next_frame(backup))
    primary.send(FrameKind.PAGES, 1, [bytes(size)])
    frame = next_frame(backup)
    with pytest.raises(StagingLimitReached, match="raise the limit"):
        backup.keep(frame)
    assert backup.kept_bytes == 2 * size


def test_only_a_few_free_buffers_are_held_back(sockets: Pair) -> None:
    primary_socket, backup_socket = sockets()
    primary = over(primary_socket, Role.PRIMARY, limits=LIMITS)
    backup = over(backup_socket, Role.BACKUP, limits=LIMITS)
    frames = []
    for _ in range(MAX_FREE_BUFFERS + 5):
        primary.send(FrameKind.PAGES, 1, [bytes(BUFFER_BYTES)])
        frames.append(next_frame(backup))
        backup.keep(frames[-1])
    for frame in frames:
        backup.give_back(frame)
    assert len(backup._buffers._free) == MAX_FREE_BUFFERS
