"""What makes saved device state loadable."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast_agent.hypervisor.device_state import check_saved, incoming_stream

HEADER = b"QEVM\x00\x00\x00\x03"
SAVED = HEADER + b"\x04some section" + b"\x00"
bodies = st.binary(max_size=200).filter(lambda body: not body.startswith(b"\x07"))
machines = st.text("abcdefghijklmnopqrstuvwxyz0123456789.-", min_size=1, max_size=40)


def test_the_configuration_section_stands_behind_the_header() -> None:
    stream = incoming_stream(SAVED, "pc-q35-7.2")
    assert stream == (
        b"QEVM\x00\x00\x00\x03"
        b"\x07\x00\x00\x00\x0apc-q35-7.2"
        b"\x04some section\x00"
        b"\x06\x00\x00\x00\x00"
    )


@given(bodies, machines)
def test_nothing_of_the_saved_state_is_lost(body: bytes, machine: str) -> None:
    saved = HEADER + body + b"\x00"
    stream = incoming_stream(saved, machine)
    (length,) = struct.unpack(">I", stream[9:13])
    assert stream[:8] == HEADER
    assert stream[13 : 13 + length].decode() == machine
    assert stream[13 + length : -5] == saved[8:]


@pytest.mark.parametrize(
    ("saved", "complaint"),
    [
        (b"", "too short"),
        (HEADER, "too short"),
        (b"QEVX" + SAVED[4:], "begins with"),
        (b"QEVM\x00\x00\x00\x04" + SAVED[8:], "version 4"),
        (HEADER + b"\x07\x00\x00\x00\x00\x00", "already"),
        (SAVED[:-1], "cut off"),
    ],
)
def test_what_is_no_device_state_is_refused_with_the_reason(saved: bytes, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        incoming_stream(saved, "pc-q35-7.2")
    with pytest.raises(ValueError, match=complaint):
        check_saved(saved)


@pytest.mark.parametrize("machine", ["", "pc-größe", "x" * 256])
def test_what_is_no_machine_type_is_refused(machine: str) -> None:
    with pytest.raises(ValueError, match="machine type"):
        incoming_stream(SAVED, machine)
