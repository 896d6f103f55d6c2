"""Frames between two workers: versioned, checksummed, numbered, bound to one connection. Pure.

A frame is a header of 64 bytes and a payload. All integers are little-endian.

| offset | size | field          | refused when                                            |
|--------|------|----------------|---------------------------------------------------------|
| 0      | 4    | magic          | not `HFFR`                                              |
| 4      | 2    | version        | not ours                                                |
| 6      | 2    | kind           | unknown, or not the peer's to send, or out of turn      |
| 8      | 8    | generation     | not the connection's                                    |
| 16     | 8    | connection     | not the id the backup chose in its WELCOME; 0 before it |
| 24     | 8    | sequence       | not the last one of this direction plus one; from 1     |
| 32     | 8    | epoch          | judged with the payload                                 |
| 40     | 4    | payload length | more than its kind may have                             |
| 44     | 4    | sender         | not the peer's role (1 primary, 2 backup)               |
| 48     | 16   | checksum       | not XXH3-128 of bytes 0..47 followed by the payload     |

Theory of operation: everything in the header is judged before memory is set aside for the payload,
so a hostile length costs nothing. The sequence refuses loss, repetition and reordering; the
connection id refuses frames of another connection of the same generation; the sender refuses our
own frames coming back. The checksum finds faults of memory, cables and software. It is no
defence against somebody who forges frames on purpose: that is the business of TLS.

The first frame of the primary is HELLO, the first of the backup WELCOME or REFUSED, and they are
never repeated. What stands in a payload is in `payloads`.

Source: XXH3 (xxHash 0.8 specification); one generation per frame as in docs/invariants.md, INV-1.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray

from holdfast_api.words import Role

PROTOCOL_VERSION = 2
"""2: pages may be encoded."""
MAGIC = b"HFFR"
HEADER = struct.Struct("<4sHHQQQQII16s")
HEADER_SIZE_BYTES = HEADER.size
CHECKSUM_OFFSET = 48
CHECKSUM_SIZE_BYTES = 16

KIBIBYTE = 1024
MEBIBYTE = 1024 * 1024

Part: TypeAlias = bytes | memoryview | NDArray[np.uint8] | NDArray[np.int64]
"""A piece of a payload: contiguous, and not written to until the frame has been sent."""


class FrameKind(IntEnum):
    """What a frame is; the numbers are the wire's."""

    HELLO = 1
    WELCOME = 2
    REFUSED = 3
    KEEPALIVE = 4
    PAGES = 5
    CHECKPOINT = 6
    ACKNOWLEDGE = 7
    FAREWELL = 8
    TRANSPORT = 9


class RejectionCode(StrEnum):
    """Why a frame was refused; stable, metrics and logs carry it."""

    BAD_MAGIC = "bad-magic"
    BAD_VERSION = "bad-version"
    UNKNOWN_KIND = "unknown-kind"
    UNEXPECTED_KIND = "unexpected-kind"
    WRONG_SENDER = "wrong-sender"
    WRONG_GENERATION = "wrong-generation"
    WRONG_CONNECTION = "wrong-connection"
    WRONG_SEQUENCE = "wrong-sequence"
    WRONG_EPOCH = "wrong-epoch"
    TOO_LONG = "too-long"
    BAD_CHECKSUM = "bad-checksum"
    BAD_PAYLOAD = "bad-payload"


class FrameRejected(Exception):  # noqa: N818 - reads as a sentence where it is raised
    """A frame that must not be acted upon; the connection it came from is over."""

    def __init__(self, code: RejectionCode, explanation: str) -> None:
        """Remember why."""
        super().__init__(f"{code.value}: {explanation}")
        self.code = code
        self.explanation = explanation


