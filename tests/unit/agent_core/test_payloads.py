"""Payloads: pages, checkpoints and greetings, good and bad."""

import struct

import numpy as np
import pytest

from holdfast_agent.core.frames import FrameHeader, FrameKind, FrameLimits, FrameRejected
from holdfast_agent.core.memory_map import NO_PAGES
from holdfast_agent.core.payloads import (
    NO_ROWS,
    CheckpointReceiver,
    Hello,
    Pages,
    PagesTally,
    Welcome,
    decode_checkpoint,
    decode_json,
    decode_pages,
    encode_checkpoint,
    encode_pages,
    split_pages,
)

MAP_PAGES = 100


def payload_of(pages: Pages) -> memoryview:
    return memoryview(b"".join(bytes(part) for part in encode_pages(pages)))


def pages_of(indexes: list[int], zeros: list[int] | None = None) -> Pages:
    rows = np.zeros((len(indexes), 4096), dtype=np.uint8)
    rows[:] = np.array(indexes, dtype=np.uint8)[:, None]
    return Pages(np.array(indexes, np.int64), rows, np.array(zeros or [], np.int64))


def raw_pages(
    runs: list[tuple[int, int]], zero_runs: list[tuple[int, int]], counts: tuple[int, int]
) -> memoryview:
    plain = (0, 0, 4096 * counts[0], bytes(16))
    head = struct.pack("<IIIIIIQ16s", len(runs), len(zero_runs), *counts, *plain)
    body = b"".join(struct.pack("<qq", *run) for run in [*runs, *zero_runs])
    return memoryview(head + body + bytes(4096 * counts[0]))


def header_of(kind: FrameKind, epoch: int, checksum: bytes = b"c" * 16) -> FrameHeader:
    return FrameHeader(kind, 1, 1, 2, epoch, 0, checksum)


def test_pages_come_back_as_views_of_the_payload() -> None:
    buffer = bytearray(payload_of(pages_of([3, 4, 9], [20, 99])))
    pages = decode_pages(memoryview(buffer), MAP_PAGES)
    assert pages.indexes.tolist() == [3, 4, 9]
    assert pages.zero_indexes.tolist() == [20, 99]
    assert pages.rows[:, 0].tolist() == [3, 4, 9]
    assert pages.page_count == 5
    buffer[-1] = 200
    assert pages.rows[2, 4095] == 200


def test_pages_without_content_come_back() -> None:
    pages = decode_pages(payload_of(pages_of([], [0, 1, 2])), MAP_PAGES)
    assert (len(pages.rows), pages.zero_indexes.tolist()) == (0, [0, 1, 2])


def test_the_whole_map_fits() -> None:
    pages = decode_pages(raw_pages([], [(0, MAP_PAGES)], (0, MAP_PAGES)), MAP_PAGES)
    assert len(pages.zero_indexes) == MAP_PAGES


@pytest.mark.parametrize(
    ("runs", "zero_runs", "counts", "words"),
    [
        ([(-1, 1)], [], (1, 0), "negative"),
        ([(0, 0)], [], (0, 0), "empty"),
        ([(5, 2), (9, -1)], [], (1, 0), "empty"),
        ([(MAP_PAGES, 1)], [], (1, 0), "memory map"),
        ([(MAP_PAGES - 1, 2)], [], (2, 0), "memory map"),
        ([], [(MAP_PAGES - 1, 2)], (0, 2), "memory map"),
        ([], [((1 << 63) - 1, 2)], (0, 2), "memory map"),
        ([], [(0, (1 << 63) - 1)], (0, 2), "memory map"),
        ([], [(0, MAP_PAGES + 1)], (0, MAP_PAGES + 1), "memory map"),
        ([(5, 1), (4, 1)], [], (2, 0), "ascend"),
        ([(5, 2), (6, 1)], [], (3, 0), "overlap"),
        ([(5, 2)], [], (1, 0), "announced"),
        ([], [(5, 2)], (0, 3), "announced"),
        ([], [], (1, 0), "in no run"),
        ([(5, 2)], [(6, 1)], (2, 1), "zero and has content"),
        ([(5, 2), (8, 1)], [(1, 2), (7, 2)], (3, 4), "zero and has content"),
    ],
)
def test_pages_that_cannot_be_are_refused(
    runs: list[tuple[int, int]],
    zero_runs: list[tuple[int, int]],
    counts: tuple[int, int],
    words: str,
) -> None:
    with pytest.raises(FrameRejected, match=words) as caught:
        decode_pages(raw_pages(runs, zero_runs, counts), MAP_PAGES)
    assert caught.value.code == "bad-payload"


