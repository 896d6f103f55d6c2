"""Streams over RDMA, on soft-RoCE: two queue pairs of one host."""

import contextlib
import os
import random
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.lab.inside.rdma import DEADLINE_SECONDS, accept, bring_up, streams

from holdfast_agent.core.failures import PeerLost
from holdfast_agent.core.frames import FrameKind, FrameRejected, RejectionCode
from holdfast_agent.core.payloads import RdmaOffer
from holdfast_agent.transport.connection import FrameConnection
from holdfast_agent.transport.rdma.opening import REFUSALS_MAX, RdmaListener, connect
from holdfast_agent.transport.rdma.stream import RdmaStream
from holdfast_agent.transport.stream import Stream
from holdfast_api.words import Role

ADDRESS = "10.8.0.1"
WAIT_MS = DEADLINE_SECONDS * 1000

Ends = tuple[RdmaStream, RdmaStream]


@pytest.fixture(scope="module", autouse=True)
def _device() -> None:
    bring_up()


@pytest.fixture
def ends() -> Iterator[Ends]:
    """Both ends of a stream: (primary's, backup's)."""
    with streams(ADDRESS) as found:
        yield found


def send(stream: RdmaStream, data: memoryview) -> None:
    while data:
        try:
            data = data[stream.send([data]) :]
        except BlockingIOError:
            assert stream.wait(readable=False, writable=True, timeout_ms=WAIT_MS).writable
    assert stream.settle(WAIT_MS)


def receive(stream: RdmaStream, length: int) -> bytes:
    found = bytearray(length)
    left = memoryview(found)
    while left:
        try:
            count = stream.receive_into(left)
            assert count, "the end"
            left = left[count:]
        except BlockingIOError:
            assert select.select([stream], [], [], DEADLINE_SECONDS)[0], "nothing came"
    return bytes(found)


def over(stream: Stream, role: Role, **changes: float) -> FrameConnection:
    """A connection that was greeted and welcomed already."""
    settings = {"silence_limit_seconds": 30.0, "keepalive_seconds": 1.0} | changes
    connection = FrameConnection(
        stream,
        role=role,
        generation=7,
        silence_limit_seconds=settings["silence_limit_seconds"],
        keepalive_seconds=settings["keepalive_seconds"],
        received_frames=1,
    )
    connection._encoder.sequence = 1
    connection.bind(4711)
    return connection


def deadline_ns() -> int:
    return time.monotonic_ns() + int(DEADLINE_SECONDS * 1e9)


# --- bytes ----------------------------------------------------------------------------------------


def test_bytes_cross_both_ways_and_the_descriptor_tells(ends: Ends) -> None:
    chance = random.Random(3)
    for _ in range(30):
        sender, receiver = chance.sample(ends, 2)
        data = chance.randbytes(chance.choice((1, 64, 4096, 100_000)))
        send(sender, memoryview(data))
        assert receive(receiver, len(data)) == data
        with pytest.raises(BlockingIOError):
            receiver.receive_into(memoryview(bytearray(1)))
        assert not select.select([receiver], [], [], 0)[0]


def test_more_than_a_ring_crosses_with_memory_registered_and_not(ends: Ends) -> None:
    """Three rings of 16 MiB, read by another thread, half of it from registered slabs."""
    primary, backup = ends
    slabs = [np.random.default_rng(n).integers(0, 256, 4 << 20, np.uint8) for n in range(2)]
    primary.register(slabs[0])
    received: list[bytes] = []
    reader = threading.Thread(
        target=lambda: received.extend(receive(backup, 4 << 20) for _ in range(12))
    )
    reader.start()
    for number in range(12):
        send(primary, slabs[number % 2].data)
    reader.join()
    for number in range(12):
        assert received[number] == slabs[number % 2].tobytes()