@dataclass(frozen=True)
class FrameLimits:
    """How long the payloads of each kind may be; the same on both sides."""

    slab_size_bytes: int = 4 * MEBIBYTE
    """Page content of one PAGES frame."""
    index_size_bytes: int = 1 * MEBIBYTE
    """Beside it: which pages they are, and which pages are zero."""
    hello_size_bytes: int = 1 * MEBIBYTE
    device_state_size_bytes: int = 64 * MEBIBYTE
    notice_size_bytes: int = 64 * KIBIBYTE
    """JSON of REFUSED, FAREWELL and TRANSPORT."""
    checkpoint_head_size_bytes: int = 64

    def payload_size_bytes(self, kind: FrameKind) -> int:
        """Return the longest payload of `kind`."""
        match kind:
            case FrameKind.HELLO | FrameKind.WELCOME:
                return self.hello_size_bytes
            case FrameKind.REFUSED | FrameKind.FAREWELL | FrameKind.TRANSPORT:
                return self.notice_size_bytes
            case FrameKind.KEEPALIVE | FrameKind.ACKNOWLEDGE:
                return 0
            case FrameKind.PAGES:
                return self.slab_size_bytes + self.index_size_bytes
            case FrameKind.CHECKPOINT:
                return self.checkpoint_head_size_bytes + self.device_state_size_bytes


DEFAULT_LIMITS = FrameLimits()

SENDER_NUMBERS = {Role.PRIMARY: 1, Role.BACKUP: 2}
OPENING_KINDS = frozenset({FrameKind.HELLO, FrameKind.WELCOME, FrameKind.REFUSED})
KINDS_OF = {
    Role.PRIMARY: frozenset(
        {
            FrameKind.HELLO,
            FrameKind.KEEPALIVE,
            FrameKind.PAGES,
            FrameKind.CHECKPOINT,
            FrameKind.FAREWELL,
            FrameKind.TRANSPORT,
        }
    ),
    Role.BACKUP: frozenset(
        {
            FrameKind.WELCOME,
            FrameKind.REFUSED,
            FrameKind.KEEPALIVE,
            FrameKind.ACKNOWLEDGE,
            FrameKind.FAREWELL,
        }
    ),
}


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """A header whose every field but the checksum has been judged."""

    kind: FrameKind
    generation: int
    connection: int
    sequence: int
    epoch: int
    payload_length: int
    checksum: bytes


class FrameEncoder:
    """Makes the frames of one direction of one connection, in order.

    A frame that was encoded must be sent, whole and in order: the sequence has no gaps.
    """

    def __init__(
        self, *, sender: Role, generation: int, limits: FrameLimits = DEFAULT_LIMITS
    ) -> None:
        """Start at sequence 1 with connection 0, which `connection` replaces after WELCOME."""
        self.connection = 0
        self.sequence = 0
        self._sender = sender
        self._generation = generation
        self._limits = limits

    def encode(
        self, kind: FrameKind, epoch: int = 0, parts: Iterable[Part] = ()
    ) -> tuple[list[memoryview], bytes]:
        """Return the frame as buffers for a gather write, header first, and its checksum.

        The payload's buffers are views of `parts`; nothing is copied.
        """
        assert kind in KINDS_OF[self._sender], (kind, self._sender)
        views = [_bytes_of(part) for part in parts if len(part)]
        length = sum(len(view) for view in views)
        assert length <= self._limits.payload_size_bytes(kind), (kind, length)
        assert (kind in OPENING_KINDS) == (self.sequence == 0), (kind, self.sequence)
        self.sequence += 1
        header = bytearray(HEADER_SIZE_BYTES)
        HEADER.pack_into(
            header,
            0,
            MAGIC,
            PROTOCOL_VERSION,
            kind,
            self._generation,
            self.connection,
            self.sequence,
            epoch,
            length,
            SENDER_NUMBERS[self._sender],
            bytes(CHECKSUM_SIZE_BYTES),
        )
        running = xxhash.xxh3_128(header[:CHECKSUM_OFFSET])
        for view in views:
            running.update(view)
        checksum = running.digest()
        header[CHECKSUM_OFFSET:] = checksum
        return [memoryview(header), *views], checksum


