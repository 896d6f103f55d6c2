"""The first bytes of whoever connects: what is accepted can be acted upon."""

import re

from hypothesis import example, given, settings
from hypothesis import strategies as st

from holdfast_agent.core.frames import FrameRejected
from holdfast_agent.core.preface import (
    PREFACE,
    PREFACE_MAGIC,
    PREFACE_SIZE_BYTES,
    Preface,
    decode_preface,
    encode_preface,
)
from holdfast_api.words import NAME_PATTERN

EXAMPLES = 500
SIZE = {"min_size": PREFACE_SIZE_BYTES, "max_size": PREFACE_SIZE_BYTES}
NAMES = st.from_regex(NAME_PATTERN, fullmatch=True).filter(lambda name: "\n" not in name)
PREFACES = st.builds(Preface, NAMES, st.integers(1, (1 << 64) - 1), tls=st.booleans())
NEARLY = st.builds(
    PREFACE.pack,
    st.just(PREFACE_MAGIC),
    st.integers(0, 3),
    st.integers(0, 3),
    st.sampled_from((0, 0, 0, 1, 0xFFFF)),
    st.integers(0, (1 << 64) - 1),
    st.binary(max_size=64) | NAMES.map(str.encode),
)


def accepted(data: bytes) -> Preface | None:
    """Return what is believed; holds what must hold of it."""
    try:
        preface = decode_preface(data)
    except FrameRejected:
        return None
    assert re.fullmatch(NAME_PATTERN, preface.vm)
    assert preface.generation > 0
    assert encode_preface(preface) == data, "there is one way to say it"
    return preface


@given(st.binary(**SIZE) | NEARLY)
@example(bytes(PREFACE_SIZE_BYTES))
@example(b"\xff" * PREFACE_SIZE_BYTES)
@example(PREFACE.pack(PREFACE_MAGIC, 1, 1, 0, 1, b"web\n"))
@example(PREFACE.pack(PREFACE_MAGIC, 1, 1, 0, 1, b"web\0web"))
@settings(max_examples=EXAMPLES, deadline=None)
def test_any_bytes_are_understood_or_refused(data: bytes) -> None:
    accepted(data)


@given(PREFACES)
@settings(max_examples=EXAMPLES, deadline=None)
def test_whatever_can_be_said_is_understood(preface: Preface) -> None:
    assert accepted(encode_preface(preface)) == preface


@given(PREFACES, st.integers(0, 8 * PREFACE_SIZE_BYTES - 1))
@settings(max_examples=EXAMPLES, deadline=None)
def test_a_changed_bit_is_refused_or_says_something_else(preface: Preface, bit: int) -> None:
    data = bytearray(encode_preface(preface))
    data[bit // 8] ^= 1 << bit % 8
    assert accepted(bytes(data)) != preface
