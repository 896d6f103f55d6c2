"""The stream over a wire that this process is: bytes, credits, waking, ends."""

import errno
import gc
import random
import select

import numpy as np
import pytest
from tests.unit.rdma.wire import End

from holdfast_agent.core.ring import Word, WordKind
from holdfast_agent.transport.rdma.link import SEND_REQUESTS
from holdfast_agent.transport.rdma.verbs import STATUS_RETRIES_EXCEEDED, Completion
from holdfast_agent.transport.stream import LendingStream


def is_readable(end: End) -> bool:
    return bool(select.select([end.stream], [], [], 0)[0])


def receive(end: End, limit: int = 1 << 20) -> bytes:
    """Everything that is there."""
    found, buffer = bytearray(), memoryview(bytearray(limit))
    try:
        while length := end.stream.receive_into(buffer):
            found += buffer[:length]
    except BlockingIOError:
        pass
    return bytes(found)


def send_all(sender: End, receiver: End, data: bytes) -> bytes:
    """Send `data` while the other side reads; return what it read."""
    view, found = memoryview(data), bytearray()
    while view:
        try:
            view = view[sender.stream.send([view]) :]
        except BlockingIOError:
            found += receive(receiver)
    return bytes(found + receive(receiver))


def send_until_stopped(sender: End, data: bytes) -> int:
    """Send the same over and over until there is no room; return how many bytes went."""
    sent = 0
    try:
        while True:
            sent += sender.stream.send([memoryview(data)])
    except BlockingIOError:
        return sent


def test_it_is_a_stream_that_lends(ends: tuple[End, End]) -> None:
    assert isinstance(ends[0].stream, LendingStream)


def test_what_is_sent_arrives_both_ways_and_around_the_ring(ends: tuple[End, End]) -> None:
    chance = random.Random(1)
    for _ in range(200):
        sender, receiver = chance.sample(ends, 2)
        data = chance.randbytes(chance.choice((1, 63, 64, 4096, 8191, 8192, 30_000)))
        assert send_all(sender, receiver, data) == data


def test_views_are_gathered_in_order_and_empty_ones_passed_over(ends: tuple[End, End]) -> None:
    views = [memoryview(part) for part in (b"head", b"", b"-", b"tail")]
    assert ends[0].stream.send(views) == 9
    assert receive(ends[1]) == b"head-tail"


def test_a_receiver_that_does_not_read_stops_the_sender(ends: tuple[End, End]) -> None:
    sender, receiver = ends
    assert send_until_stopped(sender, b"x" * 5000) == 8192
    assert not sender.stream.wait(readable=False, writable=True, timeout_ms=0).writable
    assert len(receive(receiver)) == 8192
    assert sender.stream.wait(readable=False, writable=True, timeout_ms=0).writable


def test_many_small_sends_stop_at_the_limit_of_notices(ends: tuple[End, End]) -> None:
    sender, receiver = ends
    assert send_until_stopped(sender, b"!") == 8
    assert receive(receiver) == b"!" * 8
    sender.stream.send([memoryview(b"?")])
    assert receive(receiver) == b"?"


def test_keep_alives_alone_go_on_for_ever(ends: tuple[End, End]) -> None:
    """More of them than there are requests, in both directions."""
    for _ in range(2 * SEND_REQUESTS):
        for sender, receiver in (ends, ends[::-1]):
            sender.stream.send([memoryview(b"k" * 64)])
            assert receive(receiver) == b"k" * 64


def test_requests_in_flight_have_a_limit(ends: tuple[End, End]) -> None:
    sender, receiver = ends
    sender.link.holds_back = True
    assert send_until_stopped(sender, b"y") == 8
    sender.link.holds_back = False
    sender.link.deliver()
    assert receive(receiver) == b"y" * 8


# --- memory ---------------------------------------------------------------------------------------


def test_registered_memory_is_not_copied_and_lent_until_settled(ends: tuple[End, End]) -> None:
    sender, receiver = ends
    array = np.full(4096, 7, dtype=np.uint8)
    sender.stream.register(array)
    sender.link.holds_back = True
    assert sender.stream.send([array.data]) == 4096
    assert sender.link.copied_bytes == 0
    assert not sender.stream.settle(0)
    sender.link.deliver()
    assert sender.stream.settle(0)
    assert receive(receiver) == bytes([7]) * 4096


def test_other_memory_is_copied_and_may_change_at_once(ends: tuple[End, End]) -> None:
    sender, receiver = ends
    array = np.full(4096, 7, dtype=np.uint8)
    sender.link.holds_back = True
    assert sender.stream.send([array.data]) == 4096
    assert sender.stream.settle(0)
    array[:] = 9
    sender.link.deliver()
    assert sender.link.copied_bytes == 4096
    assert receive(receiver) == bytes([7]) * 4096


def test_a_view_of_registered_memory_counts_and_one_that_leaves_it_does_not(
    ends: tuple[End, End],
) -> None:
    sender, receiver = ends
    array = np.arange(4096, dtype=np.uint8)
    sender.stream.register(array[1024:2048])  # its owner is the whole
    sender.stream.send([array[3000:3500].data])
    assert sender.link.copied_bytes == 0
    assert receive(receiver) == array[3000:3500].tobytes()