class FrameChecker:
    """Judges the frames of one direction of one connection, in the order they arrive.

    Use: `check_header`, then `update` with each piece of the payload as it comes, then `finish`.
    After a FrameRejected the checker is good for nothing: nothing behind a bad frame is believed.
    """

    def __init__(
        self,
        *,
        sender: Role,
        generation: int | None,
        limits: FrameLimits = DEFAULT_LIMITS,
        received_frames: int = 0,
    ) -> None:
        """Expect frames from `sender`, the next one with sequence `received_frames + 1`.

        `generation` None accepts any: for whoever reads a HELLO before knowing what it is about.
        """
        self.connection = 0
        self.sequence = received_frames
        self._sender = sender
        self._generation = generation
        self._limits = limits
        self._pending: FrameHeader | None = None
        self._missing_bytes = 0
        self._running = xxhash.xxh3_128()

    def check_header(self, data: bytes | bytearray | memoryview) -> FrameHeader:
        """Judge the 64 bytes of a header; the payload of `payload_length` bytes is to follow.

        Raises FrameRejected.
        """
        assert self._pending is None, "the frame before was not finished"
        assert len(data) == HEADER_SIZE_BYTES, len(data)
        (
            magic,
            version,
            number,
            generation,
            connection,
            sequence,
            epoch,
            length,
            sender,
            checksum,
        ) = HEADER.unpack(data)
        if magic != MAGIC:
            raise FrameRejected(RejectionCode.BAD_MAGIC, f"frame begins with {magic!r}")
        if version != PROTOCOL_VERSION:
            raise FrameRejected(
                RejectionCode.BAD_VERSION,
                f"peer speaks version {version}, this agent {PROTOCOL_VERSION}: "
                "install the same release on both hosts",
            )
        kind = self._judge_kind(number, sender, sequence)
        expected = self._generation
        if expected is not None and generation != expected:
            raise FrameRejected(
                RejectionCode.WRONG_GENERATION, f"{kind.name} of {generation}, not {expected}"
            )
        if connection != self.connection:
            raise FrameRejected(
                RejectionCode.WRONG_CONNECTION, f"{kind.name} of another connection"
            )
        if sequence != self.sequence + 1:
            raise FrameRejected(
                RejectionCode.WRONG_SEQUENCE, f"{kind.name} {sequence} after {self.sequence}"
            )
        if length > self._limits.payload_size_bytes(kind):
            raise FrameRejected(RejectionCode.TOO_LONG, f"{kind.name} of {length} bytes")
        self._pending = FrameHeader(kind, generation, connection, sequence, epoch, length, checksum)
        self._missing_bytes = length
        self._running = xxhash.xxh3_128(data[:CHECKSUM_OFFSET])
        return self._pending

    def update(self, piece: memoryview) -> None:
        """Take the next piece of the payload; best while it is still warm in the cache."""
        assert len(piece) <= self._missing_bytes, (len(piece), self._missing_bytes)
        self._missing_bytes -= len(piece)
        self._running.update(piece)

    def finish(self) -> FrameHeader:
        """Return the header of a frame that is whole and undamaged. Raises FrameRejected."""
        header = self._pending
        assert header is not None
        assert self._missing_bytes == 0, self._missing_bytes
        if self._running.digest() != header.checksum:
            raise FrameRejected(
                RejectionCode.BAD_CHECKSUM, f"{header.kind.name} {header.sequence} is damaged"
            )
        self._pending = None
        self.sequence = header.sequence
        return header

    def _judge_kind(self, number: int, sender: int, sequence: int) -> FrameKind:
        """Return the kind if the peer may send it now."""
        if sender != SENDER_NUMBERS[self._sender]:
            raise FrameRejected(
                RejectionCode.WRONG_SENDER, f"sender {sender} is not the {self._sender.value}"
            )
        try:
            kind = FrameKind(number)
        except ValueError as error:
            raise FrameRejected(RejectionCode.UNKNOWN_KIND, f"kind {number}") from error
        if kind not in KINDS_OF[self._sender]:
            raise FrameRejected(
                RejectionCode.UNEXPECTED_KIND, f"{kind.name} from the {self._sender.value}"
            )
        if (kind in OPENING_KINDS) != (sequence == 1):
            raise FrameRejected(
                RejectionCode.UNEXPECTED_KIND, f"{kind.name} as frame {sequence} of a connection"
            )
        return kind


def _bytes_of(part: Part) -> memoryview:
    view = part.data if isinstance(part, np.ndarray) else memoryview(part)
    return view.cast("B")
