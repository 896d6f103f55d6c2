"""The messages that switch a `plug` qdisc, made once, and the socket they go through.

Encoding and decoding are pure; `PlugSocket` needs CAP_NET_ADMIN and talks rtnetlink, in the network
namespace of the thread that opened it. One thread uses it; not thread-safe.

A switch is a change of the root qdisc of one interface:

    offset  size  field
    0       16    struct nlmsghdr: length, RTM_NEWQDISC, REQUEST | ECHO, sequence, 0
    16      20    struct tcmsg: the interface, our handle, parent TC_H_ROOT
    36      12    TCA_KIND "plug"
    48      12    TCA_OPTIONS: struct tc_plug_qopt, action and limit

Only the sequence differs from one use to the next. With NLM_F_ECHO the kernel answers a change by
the qdisc as it is then, statistics included: one message switches and reads, and what is answered
with an error was not switched. The kernel works on a message within `send`, so that all answers
are there when it returns; the messages for several interfaces go in one `send`.

Source: Linux 6.1, `net/sched/sch_api.c` (`tc_modify_qdisc`, `qdisc_notify`), `linux/pkt_sched.h`.
"""

import enum
import errno
import os
import socket
import struct
from collections.abc import Sequence
from typing import NamedTuple, Self

PLUG_HANDLE = 0x4846_0000
"""Of each plug of ours: a root qdisc that somebody put in its place is not switched by mistake."""
TC_H_ROOT = 0xFFFF_FFFF
NLMSG_ERROR = 2
RTM_NEWQDISC, RTM_GETQDISC = 36, 38
NLM_F_REQUEST, NLM_F_ECHO = 0x1, 0x8
TCA_KIND, TCA_OPTIONS, TCA_STATS = 1, 2, 3
LIMIT_BYTES_MAX = 0xFFFF_FFFF
RECEIVE_BYTES = 1 << 15
ANSWER_TIMEOUT_SECONDS = 2

_header = struct.Struct("=IHHII")
_message = struct.Struct("=BBHiIII")
_attribute = struct.Struct("=HH")
_options = struct.Struct("=iI")
_stats = struct.Struct("=QIIIIIII")
_sequence = struct.Struct("=I")
_code = struct.Struct("=i")
_SEQUENCE_OFFSET = 8
_ATTRIBUTES_OFFSET = _header.size + _message.size


class PlugAction(enum.IntEnum):
    """What a plug qdisc can be told (`TCQ_PLUG_*`)."""

    BUFFER = 0
    RELEASE_ONE = 1
    RELEASE_INDEFINITE = 2
    LIMIT = 3


class PlugStatistics(NamedTuple):
    """A plug qdisc as it was when the kernel answered."""

    sent_bytes: int
    """Left the queue since it was made."""
    held_bytes: int
    held_packets: int
    dropped_packets: int

    @property
    def entered_bytes(self) -> int:
        """All that ever entered the queue."""
        return self.sent_bytes + self.held_bytes


NO_STATISTICS = PlugStatistics(0, 0, 0, 0)


class AnswerMissing(OSError):  # noqa: N818 - reads as a sentence where it is raised
    """The kernel's answer did not come, or is none that can be read."""


def switch_message(interface: int, action: PlugAction, limit_bytes: int = 0) -> bytes:
    """Return the message that tells the plug of `interface` to act; its sequence is 0."""
    options = _options.pack(action, limit_bytes)
    attributes = _packed(TCA_KIND, b"plug\0") + _packed(TCA_OPTIONS, options)
    return _request(RTM_NEWQDISC, interface, attributes)


def look_message(interface: int) -> bytes:
    """Return the message that asks for the statistics of `interface`; its sequence is 0."""
    return _request(RTM_GETQDISC, interface, b"")


def read_statistics(answer: bytes | bytearray) -> PlugStatistics:
    """Return the statistics in a qdisc's description. Raises AnswerMissing if there are none."""
    (end,) = _sequence.unpack_from(answer, 0)
    end = min(end, len(answer))
    position = _ATTRIBUTES_OFFSET
    while position + _attribute.size <= end:
        length, kind = _attribute.unpack_from(answer, position)
        if kind == TCA_STATS and _attribute.size + _stats.size <= min(length, end - position):
            sent_bytes, _, dropped, _, _, _, held, held_bytes = _stats.unpack_from(
                answer, position + _attribute.size
            )
            return PlugStatistics(sent_bytes, held_bytes, held, dropped)
        if length < _attribute.size:
            break
        position += (length + 3) & ~3
    raise AnswerMissing(errno.EBADMSG, "the kernel described a qdisc without its statistics")


class PlugSocket:
    """Switches and reads plug qdiscs; owns a socket."""

    def __init__(self) -> None:
        """Open the socket."""
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )
        timeout = struct.pack("ll", ANSWER_TIMEOUT_SECONDS, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        self._socket.bind((0, 0))
        self._next_sequence = 1
        self._answer = bytearray(RECEIVE_BYTES)

    def exchange(self, messages: Sequence[bytes]) -> list[PlugStatistics]:
        """Send the messages together; return the statistics that answer each, in their order.

        Raises OSError: with an errno of the kernel's for the first message that it refused (the
        others may have been obeyed), or AnswerMissing.
        """
        if not messages:
            return []
        first = self._next_sequence
        self._next_sequence = (first + len(messages)) & 0x7FFF_FFFF
        batch = bytearray().join(messages)
        position = _SEQUENCE_OFFSET
        for sequence, message in enumerate(messages, first):
            _sequence.pack_into(batch, position, sequence)
            position += len(message)
        self._socket.send(batch)
        answers: list[PlugStatistics] = []
        refusal = 0
        for sequence in range(first, first + len(messages)):
            answer = self._receive(sequence)
            if isinstance(answer, int):
                refusal = refusal or answer
            else:
                answers.append(answer)
        if refusal:
            raise OSError(refusal, f"a plug qdisc was not switched: {os.strerror(refusal)}")
        return answers

    def _receive(self, wanted: int) -> PlugStatistics | int:
        """Return the answer to one message, or the errno of its refusal.

        The kernel answers in order, each in a datagram of its own; what an exchange that failed
        left behind is passed over.
        """
        answer = self._answer
        while True:
            try:
                size = self._socket.recv_into(answer)
            except BlockingIOError as error:
                raise AnswerMissing(errno.ETIMEDOUT, "rtnetlink did not answer in time") from error
            if size < _header.size + _code.size:
                raise AnswerMissing(errno.EBADMSG, "rtnetlink's answer is cut short")
            length, kind, _, sequence, _ = _header.unpack_from(answer)
            if sequence != wanted:
                continue
            if kind == NLMSG_ERROR:
                (code,) = _code.unpack_from(answer, _header.size)
                return int(-code)
            if kind == RTM_NEWQDISC and length <= size:
                return read_statistics(answer)

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self._socket.close()

    def __enter__(self) -> Self:
        """Use it as a context."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


def _packed(kind: int, data: bytes) -> bytes:
    padding = bytes(-len(data) % 4)
    return _attribute.pack(_attribute.size + len(data), kind) + data + padding


def _request(kind: int, interface: int, attributes: bytes) -> bytes:
    body = _message.pack(0, 0, 0, interface, PLUG_HANDLE, TC_H_ROOT, 0) + attributes
    flags = NLM_F_REQUEST | NLM_F_ECHO
    return _header.pack(_header.size + len(body), kind, flags, 0, 0) + body
