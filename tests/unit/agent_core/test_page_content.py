"""Encoded content of pages: what it looks like, and what is refused before and while decoding."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import xxhash
import zstandard

from holdfast_agent.core.frames import FrameRejected
from holdfast_agent.core.memory_map import PAGE_SIZE_BYTES, PageIndexes, PageRows
from holdfast_agent.core.page_content import (
    CHANGED_WORDS_MAX,
    FLAG_DELTA,
    FLAG_ZSTD,
    Content,
    ContentHead,
    check_head,
    decode_content,
    encoded_content,
    plain_content,
)
from holdfast_agent.transport.zstd_blocks import ZstdBlocks

SLAB = 4 * PAGE_SIZE_BYTES
NUMBERS = np.arange(3, dtype=np.int64)


def rows_of(count: int = 3) -> PageRows:
    return np.random.default_rng(1).integers(0, 256, (count, PAGE_SIZE_BYTES), dtype=np.uint8)


def difference_of(*changed_words: int) -> PageRows:
    """Return differences with so many changed words each."""
    difference = np.zeros((len(changed_words), PAGE_SIZE_BYTES), dtype=np.uint8)
    for row, count in zip(difference, changed_words, strict=True):
        row.view(np.uint64)[:count] = 7
    return difference


def known(*flags: bool) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    return np.array(flags, dtype=np.bool_)


def wire(content: Content) -> memoryview:
    return memoryview(b"".join(bytes(part) for part in content.parts))


def decode(
    head: ContentHead,
    payload: memoryview,
    base: PageRows | None = None,
    indexes: PageIndexes = NUMBERS,
) -> PageRows:
    def read_base(wanted: PageIndexes, rows: PageRows) -> None:
        assert base is not None
        rows[:] = base[wanted]

    rows = np.empty((len(indexes), PAGE_SIZE_BYTES), dtype=np.uint8)
    decode_content(
        head,
        payload,
        indexes,
        decompress=ZstdBlocks().decompress,
        read_base=None if base is None else read_base,
        rows=rows,
    )
    return rows


def a_delta(compress: bool = False) -> tuple[Content, PageRows, PageRows]:
    """Return the content of three pages, two of them by difference, the pages, and their base."""
    rows, difference = rows_of(), difference_of(3, 200)
    base = rows.copy()
    base[[0, 2]] ^= difference
    base[1] = 99
    zstd = ZstdBlocks().compress if compress else None
    return encoded_content(rows, (known(True, False, True), difference), zstd), rows, base


def test_content_lies_where_the_table_says() -> None:
    content, rows, _ = a_delta()
    payload = bytes(wire(content))
    assert content.head == ContentHead(
        FLAG_DELTA, 2, len(payload), xxhash.xxh3_128(rows.tobytes()).digest()
    )
    assert content.size_bytes == len(payload) == 2 * 64 + 203 * 8 + PAGE_SIZE_BYTES + 1
    assert payload[:64] == b"\x07" + bytes(63)
    assert payload[64:128] == b"\xff" * 25 + bytes(39)
    assert payload[128 : 128 + 203 * 8] == (7).to_bytes(8, "little") * 203
    assert payload[-1 - PAGE_SIZE_BYTES : -1] == rows[1].tobytes()
    assert payload[-1] == 0b101


@pytest.mark.parametrize("compress", [False, True])
def test_differences_and_whole_pages_come_back_in_order(compress: bool) -> None:
    content, rows, base = a_delta(compress)
    assert bool(content.head.flags & FLAG_ZSTD) == compress
    assert (decode(content.head, wire(content), base) == rows).all()


def test_a_page_that_changed_almost_everywhere_travels_whole() -> None:
    rows = rows_of(2)
    difference = difference_of(CHANGED_WORDS_MAX, CHANGED_WORDS_MAX + 1)
    content = encoded_content(rows, (known(True, True), difference), None)
    assert content.head.delta_page_count == 1
    assert content.size_bytes == 64 + CHANGED_WORDS_MAX * 8 + PAGE_SIZE_BYTES + 1
    assert content.size_bytes <= rows.nbytes
    base = rows.copy()
    base[0] ^= difference[0]
    assert (decode(content.head, wire(content), base, NUMBERS[:2]) == rows).all()


@pytest.mark.parametrize("compress", [None, ZstdBlocks().compress])
@pytest.mark.parametrize("base", [None, (known(False, False, False), rows_of(0))])
def test_what_does_not_get_shorter_travels_plain_and_is_not_copied(
    base: tuple[np.ndarray[tuple[int], np.dtype[np.bool_]], PageRows] | None,
    compress: Callable[[np.ndarray[tuple[int], np.dtype[np.uint8]]], bytes] | None,
) -> None:
    rows = rows_of()
    content = encoded_content(rows, base, compress)
    assert content.head == plain_content(rows).head == ContentHead(0, 0, rows.nbytes, bytes(16))
    assert np.shares_memory(content.parts[0], rows)


def test_no_pages_are_no_content() -> None:
    content = encoded_content(rows_of(0), (known(), rows_of(0)), ZstdBlocks().compress)
    assert content == replace(plain_content(rows_of(0)), parts=content.parts)
    assert content.size_bytes == 0


@pytest.mark.parametrize(
    ("head", "page_count", "words"),
    [
        (ContentHead(4, 0, 1, b""), 1, "unknown flags"),
        (ContentHead(8 | FLAG_ZSTD, 0, 1, b""), 1, "unknown flags"),
        (ContentHead(FLAG_ZSTD, 0, 1, b""), 5, "5 pages in a frame"),
        (ContentHead(FLAG_ZSTD, 0, 1, b""), 1 << 31, "pages in a frame"),
        (ContentHead(FLAG_DELTA, 3, 1, b""), 2, "3 delta pages of 2"),
        (ContentHead(FLAG_DELTA, 0, 1, b""), 2, "0 delta pages with flags"),
        (ContentHead(FLAG_ZSTD, 1, 1, b""), 2, "1 delta pages with flags"),
        (ContentHead(0, 1, 8192, bytes(16)), 2, "1 delta pages with flags"),
        (ContentHead(0, 0, 8191, bytes(16)), 2, "plain content"),
        (ContentHead(0, 0, 8192, b"d" * 16), 2, "plain content"),
        (ContentHead(FLAG_ZSTD, 0, 8193, b""), 2, "content of 8193 bytes"),
        (ContentHead(FLAG_ZSTD, 0, 1 << 63, b""), 2, "content of"),
    ],
)
def test_a_head_that_cannot_be_is_refused(head: ContentHead, page_count: int, words: str) -> None:
    with pytest.raises(FrameRejected, match=words):
        check_head(head, page_count, SLAB)


@pytest.mark.parametrize(
    ("head", "page_count"),
    [
        (ContentHead(0, 0, SLAB, bytes(16)), 4),
        (ContentHead(0, 0, 0, bytes(16)), 0),
        (ContentHead(FLAG_DELTA | FLAG_ZSTD, 4, SLAB, b"d" * 16), 4),
        (ContentHead(FLAG_ZSTD, 0, 1, b"d" * 16), 1),
    ],
)
def test_a_head_at_its_limits_is_let_in(head: ContentHead, page_count: int) -> None:
    check_head(head, page_count, SLAB)


def test_a_difference_is_refused_where_there_is_no_base() -> None:
    content, _, _ = a_delta()
    with pytest.raises(FrameRejected, match="does not have"):
        decode(content.head, wire(content), None)


def test_another_base_is_found() -> None:
    content, _, base = a_delta()
    base[2, 4095] ^= 1
    with pytest.raises(FrameRejected, match="not the ones that were encoded"):
        decode(content.head, wire(content), base)


def spoilt(content: Content, at: int, value: int) -> memoryview:
    payload = bytearray(wire(content))
    payload[at] = value
    return memoryview(bytes(payload))


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (-1, 0b111, "3 delta pages are marked"),
        (-1, 0b001, "1 delta pages are marked"),
        (-1, 0b1001, "2 delta pages are marked, 2 announced"),
        (-1, 0b1101, "3 delta pages are marked"),
        (0, 0x0F, "204 words are marked"),
        (0, 0x03, "202 words are marked"),
        (0, 0x0B, "not the ones"),
        (130, 8, "not the ones"),
        (2000, 8, "not the ones"),
    ],
)
def test_content_that_does_not_fit_itself_is_refused(at: int, value: int, words: str) -> None:
    content, _, base = a_delta()
    with pytest.raises(FrameRejected, match=words):
        decode(content.head, spoilt(content, at, value), base)


@pytest.mark.parametrize("length", [0, 64, 127, 128 + PAGE_SIZE_BYTES, 5848])
def test_a_difference_of_another_length_is_refused(length: int) -> None:
    content, _, base = a_delta()
    payload = wire(content)[:length]
    with pytest.raises(FrameRejected, match="bad-payload"):
        decode(replace(content.head, length=length), payload, base)
    with pytest.raises(FrameRejected, match="announced"):
        decode(content.head, payload, base)


def zstd_head(length: int) -> ContentHead:
    return ContentHead(FLAG_ZSTD, 0, length, b"d" * 16)


def compressed(length: int, *, states_size: bool = True) -> memoryview:
    compressor = zstandard.ZstdCompressor(write_content_size=states_size)
    return memoryview(compressor.compress(bytes(length)))


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (memoryview(b"x" * 100), "not zstd"),
        (memoryview(b""), "not zstd"),
        (compressed(3 * PAGE_SIZE_BYTES)[:-1], "not zstd"),
        (memoryview(bytes(compressed(3 * PAGE_SIZE_BYTES)) + b"x"), "not zstd"),
        (memoryview(bytes(compressed(3 * PAGE_SIZE_BYTES)) * 2), "not zstd"),
        (compressed(3 * PAGE_SIZE_BYTES + 1), "a zstd frame of 12289 bytes"),
        (compressed(1 << 24), "a zstd frame of 16777216 bytes"),
        (compressed(3 * PAGE_SIZE_BYTES, states_size=False), "a zstd frame of"),
        (memoryview(bytes(3 * PAGE_SIZE_BYTES)), "compressed"),
        (compressed(3 * PAGE_SIZE_BYTES), "not the ones"),
    ],
)
def test_compressed_content_that_is_not_what_it_says_is_refused(
    payload: memoryview, words: str
) -> None:
    with pytest.raises(FrameRejected, match=words):
        decode(zstd_head(3 * PAGE_SIZE_BYTES), payload)


def test_compressed_content_of_less_than_its_pages_is_refused() -> None:
    with pytest.raises(FrameRejected, match="for 3 pages"):
        decode(zstd_head(100), compressed(100))