def test_a_receiver_that_does_not_read_is_never_overrun(ends: Ends) -> None:
    """With no receiver-not-ready retries at all, one word too many would end the connection."""
    primary, backup = ends
    sent = 0
    view = memoryview(b"0123456789abcdef" * 65536)
    while primary.wait(readable=False, writable=True, timeout_ms=3000).writable:
        sent += primary.send([view])
    assert sent == 16 << 20
    assert receive(backup, sent) == bytes(view) * 16
    for _ in range(60):
        primary.send([memoryview(b"k")])
    with pytest.raises(BlockingIOError):
        primary.send([memoryview(b"k")])
    assert receive(backup, 60) == b"k" * 60
    send(primary, memoryview(b"on"))
    assert receive(backup, 2) == b"on"


# --- frames ---------------------------------------------------------------------------------------


def test_a_large_frame_arrives_whole(ends: Ends) -> None:
    primary, backup = over(ends[0], Role.PRIMARY), over(ends[1], Role.BACKUP)
    content = np.random.default_rng(5).integers(0, 256, 4 << 20, np.uint8)
    primary.register(content)
    sender = threading.Thread(target=primary.send, args=(FrameKind.PAGES, 1, [b"head", content]))
    sender.start()
    frame = backup.wait_frame(deadline_ns())
    sender.join()
    assert frame is not None
    assert bytes(frame.payload) == b"head" + content.tobytes()
    backup.send(FrameKind.ACKNOWLEDGE, 1)
    answer = primary.wait_frame(deadline_ns())
    assert answer is not None
    assert answer.kind is FrameKind.ACKNOWLEDGE


def test_a_write_that_was_corrupted_is_detected(ends: Ends) -> None:
    """One bit of the backup's ring flips between the NIC's write and the reading."""
    primary, backup = over(ends[0], Role.PRIMARY), over(ends[1], Role.BACKUP)
    primary.send(FrameKind.PAGES, 1, [b"\0" * 4096])
    ends[1]._own.memory[64 + 1000] ^= 0x10
    with pytest.raises(FrameRejected) as caught:
        backup.wait_frame(deadline_ns())
    assert caught.value.code is RejectionCode.BAD_CHECKSUM
    assert backup.counters.rejected_frames == 1


def test_memory_that_changes_after_its_checksum_is_detected(ends: Ends) -> None:
    """The source is written to while it is lent: what arrives is not what was summed up."""
    primary, backup = over(ends[0], Role.PRIMARY), over(ends[1], Role.BACKUP)
    content = np.zeros(1 << 20, dtype=np.uint8)
    primary.register(content)
    encode = primary._encoder.encode

    def encode_and_spoil(*args: object) -> object:
        made = encode(*args)  # type: ignore[arg-type]
        content[500_000] = 1
        return made

    primary._encoder.encode = encode_and_spoil  # type: ignore[method-assign, assignment]
    primary.send(FrameKind.PAGES, 1, [content])
    with pytest.raises(FrameRejected) as caught:
        backup.wait_frame(deadline_ns())
    assert caught.value.code is RejectionCode.BAD_CHECKSUM


# --- ends -----------------------------------------------------------------------------------------


def test_silence_is_found_by_keep_alives_alone(ends: Ends) -> None:
    """Both NICs are well and the connection stands; the primary just says nothing any more."""
    primary = over(ends[0], Role.PRIMARY)
    backup = over(ends[1], Role.BACKUP, silence_limit_seconds=0.5, keepalive_seconds=0.1)
    primary.send_keepalive()
    judged = 0
    end = deadline_ns()
    while not backup.judge_silence(time.monotonic_ns()):
        assert backup.receive() is None
        assert time.monotonic_ns() < end
        judged += 1
        time.sleep(0.05)
    assert judged >= 5
    assert backup.counters.received_frames == 1


def test_what_was_said_before_hanging_up_is_heard(ends: Ends) -> None:
    primary, backup = over(ends[0], Role.PRIMARY), over(ends[1], Role.BACKUP)
    primary.send(FrameKind.FAREWELL, 0, [b'{"code":"released"}'])
    primary.end_sending()
    frame = backup.wait_frame(deadline_ns())
    assert frame is not None
    assert frame.kind is FrameKind.FAREWELL
    with pytest.raises(PeerLost, match="between frames"):
        backup.wait_frame(deadline_ns())
    backup.close()
    assert primary.discard_until_end(deadline_ns())