def test_zero_pages_may_lie_between_pages_with_content() -> None:
    pages = decode_pages(raw_pages([(5, 2), (9, 1)], [(7, 2), (10, 1)], (3, 3)), MAP_PAGES)
    assert pages.zero_indexes.tolist() == [7, 8, 10]


@pytest.mark.parametrize("cut", [-1, 1])
def test_pages_of_another_length_than_announced_are_refused(cut: int) -> None:
    whole = bytes(payload_of(pages_of([1]))) + b"x"
    with pytest.raises(FrameRejected, match="bad-payload"):
        decode_pages(memoryview(whole[: len(whole) - 1 + cut]), MAP_PAGES)


@pytest.mark.parametrize("size", [0, 47])
def test_a_payload_without_a_whole_head_is_refused(size: int) -> None:
    with pytest.raises(FrameRejected, match="bad-payload"):
        decode_pages(memoryview(bytes(size)), MAP_PAGES)
    with pytest.raises(FrameRejected, match="bad-payload"):
        decode_checkpoint(memoryview(bytes(size)))


def test_run_counts_beyond_the_payload_are_refused() -> None:
    with pytest.raises(FrameRejected, match="bad-payload"):
        decode_pages(
            memoryview(struct.pack("<IIIIIIQ16s", 1 << 31, 1 << 31, 0, 0, 0, 0, 0, bytes(16))),
            MAP_PAGES,
        )


def test_pages_are_split_into_frames_that_fit() -> None:
    limits = FrameLimits(slab_size_bytes=4 * 4096, index_size_bytes=2 * 16 * 4)
    indexes = np.arange(0, 20, 2, dtype=np.int64)
    rows = np.zeros((10, 4096), dtype=np.uint8)
    rows[:, 0] = indexes
    zeros = np.arange(1, 21, 2, dtype=np.int64)
    room = limits.payload_size_bytes(FrameKind.PAGES)
    got = list(split_pages(indexes, rows, zeros, limits))
    assert all(len(payload_of(pages)) <= room for pages in got)
    assert np.concatenate([pages.indexes for pages in got]).tolist() == indexes.tolist()
    assert np.concatenate([pages.rows[:, 0] for pages in got]).tolist() == indexes.tolist()
    assert np.concatenate([pages.zero_indexes for pages in got]).tolist() == zeros.tolist()
    assert np.shares_memory(got[0].rows, rows)


def test_no_pages_make_no_frame() -> None:
    assert list(split_pages(NO_PAGES, NO_ROWS)) == []


def test_a_full_slab_with_every_page_apart_is_one_frame_of_the_default_limits() -> None:
    indexes = np.arange(0, 2048, 2, dtype=np.int64)
    rows = np.zeros((1024, 4096), dtype=np.uint8)
    got = list(split_pages(indexes, rows))
    assert len(got) == 1
    assert len(payload_of(got[0])) <= FrameLimits().payload_size_bytes(FrameKind.PAGES)


@pytest.mark.parametrize("final", [True, False])
def test_a_checkpoint_comes_back(*, final: bool) -> None:
    tally = PagesTally()
    tally.add(b"a" * 16, 5)
    payload = memoryview(b"".join(map(bytes, encode_checkpoint(tally, b"devices", final=final))))
    checkpoint = decode_checkpoint(payload)
    assert (checkpoint.page_count, checkpoint.pages_frame_count) == (5, 1)
    assert checkpoint.digest == tally.digest()
    assert checkpoint.final is final
    assert bytes(checkpoint.device_state) == b"devices"


@pytest.mark.parametrize(("offset", "value"), [(12, 2), (32, 6), (32, 8)])
def test_a_checkpoint_with_unknown_flags_or_another_length_is_refused(
    offset: int, value: int
) -> None:
    payload = bytearray(
        b"".join(map(bytes, encode_checkpoint(PagesTally(), b"devices", final=False)))
    )
    payload[offset] = value
    with pytest.raises(FrameRejected, match="bad-payload"):
        decode_checkpoint(memoryview(payload))


def test_a_digest_depends_on_the_order_of_frames() -> None:
    one, other = PagesTally(), PagesTally()
    for checksum in (b"a" * 16, b"b" * 16):
        one.add(checksum, 1)
    for checksum in (b"b" * 16, b"a" * 16):
        other.add(checksum, 1)
    assert one.digest() != other.digest()


# --- whole or not ---------------------------------------------------------------------------------


