"""Frames under corruption, truncation, repetition, reordering and hostile payloads."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from holdfast_agent.core.frames import (
    HEADER_SIZE_BYTES,
    FrameChecker,
    FrameEncoder,
    FrameHeader,
    FrameKind,
    FrameRejected,
)
from holdfast_agent.core.memory_map import PageIndexes, indexes_of
from holdfast_agent.core.payloads import Pages, decode_pages, encode_pages, split_pages
from holdfast_api.words import Role

Received = list[tuple[FrameHeader, bytes]]


def stream_of(payloads: list[bytes], generation: int = 7, connection: int = 99) -> list[bytes]:
    """PAGES frames of one connection, from sequence 2 on."""
    encoder = FrameEncoder(sender=Role.PRIMARY, generation=generation)
    encoder.sequence = 1
    encoder.connection = connection
    return [b"".join(encoder.encode(FrameKind.PAGES, 1, [payload])[0]) for payload in payloads]


def read(stream: bytes, generation: int = 7, connection: int = 99) -> Received:
    """Every frame that is believed; raises FrameRejected at the first that is not."""
    checker = FrameChecker(sender=Role.PRIMARY, generation=generation, received_frames=1)
    checker.connection = connection
    received: Received = []
    view = memoryview(stream)
    while len(view) >= HEADER_SIZE_BYTES:
        header = checker.check_header(view[:HEADER_SIZE_BYTES])
        view = view[HEADER_SIZE_BYTES:]
        if len(view) < header.payload_length:
            break
        payload = view[: header.payload_length]
        checker.update(payload)
        received.append((checker.finish(), bytes(payload)))
        view = view[header.payload_length :]
    return received


@given(st.lists(st.binary(max_size=200), max_size=6))
def test_every_stream_comes_back_as_it_was_sent(payloads: list[bytes]) -> None:
    assert [payload for _, payload in read(b"".join(stream_of(payloads)))] == payloads


@pytest.mark.parametrize("payload", [b"", b"x", bytes(range(80))])
@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_no_frame_with_any_one_byte_changed_is_believed(payload: bytes, mask: int) -> None:
    frame = stream_of([payload])[0]
    for position in range(len(frame)):
        damaged = bytearray(frame)
        damaged[position] ^= mask
        try:
            assert read(bytes(damaged)) == [], position
        except FrameRejected:
            continue


@given(st.lists(st.binary(max_size=60), min_size=1, max_size=4), st.data())
def test_a_truncated_stream_yields_only_its_whole_frames(
    payloads: list[bytes], data: st.DataObject
) -> None:
    frames = stream_of(payloads)
    stream = b"".join(frames)
    cut = data.draw(st.integers(0, len(stream)))
    ends = list(itertools.accumulate(map(len, frames)))
    whole = sum(end <= cut for end in ends)
    assert [payload for _, payload in read(stream[:cut])] == payloads[:whole]


@given(st.permutations(range(4)), st.integers(0, 3))
@example([0, 1, 2, 3], 0)
def test_repeated_lost_and_reordered_frames_are_refused(order: list[int], lost: int) -> None:
    frames = stream_of([bytes([number]) for number in range(4)])
    if order != [0, 1, 2, 3]:
        with pytest.raises(FrameRejected, match="wrong-sequence"):
            read(b"".join(frames[number] for number in order))
    if lost != 3:
        with pytest.raises(FrameRejected, match="wrong-sequence"):
            read(b"".join(frame for number, frame in enumerate(frames) if number != lost))
    with pytest.raises(FrameRejected, match="wrong-sequence"):
        read(b"".join([*frames, frames[lost]]))


@given(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1))
@example(7, 98)
@example(6, 99)
@example(7, 99)
def test_frames_of_another_generation_or_connection_are_refused(
    generation: int, connection: int
) -> None:
    stream = stream_of([b"x"], generation, connection)[0]
    if (generation, connection) == (7, 99):
        assert len(read(stream)) == 1
        return
    with pytest.raises(FrameRejected):
        read(stream)


@given(st.binary(max_size=400))
def test_noise_is_never_believed(noise: bytes) -> None:
    try:
        assert read(noise) == []
    except FrameRejected:
        return


# --- pages ----------------------------------------------------------------------------------------

MAP_PAGES = 64


def set_of(pages: set[int]) -> PageIndexes:
    return np.array(sorted(pages), dtype=np.int64)


@given(st.sets(st.integers(0, MAP_PAGES - 1)), st.sets(st.integers(0, MAP_PAGES - 1)))
def test_pages_survive_the_wire(content: set[int], zeros: set[int]) -> None:
    zeros -= content
    indexes = set_of(content)
    rows = np.repeat(indexes.astype(np.uint8)[:, None], 4096, axis=1)
    payload = b"".join(bytes(part) for part in encode_pages(Pages(indexes, rows, set_of(zeros))))
    pages = decode_pages(memoryview(payload), MAP_PAGES)
    assert pages.indexes.tolist() == sorted(content)
    assert pages.zero_indexes.tolist() == sorted(zeros)
    assert (pages.rows == rows).all()


@given(st.sets(st.integers(0, MAP_PAGES - 1)), st.sets(st.integers(0, MAP_PAGES - 1)))
def test_splitting_loses_nothing(content: set[int], zeros: set[int]) -> None:
    indexes = set_of(content)
    rows = np.zeros((len(indexes), 4096), dtype=np.uint8)
    pieces = list(split_pages(indexes, rows, set_of(zeros)))
    assert [page for piece in pieces for page in piece.indexes.tolist()] == sorted(content)
    assert [page for piece in pieces for page in piece.zero_indexes.tolist()] == sorted(zeros)


RUN = st.tuples(st.integers(-2, 70) | st.integers(-(2**63), 2**63 - 1), st.integers(-2, 70))


@given(st.lists(RUN, max_size=4), st.lists(RUN, max_size=4), st.integers(0, 70))
@example([(0, 64)], [], 64)
def test_whatever_runs_arrive_every_page_lies_in_the_map_and_comes_once(
    runs: list[tuple[int, int]], zero_runs: list[tuple[int, int]], announced: int
) -> None:
    zero_count = max(sum(count for _, count in zero_runs), 0)
    head = np.array([len(runs), len(zero_runs), announced, zero_count], dtype=np.uint32)
    body = np.array([*runs, *zero_runs], dtype=np.int64)
    payload = head.tobytes() + body.tobytes() + bytes(4096 * announced)
    try:
        pages = decode_pages(memoryview(payload), MAP_PAGES)
    except FrameRejected:
        return
    both = pages.indexes.tolist() + pages.zero_indexes.tolist()
    assert len(both) == len(set(both)) == announced + zero_count
    assert all(0 <= page < MAP_PAGES for page in both)
    assert pages.indexes.tolist() == indexes_of(body[: len(runs)]).tolist()
    assert len(pages.rows) == len(pages.indexes)
