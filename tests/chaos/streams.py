"""Byte streams as they pass a wire: TCP put in order, replication frames and HTTP answers. Pure.

Theory of operation. A receiver can only act on bytes that have passed, in order, without a gap. So
does a watcher: what comes early waits (copied, bounded), what comes again is dropped, and whoever
walks the bytes sees each once. A walker knows lengths from headers and skips what it does not need
without copying it. Whoever can not go on raises LostTrack: such a stream must be left alone, as
anything it says from there on would be a guess.

Source: RFC 9293; `holdfast_agent.core.frames` for the frames; RFC 9112 for HTTP.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from tests.chaos.packets import SEQUENCES, near

from holdfast_agent.core.frames import (
    DEFAULT_LIMITS,
    HEADER,
    HEADER_SIZE_BYTES,
    KINDS_OF,
    MAGIC,
    PROTOCOL_VERSION,
    SENDER_NUMBERS,
    FrameKind,
)
from holdfast_agent.core.preface import PREFACE_MAGIC, PREFACE_SIZE_BYTES
from holdfast_api.words import Role

EARLY_BYTES_MAX = 8 << 20
ANSWER_BEGINS = b"HTTP/1."
ANSWER_HEAD_BYTES_MAX = 64 << 10
ANSWER_BODY_BYTES_MAX = 1 << 20
"""A longer one is skipped: no claim's answer and no host's orders are as long as that."""


class LostTrack(Exception):  # noqa: N818 - reads as a sentence where it is raised
    """A stream that can not be followed any more, and why."""


class Reassembly:
    """One direction of a TCP connection; hands its bytes on in order, each once."""

    def __init__(self, next_sequence: int, take: Callable[[memoryview], None]) -> None:
        """Expect this sequence number next; `take` must not keep what it is given."""
        self._next = next_sequence % SEQUENCES
        self._take = take
        self._early: dict[int, bytes] = {}
        self._early_bytes = 0

    @property
    def has_gap(self) -> bool:
        """Bytes have come behind some that have not."""
        return bool(self._early)

    def add(self, sequence: int, payload: memoryview) -> None:
        """Take in a segment's payload. Raises LostTrack, its own and the walker's."""
        ahead = near(sequence, self._next) - self._next
        if ahead > 0:
            self._keep(sequence, payload)
            return
        if len(payload) + ahead <= 0:
            return
        self._pass_on(payload[-ahead:])
        while self._early:
            first = min(self._early, key=lambda each: near(each, self._next))
            ahead = near(first, self._next) - self._next
            if ahead > 0:
                return
            kept = self._early.pop(first)
            self._early_bytes -= len(kept)
            if len(kept) + ahead > 0:
                self._pass_on(memoryview(kept)[-ahead:])

    def _pass_on(self, payload: memoryview) -> None:
        self._next = (self._next + len(payload)) % SEQUENCES
        self._take(payload)

    def _keep(self, sequence: int, payload: memoryview) -> None:
        before = len(self._early.get(sequence, b""))
        if len(payload) <= before:
            return
        self._early_bytes += len(payload) - before
        if self._early_bytes > EARLY_BYTES_MAX:
            raise LostTrack(f"bytes before {sequence} are missing")
        self._early[sequence] = bytes(payload)


class SeenFrame(NamedTuple):
    """What the header of a replication frame says."""

    kind: FrameKind
    generation: int
    epoch: int


DECODED = frozenset({FrameKind.HELLO, FrameKind.FAREWELL})


class FrameWalker:
    """The frames of one direction of a replication connection, by their headers.

    Checksums are not computed: the receivers do, and to judge them is not the witness's business.
    """

    def __init__(
        self,
        sender: Role,
        begins: Callable[[SeenFrame], None],
        ends: Callable[[SeenFrame, bytes], None],
    ) -> None:
        """Call `begins` when a header has passed and `ends` when all has; payloads of `DECODED`."""
        self._sender = sender
        self._begins = begins
        self._ends = ends
        self._head = bytearray()
        self._frame: SeenFrame | None = None
        self._missing_bytes = 0
        self._payload = bytearray()
        self._sequence = 0
        self._skipped_bytes = 0

    def take(self, piece: memoryview) -> None:
        """Walk over the next bytes. Raises LostTrack if they are no frames."""
        at = min(self._skipped_bytes, len(piece))
        self._skipped_bytes -= at
        while at < len(piece):
            if self._frame is None:
                step = min(HEADER_SIZE_BYTES - len(self._head), len(piece) - at)
                self._head += piece[at : at + step]
                at += step
                if len(self._head) < HEADER_SIZE_BYTES:
                    return
                if self._is_preface():
                    rest = PREFACE_SIZE_BYTES - HEADER_SIZE_BYTES
                    step = min(rest, len(piece) - at)
                    at += step
                    self._skipped_bytes = rest - step
                    self._head.clear()
                    continue
                self._begin()
            else:
                step = min(self._missing_bytes, len(piece) - at)
                if self._frame.kind in DECODED:
                    self._payload += piece[at : at + step]
                at += step
                self._missing_bytes -= step
            if self._missing_bytes == 0:
                self._end()

    def _is_preface(self) -> bool:
        """A primary's agent says which VM it is about, before the first frame."""
        is_first = self._sender is Role.PRIMARY and self._sequence == 0
        return is_first and self._head.startswith(PREFACE_MAGIC)

    def _begin(self) -> None:
        magic, version, number, generation, _, sequence, epoch, length, sender, _ = HEADER.unpack(
            self._head
        )
        kinds = {int(kind): kind for kind in KINDS_OF[self._sender]}
        self._sequence += 1
        if (magic, version, sender) != (MAGIC, PROTOCOL_VERSION, SENDER_NUMBERS[self._sender]):
            raise LostTrack(f"no header of the {self._sender}: {bytes(self._head[:8])!r}")
        if number not in kinds or sequence != self._sequence:
            raise LostTrack(f"frame {sequence} of kind {number}, after {self._sequence - 1} frames")
        kind = kinds[number]
        if length > DEFAULT_LIMITS.payload_size_bytes(kind):
            raise LostTrack(f"{kind.name} of {length} bytes")
        self._head.clear()
        self._frame = SeenFrame(kind, generation, epoch)
        self._missing_bytes = length
        self._begins(self._frame)

    def _end(self) -> None:
        assert self._frame is not None
        frame, payload = self._frame, bytes(self._payload)
        self._frame = None
        self._payload.clear()
        self._ends(frame, payload)