def test_a_registration_ends_with_its_array(ends: tuple[End, End]) -> None:
    before = len(ends[0].link.regions)
    array = np.zeros(4096, dtype=np.uint8)
    ends[0].stream.register(array)
    ends[0].stream.register(array)
    assert len(ends[0].link.regions) == before + 1
    del array
    gc.collect()
    assert len(ends[0].link.regions) == before


def test_close_takes_the_ring_out_of_the_peers_reach(ends: tuple[End, End]) -> None:
    array = np.zeros(4096, dtype=np.uint8)
    ends[0].stream.register(array)
    ends[0].stream.close()
    ends[0].stream.close()
    assert ends[0].link.is_closed
    assert not ends[0].link.regions
    ends[0].stream.register(array)
    assert not ends[0].link.regions


# --- waking ---------------------------------------------------------------------------------------


def test_the_descriptor_is_readable_while_bytes_are_left(ends: tuple[End, End]) -> None:
    sender, receiver = ends
    assert not is_readable(receiver)
    sender.stream.send([memoryview(b"abcdef")])
    assert is_readable(receiver)
    assert receiver.stream.receive_into(memoryview(bytearray(2))) == 2
    assert is_readable(receiver)
    assert receive(receiver) == b"cdef"
    assert not is_readable(receiver)
    sender.stream.send([memoryview(b"g")])
    assert is_readable(receiver)


def test_what_another_thread_took_in_is_not_lost_to_the_descriptor(ends: tuple[End, End]) -> None:
    """A keep-alive is sent by a thread that finds a notice while it looks for room."""
    sender, receiver = ends
    sender.stream.send([memoryview(b"abc")])
    assert receiver.stream.wait(readable=False, writable=True, timeout_ms=0).writable
    assert is_readable(receiver)
    assert receive(receiver) == b"abc"
    sender.stream.send([memoryview(b"d")])
    assert is_readable(receiver)


def test_waiting_ends_when_there_is_something(ends: tuple[End, End]) -> None:
    sender, receiver = ends
    assert receiver.stream.wait(readable=True, writable=True, timeout_ms=0) == (False, True)
    assert receiver.stream.wait(readable=True, writable=False, timeout_ms=1) == (False, False)
    sender.stream.send([memoryview(b"z")])
    assert receiver.stream.wait(readable=True, writable=False, timeout_ms=10_000).readable


# --- ends -----------------------------------------------------------------------------------------


def test_after_the_end_all_is_read_and_then_nothing(ends: tuple[End, End]) -> None:
    sender, receiver = ends
    sender.stream.send([memoryview(b"last")])
    sender.stream.end_sending()
    buffer = memoryview(bytearray(10))
    assert receiver.stream.receive_into(buffer) == 4
    assert receiver.stream.receive_into(buffer) == 0
    assert is_readable(receiver)
    receiver.stream.send([memoryview(b"so long")])
    assert receive(sender) == b"so long"


def test_the_end_waits_for_its_credit(ends: tuple[End, End]) -> None:
    sender, receiver = ends
    for _ in range(8):
        sender.stream.send([memoryview(b"e")])
    sender.stream.end_sending()
    buffer = memoryview(bytearray(10))
    assert receiver.stream.receive_into(buffer) == 8
    sender.stream.wait(readable=True, writable=False, timeout_ms=0)
    assert receiver.stream.receive_into(buffer) == 0


def test_what_came_before_the_peer_hung_up_is_still_received(ends: tuple[End, End]) -> None:
    sender, receiver = ends
    sender.stream.send([memoryview(b"farewell")])
    sender.stream.close()
    buffer = memoryview(bytearray(100))
    assert receiver.stream.receive_into(buffer) == 8
    with pytest.raises(ConnectionResetError, match="hung up"):
        receiver.stream.receive_into(buffer)
    with pytest.raises(ConnectionResetError):
        receiver.stream.send([memoryview(b"?")])
    assert is_readable(receiver)
    assert receiver.stream.wait(readable=True, writable=True, timeout_ms=10_000) == (True, True)


def test_a_write_that_the_peers_nic_does_not_confirm_is_a_timeout(ends: tuple[End, End]) -> None:
    sender, _ = ends
    array = np.zeros(4096, dtype=np.uint8)
    sender.stream.register(array)
    sender.link.holds_back = True
    sender.stream.send([array.data])
    sender.link.sends.put(Completion(1, STATUS_RETRIES_EXCEEDED, None))
    with pytest.raises(TimeoutError):
        sender.stream.settle(10_000)
    with pytest.raises(TimeoutError):
        sender.stream.receive_into(memoryview(bytearray(1)))


@pytest.mark.parametrize(
    "word",
    [
        0xFFFF_FFFF,
        Word(WordKind.DATA, 8193).encode(),
        Word(WordKind.CREDIT, 64, 0).encode(),
        Word(WordKind.CREDIT, 0, 1).encode(),
    ],
)
def test_a_word_that_can_not_be_ends_the_connection(ends: tuple[End, End], word: int) -> None:
    ends[1].link.take_word(word)
    with pytest.raises(OSError, match="RDMA") as caught:
        ends[1].stream.receive_into(memoryview(bytearray(1)))
    assert caught.value.errno == errno.EPROTO


def test_data_after_the_end_ends_the_connection(ends: tuple[End, End]) -> None:
    ends[0].stream.end_sending()
    ends[1].link.take_word(Word(WordKind.DATA, 1).encode())
    with pytest.raises(OSError, match="after END"):
        ends[1].stream.send([memoryview(b"x")])