def checkpoint_of(*frames: tuple[bytes, int]) -> memoryview:
    tally = PagesTally()
    for checksum, page_count in frames:
        tally.add(checksum, page_count)
    return memoryview(b"".join(map(bytes, encode_checkpoint(tally, b"", final=False))))


def arrive(receiver: CheckpointReceiver, epoch: int, checksum: bytes) -> None:
    receiver.pages(header_of(FrameKind.PAGES, epoch, checksum), payload_of(pages_of([1, 2])))


def test_a_checkpoint_is_whole_when_exactly_its_frames_came() -> None:
    receiver = CheckpointReceiver(MAP_PAGES)
    arrive(receiver, 0, b"s" * 16)
    arrive(receiver, 1, b"a" * 16)
    arrive(receiver, 1, b"b" * 16)
    receiver.checkpoint(
        header_of(FrameKind.CHECKPOINT, 1), checkpoint_of((b"a" * 16, 2), (b"b" * 16, 2))
    )
    assert receiver.completed_epoch == 1
    receiver.checkpoint(header_of(FrameKind.CHECKPOINT, 2), checkpoint_of())
    assert receiver.completed_epoch == 2


@pytest.mark.parametrize(
    "announced",
    [
        ((b"a" * 16, 2),),
        ((b"a" * 16, 2), (b"b" * 16, 3)),
        ((b"b" * 16, 2), (b"a" * 16, 2)),
        ((b"a" * 16, 2), (b"b" * 16, 2), (b"c" * 16, 0)),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(
    announced: tuple[tuple[bytes, int], ...],
) -> None:
    receiver = CheckpointReceiver(MAP_PAGES)
    arrive(receiver, 1, b"a" * 16)
    arrive(receiver, 1, b"b" * 16)
    with pytest.raises(FrameRejected, match="not whole"):
        receiver.checkpoint(header_of(FrameKind.CHECKPOINT, 1), checkpoint_of(*announced))
    assert receiver.completed_epoch == 0


@pytest.mark.parametrize("epoch", [0, 2, 3])
def test_a_checkpoint_of_another_epoch_than_the_next_is_refused(epoch: int) -> None:
    receiver = CheckpointReceiver(MAP_PAGES)
    with pytest.raises(FrameRejected, match="wrong-epoch"):
        receiver.checkpoint(header_of(FrameKind.CHECKPOINT, epoch), checkpoint_of())


@pytest.mark.parametrize("epoch", [2, 0])
def test_pages_of_another_epoch_in_the_middle_of_one_are_refused(epoch: int) -> None:
    receiver = CheckpointReceiver(MAP_PAGES)
    arrive(receiver, 1, b"a" * 16)
    with pytest.raises(FrameRejected, match="wrong-epoch"):
        arrive(receiver, epoch, b"b" * 16)


def test_seeding_pages_after_the_first_checkpoint_are_refused() -> None:
    receiver = CheckpointReceiver(MAP_PAGES)
    receiver.checkpoint(header_of(FrameKind.CHECKPOINT, 1), checkpoint_of())
    with pytest.raises(FrameRejected, match="wrong-epoch"):
        arrive(receiver, 0, b"b" * 16)


# --- greetings ------------------------------------------------------------------------------------

HELLO = Hello(
    vm="web",
    generation=3,
    primary="h1",
    backup="h2",
    keepalive_ms=50,
    silence_limit_ms=250,
    blocks=(("pc.ram", 1 << 20), ("vga.vram", 4096)),
    spec={"machine": "q35"},
)


def test_a_hello_comes_back_with_its_memory_map() -> None:
    decoded = decode_json(Hello, HELLO.model_dump_json().encode())
    assert decoded == HELLO
    assert decoded.memory_map.page_count == 257


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("blocks", [["ram", 4095]]),
        ("blocks", [["ram", 4096], ["ram", 4096]]),
        ("blocks", []),
        ("generation", 0),
        ("vm", "../etc"),
        ("surprise", 1),
    ],
)
def test_a_hello_that_cannot_be_is_refused(field: str, value: object) -> None:
    spelt = Hello.model_construct(**(HELLO.model_dump() | {field: value}))
    text = spelt.model_dump_json(warnings=False)
    if field == "surprise":
        text = text[:-1] + ', "surprise": 1}'
    with pytest.raises(FrameRejected, match="bad-payload"):
        decode_json(Hello, text.encode())


@pytest.mark.parametrize("payload", [b"", b"{", b"\xff\xfe", b"[]", b'{"connection": 0}'])
def test_a_welcome_that_is_not_understood_is_refused(payload: bytes) -> None:
    with pytest.raises(FrameRejected, match="bad-payload"):
        decode_json(Welcome, payload)