class AnswerWalker:
    """The HTTP answers of one direction of a connection; understands what the controllers send."""

    def __init__(self, body: Callable[[bytes], None]) -> None:
        """Call `body` with each whole body."""
        self._body = body
        self._unread = bytearray()
        self._skipped_bytes = 0

    def take(self, piece: memoryview) -> None:
        """Walk over the next bytes. Raises LostTrack if they are no answers of known length."""
        step = min(self._skipped_bytes, len(piece))
        self._skipped_bytes -= step
        self._unread += piece[step:]
        for body in self._bodies():
            self._body(body)

    def _bodies(self) -> Iterator[bytes]:
        while self._unread:
            if self._unread[: len(ANSWER_BEGINS)] != ANSWER_BEGINS[: len(self._unread)]:
                raise LostTrack(f"not an answer: {bytes(self._unread[:40])!r}")
            head, found, _ = self._unread.partition(b"\r\n\r\n")
            if not found:
                if len(head) > ANSWER_HEAD_BYTES_MAX:
                    raise LostTrack("an answer's head has no end")
                return
            length = _content_length(bytes(head))
            end = len(head) + len(found) + length
            if length > ANSWER_BODY_BYTES_MAX:
                self._skipped_bytes = max(0, end - len(self._unread))
                del self._unread[:end]
                continue
            if len(self._unread) < end:
                return
            body = bytes(self._unread[end - length : end])
            del self._unread[:end]
            yield body


def _content_length(head: bytes) -> int:
    """Return how long the body behind this head is. Raises LostTrack."""
    status, *lines = head.split(b"\r\n")
    words = status.split(b" ")
    if not status.startswith(ANSWER_BEGINS) or len(words) < 2 or not words[1].isdigit():
        raise LostTrack(f"not an answer: {status[:40]!r}")
    for line in lines:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length" and value.strip().isdigit():
            return int(value)
    if words[1].startswith(b"1") or words[1] in (b"204", b"304"):
        return 0
    raise LostTrack("an answer of unknown length")
