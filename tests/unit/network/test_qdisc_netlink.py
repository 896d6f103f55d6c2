"""The messages that switch a plug, byte by byte, and a real kernel's refusal of one."""

import errno
import struct

import pytest

from holdfast_agent.network.qdisc_netlink import (
    AnswerMissing,
    PlugAction,
    PlugSocket,
    PlugStatistics,
    look_message,
    read_statistics,
    switch_message,
)

HEADER = struct.Struct("=IHHII")
TCMSG = struct.Struct("=BBHiIII")


def answer(*attributes: tuple[int, bytes]) -> bytes:
    body = TCMSG.pack(0, 0, 0, 7, 0x48460000, 0xFFFFFFFF, 2)
    for kind, data in attributes:
        body += struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)
    return HEADER.pack(HEADER.size + len(body), 36, 0, 1, 0) + body


def test_a_switch_is_a_change_of_our_root_qdisc_that_is_echoed() -> None:
    message = switch_message(7, PlugAction.LIMIT, 100_000)
    assert HEADER.unpack_from(message) == (len(message), 36, 0x1 | 0x8, 0, 0)
    assert TCMSG.unpack_from(message, 16) == (0, 0, 0, 7, 0x48460000, 0xFFFFFFFF, 0)
    assert message[36:] == (
        struct.pack("=HH8s", 9, 1, b"plug\0") + struct.pack("=HHiI", 12, 2, 3, 100_000)
    )


@pytest.mark.parametrize(
    ("action", "number"), [("BUFFER", 0), ("RELEASE_ONE", 1), ("RELEASE_INDEFINITE", 2)]
)
def test_actions_have_the_kernels_numbers(action: str, number: int) -> None:
    message = switch_message(7, PlugAction[action])
    assert struct.unpack_from("=iI", message, len(message) - 8) == (number, 0)


def test_a_look_asks_for_the_echo_without_which_nothing_answers() -> None:
    assert HEADER.unpack_from(look_message(7)) == (36, 38, 0x1 | 0x8, 0, 0)


def test_statistics_are_found_among_other_attributes() -> None:
    stats = struct.pack("=QIIIIIII", 1 << 40, 9, 3, 0, 0, 0, 2, 500)
    found = read_statistics(answer((1, b"plug\0"), (7, b"x" * 11), (3, stats)))
    assert found == PlugStatistics(1 << 40, 500, 2, 3)
    assert found.entered_bytes == (1 << 40) + 500


@pytest.mark.parametrize(
    "data",
    [answer(), answer((1, b"plug\0")), answer((3, b"short")), answer((3, bytes(36)))[:-8] + b"\0"],
)
def test_an_answer_without_statistics_is_no_answer(data: bytes) -> None:
    with pytest.raises(AnswerMissing):
        read_statistics(data)


def test_an_attribute_without_a_length_ends_the_reading() -> None:
    with pytest.raises(AnswerMissing):
        read_statistics(answer((1, b"plug\0"))[:-12] + bytes(12))


def test_a_refusal_of_the_kernel_carries_its_errno_and_the_next_exchange_is_not_confused() -> None:
    nowhere = 0x7FFFFFF0
    with PlugSocket() as switches:
        for _ in range(3):
            with pytest.raises(OSError, match="was not switched") as refused:
                switches.exchange([look_message(nowhere), look_message(nowhere - 1)])
            assert refused.value.errno in (errno.ENODEV, errno.EOPNOTSUPP)
        assert switches.exchange([]) == []
