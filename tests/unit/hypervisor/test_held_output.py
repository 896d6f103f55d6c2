"""Held output by epoch."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast_agent.network.held_output import HeldOutput


def frame(content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + content


def test_only_the_closed_epoch_is_taken() -> None:
    held = HeldOutput()
    held.feed(frame(b"one"))
    held.close_epoch()
    held.feed(frame(b"two"))
    assert held.take_closed() == frame(b"one")
    assert held.held_bytes == len(frame(b"two"))
    held.close_epoch()
    assert held.take_closed() == frame(b"two")
    assert held.held_bytes == 0


def test_a_torn_frame_belongs_to_the_next_epoch() -> None:
    held = HeldOutput()
    held.feed(frame(b"one") + frame(b"two")[:5])
    held.close_epoch()
    held.feed(frame(b"two")[5:])
    assert held.take_closed() == frame(b"one")
    assert held.take_all() == frame(b"two")


def test_an_epoch_is_closed_once_and_released_once() -> None:
    held = HeldOutput()
    with pytest.raises(AssertionError):
        held.take_closed()
    held.close_epoch()
    with pytest.raises(AssertionError):
        held.close_epoch()
    assert held.take_closed() == b""
    with pytest.raises(AssertionError):
        held.take_closed()


def test_taking_all_ends_the_closed_epoch_too() -> None:
    held = HeldOutput()
    held.feed(frame(b"one"))
    held.close_epoch()
    held.feed(frame(b"two"))
    assert held.take_all() == frame(b"one") + frame(b"two")
    held.close_epoch()
    assert held.take_closed() == b""


def test_beyond_the_limit_whole_packets_are_dropped_and_counted() -> None:
    held = HeldOutput(limit_bytes=len(frame(b"first") + frame(b"second")))
    held.feed(frame(b"first") + frame(b"second"))
    held.feed(frame(b"third") + frame(b"fourth") + frame(b"fifth")[:6])
    assert held.dropped_packets == 2
    held.feed(frame(b"fifth")[6:])
    assert held.dropped_packets == 3
    held.close_epoch()
    assert held.take_closed() == frame(b"first") + frame(b"second")
    held.feed(frame(b"again"))
    assert held.take_all() == frame(b"again")


def test_what_is_no_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="not a redirector"):
        HeldOutput().feed(b"HTTP/1.1 200")


@given(
    st.lists(st.lists(st.binary(max_size=30), max_size=5), max_size=5),
    st.lists(st.integers(1, 20), min_size=1),
)
def test_however_it_is_cut_each_epoch_gets_its_own(
    epochs: list[list[bytes]], cuts: list[int]
) -> None:
    held = HeldOutput()
    for index, packets in enumerate(epochs):
        stream = b"".join(frame(packet) for packet in packets)
        position, turn = 0, index
        while position < len(stream):
            size = cuts[turn % len(cuts)]
            held.feed(stream[position : position + size])
            position, turn = position + size, turn + 1
        held.close_epoch()
        assert held.take_closed() == stream
    assert held.held_bytes == 0
