"""The first bytes of a connection: what they say, and what is refused."""

import pytest

from holdfast_agent.core.frames import FrameRejected, RejectionCode
from holdfast_agent.core.preface import (
    PREFACE_SIZE_BYTES,
    Preface,
    decode_preface,
    encode_preface,
)


@pytest.mark.parametrize(
    "preface",
    [
        Preface("web", 1, tls=True),
        Preface("a", (1 << 64) - 1, tls=False),
        Preface("x" * 63, 7, tls=True),
    ],
)
def test_a_preface_says_what_was_meant(preface: Preface) -> None:
    data = encode_preface(preface)
    assert len(data) == PREFACE_SIZE_BYTES == 80
    assert decode_preface(data) == preface


def test_the_wire_is_as_documented() -> None:
    data = encode_preface(Preface("web", 258, tls=True))
    assert data == b"HFRP\x01\x01\x00\x00" + b"\x02\x01" + bytes(6) + b"web" + bytes(61)


@pytest.mark.parametrize(
    ("at", "value", "code"),
    [
        (0, 0x47, RejectionCode.BAD_MAGIC),
        (4, 2, RejectionCode.BAD_VERSION),
        (5, 2, RejectionCode.BAD_PAYLOAD),
        (6, 1, RejectionCode.BAD_PAYLOAD),
        (8, 0, RejectionCode.BAD_PAYLOAD),
        (16, ord("W"), RejectionCode.BAD_PAYLOAD),
        (17, 0, RejectionCode.BAD_PAYLOAD),
        (18, 0xFF, RejectionCode.BAD_PAYLOAD),
        (16, 0, RejectionCode.BAD_PAYLOAD),
        (79, ord("w"), RejectionCode.BAD_PAYLOAD),
    ],
)
def test_one_wrong_byte_is_refused(at: int, value: int, code: RejectionCode) -> None:
    data = bytearray(encode_preface(Preface("web", 1, tls=True)))
    data[at] = value
    with pytest.raises(FrameRejected) as caught:
        decode_preface(bytes(data))
    assert caught.value.code is code


def test_a_preface_without_a_name_is_refused() -> None:
    data = encode_preface(Preface("web", 1, tls=True))
    with pytest.raises(FrameRejected, match="no name of a VM"):
        decode_preface(data[:16] + bytes(64))
