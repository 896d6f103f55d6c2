"""Frames: what is refused, with which code, and before what."""

import struct
import tracemalloc

import numpy as np
import pytest
import xxhash

from holdfast_agent.core.frames import (
    CHECKSUM_OFFSET,
    HEADER,
    HEADER_SIZE_BYTES,
    MEBIBYTE,
    FrameChecker,
    FrameEncoder,
    FrameHeader,
    FrameKind,
    FrameLimits,
    FrameRejected,
    RejectionCode,
)
from holdfast_api.words import Role


def encoder(*, sender: Role = Role.PRIMARY, generation: int = 7, sequence: int = 4) -> FrameEncoder:
    made = FrameEncoder(sender=sender, generation=generation)
    made.connection = 99
    made.sequence = sequence
    return made


def checker(*, sender: Role = Role.PRIMARY, generation: int | None = 7) -> FrameChecker:
    made = FrameChecker(sender=sender, generation=generation, received_frames=4)
    made.connection = 99
    return made


def judge(subject: FrameChecker, frame: bytes) -> FrameHeader:
    subject.check_header(frame[:HEADER_SIZE_BYTES])
    subject.update(memoryview(frame)[HEADER_SIZE_BYTES:])
    return subject.finish()


def forged(**changes: int | bytes) -> bytes:
    """A KEEPALIVE header with some fields changed and a checksum that fits."""
    fields: dict[str, int | bytes] = {
        "magic": b"HFFR",
        "version": 2,
        "kind": FrameKind.KEEPALIVE,
        "generation": 7,
        "connection": 99,
        "sequence": 5,
        "epoch": 0,
        "length": 0,
        "sender": 1,
    }
    fields.update(changes)
    head = HEADER.pack(*fields.values(), bytes(16))[:CHECKSUM_OFFSET]
    return head + xxhash.xxh3_128(head).digest()


def test_a_header_has_64_bytes() -> None:
    assert HEADER_SIZE_BYTES == 64


def test_a_frame_comes_back_as_it_was_sent() -> None:
    rows = np.arange(8192, dtype=np.uint8).reshape(2, 4096)
    views, checksum = encoder().encode(FrameKind.PAGES, 3, [b"head", rows])
    header = judge(checker(), b"".join(views))
    assert header == FrameHeader(FrameKind.PAGES, 7, 99, 5, 3, 4 + 8192, checksum)


def test_a_payload_is_not_copied_for_sending() -> None:
    rows = np.zeros((2, 4096), dtype=np.uint8)
    views, _ = encoder().encode(FrameKind.PAGES, 0, [b"head", rows])
    rows[1, 4095] = 77
    assert views[-1][-1] == 77


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"magic": b"HTTP"}, RejectionCode.BAD_MAGIC),
        ({"version": 1}, RejectionCode.BAD_VERSION),
        ({"version": 3}, RejectionCode.BAD_VERSION),
        ({"kind": 0}, RejectionCode.UNKNOWN_KIND),
        ({"kind": 10}, RejectionCode.UNKNOWN_KIND),
        ({"kind": FrameKind.ACKNOWLEDGE}, RejectionCode.UNEXPECTED_KIND),
        ({"kind": FrameKind.HELLO}, RejectionCode.UNEXPECTED_KIND),
        ({"generation": 6}, RejectionCode.WRONG_GENERATION),
        ({"generation": 8}, RejectionCode.WRONG_GENERATION),
        ({"connection": 98}, RejectionCode.WRONG_CONNECTION),
        ({"connection": 0}, RejectionCode.WRONG_CONNECTION),
        ({"sequence": 4}, RejectionCode.WRONG_SEQUENCE),
        ({"sequence": 6}, RejectionCode.WRONG_SEQUENCE),
        ({"sender": 2}, RejectionCode.WRONG_SENDER),
        ({"sender": 0}, RejectionCode.WRONG_SENDER),
        ({"length": 1}, RejectionCode.TOO_LONG),
        ({"kind": FrameKind.PAGES, "length": 5 * MEBIBYTE + 1}, RejectionCode.TOO_LONG),
        ({"kind": FrameKind.CHECKPOINT, "length": 64 * MEBIBYTE + 65}, RejectionCode.TOO_LONG),
        ({"kind": FrameKind.FAREWELL, "length": 65537}, RejectionCode.TOO_LONG),
    ],
)
def test_a_header_with_a_wrong_field_is_refused_though_its_checksum_fits(
    changes: dict[str, int | bytes], code: RejectionCode
) -> None:
    with pytest.raises(FrameRejected) as caught:
        checker().check_header(forged(**changes))
    assert caught.value.code is code


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kind": FrameKind.PAGES, "length": 5 * MEBIBYTE},
        {"kind": FrameKind.CHECKPOINT, "length": 64 * MEBIBYTE + 64},
        {"kind": FrameKind.FAREWELL, "length": 65536},
    ],
)
def test_the_longest_payload_of_each_kind_is_let_in(changes: dict[str, int | bytes]) -> None:
    assert checker().check_header(forged(**changes)).payload_length == changes.get("length", 0)