def test_a_peer_that_hangs_up_is_noticed_at_once(ends: Ends) -> None:
    ends[0].close()
    assert select.select([ends[1]], [], [], DEADLINE_SECONDS)[0]
    with pytest.raises(ConnectionResetError):
        ends[1].receive_into(memoryview(bytearray(1)))


DIES = """
import sys
from holdfast_agent.core.payloads import RdmaOffer
from holdfast_agent.transport.rdma.opening import connect
stream = connect(sys.argv[1], RdmaOffer.model_validate_json(sys.argv[2]), 60)
stream.send([memoryview(b"alive")])
print("connected", flush=True)
sys.stdin.read()
"""


def test_a_peer_process_that_is_killed_is_noticed_at_once() -> None:
    listener = RdmaListener(ADDRESS)
    with (
        subprocess.Popen(
            [sys.executable, "-c", DIES, ADDRESS, listener.offer.model_dump_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process,
        contextlib.closing(accept(listener)) as backup,
    ):
        assert receive(backup, 5) == b"alive"
        process.kill()
        assert select.select([backup], [], [], DEADLINE_SECONDS)[0]
        with pytest.raises(ConnectionResetError):
            backup.receive_into(memoryview(bytearray(1)))


# --- opening --------------------------------------------------------------------------------------


def refused(offer: RdmaOffer, listener: RdmaListener) -> str:
    """Connect with `offer` while the listener is served; return how that failed."""
    failures: list[str] = []

    def attempt() -> None:
        try:
            connect(ADDRESS, offer, DEADLINE_SECONDS).close()
        except OSError as error:
            failures.append(str(error))

    thread = threading.Thread(target=attempt)
    thread.start()
    end = time.monotonic() + DEADLINE_SECONDS
    while thread.is_alive() and time.monotonic() < end:
        assert listener.advance() is None
        thread.join(0.01)
    return failures[0]


def test_another_token_is_refused_and_the_right_one_still_taken() -> None:
    listener = RdmaListener(ADDRESS)
    wrong = listener.offer.model_copy(update={"token": os.urandom(16).hex()})
    assert "REJECTED" in refused(wrong, listener)
    thread = threading.Thread(
        target=lambda: connect(ADDRESS, listener.offer, DEADLINE_SECONDS).close()
    )
    thread.start()
    accept(listener).close()
    thread.join()


def test_after_several_wrong_tokens_nobody_is_heard_any_more() -> None:
    with contextlib.closing(RdmaListener(ADDRESS)) as listener:
        wrong = listener.offer.model_copy(update={"token": "0" * 32})
        for _ in range(REFUSALS_MAX):
            assert "REJECTED" in refused(wrong, listener)
        with pytest.raises(PermissionError, match="refused"):
            refused(wrong, listener)


def test_where_nobody_listens_connecting_fails() -> None:
    with contextlib.closing(RdmaListener(ADDRESS)) as listener:
        offer = listener.offer
    with pytest.raises(OSError, match="RDMA"):
        connect(ADDRESS, offer, DEADLINE_SECONDS)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "0.0.0.0", "host-1"])
def test_an_address_that_no_device_can_have_is_an_error(address: str) -> None:
    """Not a crash, which is what pyverbs would make of some of them."""
    with pytest.raises(OSError, match="address"):
        RdmaListener(address)


def test_an_address_of_an_interface_without_a_device_is_an_error() -> None:
    subprocess.run(["ip", "addr", "replace", "10.9.9.9/32", "dev", "lo"], check=True)
    with pytest.raises(OSError, match=r"listening at 10\.9\.9\.9"):
        RdmaListener("10.9.9.9")


def test_nothing_is_left_open() -> None:
    with streams(ADDRESS):
        pass
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with streams(ADDRESS) as (primary, backup):
            send(primary, memoryview(b"x"))
            assert receive(backup, 1) == b"x"
    assert len(list(Path("/proc/self/fd").iterdir())) == before