@pytest.mark.parametrize(("kind", "limit"), [(FrameKind.HELLO, MEBIBYTE)])
def test_a_hello_is_the_first_frame_and_has_a_limit(kind: FrameKind, limit: int) -> None:
    fresh = FrameChecker(sender=Role.PRIMARY, generation=None)
    header = forged(kind=kind, connection=0, sequence=1, length=limit, generation=123)
    assert fresh.check_header(header).generation == 123
    fresh = FrameChecker(sender=Role.PRIMARY, generation=None)
    with pytest.raises(FrameRejected, match="too-long"):
        fresh.check_header(forged(kind=kind, connection=0, sequence=1, length=limit + 1))


def test_anything_but_a_hello_as_first_frame_is_refused() -> None:
    fresh = FrameChecker(sender=Role.PRIMARY, generation=None)
    with pytest.raises(FrameRejected) as caught:
        fresh.check_header(forged(sequence=1, connection=0))
    assert caught.value.code is RejectionCode.UNEXPECTED_KIND


def test_our_own_frame_coming_back_is_refused() -> None:
    views, _ = encoder(sender=Role.BACKUP).encode(FrameKind.KEEPALIVE)
    with pytest.raises(FrameRejected, match="wrong-sender"):
        checker().check_header(b"".join(views))


def test_a_backup_cannot_send_pages_and_a_primary_cannot_acknowledge() -> None:
    with pytest.raises(AssertionError):
        encoder(sender=Role.BACKUP).encode(FrameKind.PAGES)
    with pytest.raises(AssertionError):
        encoder(sender=Role.PRIMARY).encode(FrameKind.ACKNOWLEDGE, 1)


def test_an_encoder_does_not_make_what_a_checker_would_refuse_as_too_long() -> None:
    limits = FrameLimits(notice_size_bytes=10)
    made = FrameEncoder(sender=Role.PRIMARY, generation=1, limits=limits)
    made.sequence = 1
    made.encode(FrameKind.FAREWELL, 0, [b"0123456789"])
    with pytest.raises(AssertionError):
        made.encode(FrameKind.FAREWELL, 0, [b"0123456789a"])


def test_an_encoder_begins_with_a_hello_and_never_repeats_it() -> None:
    made = FrameEncoder(sender=Role.PRIMARY, generation=1)
    with pytest.raises(AssertionError):
        made.encode(FrameKind.KEEPALIVE)
    made.encode(FrameKind.HELLO)
    with pytest.raises(AssertionError):
        made.encode(FrameKind.HELLO)


def test_a_hostile_length_sets_no_memory_aside() -> None:
    header = forged(kind=FrameKind.PAGES, length=(1 << 32) - 1)
    subject = checker()
    tracemalloc.start()
    try:
        with pytest.raises(FrameRejected):
            subject.check_header(header)
        assert tracemalloc.get_traced_memory()[1] < 64 * 1024
    finally:
        tracemalloc.stop()


def test_a_payload_is_not_believed_before_it_is_whole() -> None:
    views, _ = encoder().encode(FrameKind.PAGES, 1, [b"0123456789"])
    subject = checker()
    subject.check_header(views[0])
    subject.update(views[1][:9])
    with pytest.raises(AssertionError):
        subject.finish()


def test_a_payload_may_arrive_in_pieces() -> None:
    views, _ = encoder().encode(FrameKind.PAGES, 1, [b"0123456789"])
    subject = checker()
    subject.check_header(views[0])
    for start in range(0, 10, 3):
        subject.update(views[1][start : start + 3])
    assert subject.finish().kind is FrameKind.PAGES


def test_a_swapped_pair_of_checksummed_halves_is_refused() -> None:
    views, _ = encoder().encode(FrameKind.PAGES, 1, [b"abcd", b"efgh"])
    with pytest.raises(FrameRejected, match="bad-checksum"):
        judge(checker(), bytes(views[0]) + b"efghabcd")


def test_the_header_lies_where_the_table_says() -> None:
    views, checksum = encoder(generation=0x1122).encode(FrameKind.PAGES, 0x33, [b"xyz"])
    header = bytes(views[0])
    assert header[0:4] == b"HFFR"
    assert struct.unpack_from("<HH", header, 4) == (2, FrameKind.PAGES)
    assert struct.unpack_from("<QQQQ", header, 8) == (0x1122, 99, 5, 0x33)
    assert struct.unpack_from("<II", header, 40) == (3, 1)
    assert header[48:] == checksum == xxhash.xxh3_128(header[:48] + b"xyz").digest()
