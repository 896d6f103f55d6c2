"""Credits for a ring of memory that a peer fills by RDMA WRITE. Pure.

Theory of operation. Each side sets a ring aside and lets the other one write into it. The writer
puts bytes behind those it wrote before, and then one *notice*, a word of 32 bits, says how many
became readable. The reader takes them out in order and returns credits, which are words as well.
So the bytes form a stream, and the writer never writes where something unread lies.

A word takes a receive request of whoever it arrives at, so words are counted like bytes:

| bits   | DATA, END            | CREDIT                                     |
|--------|----------------------|--------------------------------------------|
| 31..30 | kind: 0 DATA, 2 END  | kind: 1                                    |
| 29..24 | length, upper part   | notices that were taken                    |
| 23..0  | length; 0 for END    | bytes that were taken, in units of 64      |

Credits are returned only when a quarter of the ring or of the notices was taken. Formulas:

    bytes written and not credited   <= ring_size_bytes
    notices sent and not credited    <= notice_limit
    credits on their way or untaken  <= 8: at most four for bytes and four for notices
    receive requests needed           = notice_limit + 8

The last one is why a slow receiver is never overrun: nobody ever sends it a word for which it has
no request posted. And a writer never waits for ever: as long as the reader takes what is there,
less than a quarter of either stays uncredited.
"""

from dataclasses import dataclass
from enum import IntEnum

CREDITS_IN_FLIGHT_MAX = 8
CREDIT_FRACTION = 4
CREDIT_UNIT_BYTES = 64
KIND_SHIFT = 30
LENGTH_MAX = (1 << KIND_SHIFT) - 1
NOTICES_SHIFT = 24
NOTICES_MAX = (1 << (KIND_SHIFT - NOTICES_SHIFT)) - 1
UNITS_MAX = (1 << NOTICES_SHIFT) - 1
WORD_MAX = (1 << 32) - 1


class RingViolated(Exception):  # noqa: N818 - reads as a sentence where it is raised
    """The peer said what cannot be; nothing behind it is believed."""


class WordKind(IntEnum):
    """What a word of 32 bits says."""

    DATA = 0
    CREDIT = 1
    END = 2


@dataclass(frozen=True, slots=True)
class Word:
    """A notice (DATA, END) or a credit."""

    kind: WordKind
    length_bytes: int = 0
    """DATA: readable now. CREDIT: taken, a multiple of 64."""
    notices: int = 0
    """CREDIT: notices that were taken."""

    def encode(self) -> int:
        """Return the 32 bits."""
        if self.kind is WordKind.CREDIT:
            assert self.length_bytes % CREDIT_UNIT_BYTES == 0, self
            units = self.length_bytes // CREDIT_UNIT_BYTES
            assert 0 <= units <= UNITS_MAX, self
            assert 0 <= self.notices <= NOTICES_MAX, self
            return self.kind << KIND_SHIFT | self.notices << NOTICES_SHIFT | units
        assert 0 <= self.length_bytes <= LENGTH_MAX, self
        return self.kind << KIND_SHIFT | self.length_bytes

    @classmethod
    def decode(cls, value: int) -> "Word":
        """Return what 32 bits say. Raises RingViolated."""
        assert 0 <= value <= WORD_MAX, value
        try:
            kind = WordKind(value >> KIND_SHIFT)
        except ValueError as error:
            raise RingViolated(f"word {value:#010x} is of no kind") from error
        rest = value & LENGTH_MAX
        if kind is WordKind.CREDIT:
            return cls(kind, (rest & UNITS_MAX) * CREDIT_UNIT_BYTES, rest >> NOTICES_SHIFT)
        if (kind is WordKind.DATA) != (rest > 0):
            raise RingViolated(f"{kind.name} of {rest} bytes")
        return cls(kind, rest)


@dataclass(frozen=True, slots=True)
class RingShape:
    """How much one side lets the other write before it has read."""

    size_bytes: int
    notice_limit: int

    def fault(self) -> str | None:
        """Return what is wrong with these figures, if anything."""
        # A quarter of the ring is whole units: a credit for one never carries less.
        quantum = CREDIT_FRACTION * CREDIT_UNIT_BYTES
        largest = UNITS_MAX * CREDIT_UNIT_BYTES
        if self.size_bytes % quantum or not quantum <= self.size_bytes <= largest:
            return f"a ring of {self.size_bytes} bytes"
        if not CREDIT_FRACTION <= self.notice_limit <= NOTICES_MAX:
            return f"{self.notice_limit} notices"
        return None

    @property
    def receive_requests(self) -> int:
        """How many words its owner must be ready to receive at any time."""
        return self.notice_limit + CREDITS_IN_FLIGHT_MAX


class RingWriter:
    """What we may write into the peer's ring."""

    def __init__(self, shape: RingShape) -> None:
        """Begin with an empty ring."""
        assert shape.fault() is None, shape
        self._shape = shape
        self._position = 0
        self._outstanding_bytes = 0
        self._outstanding_notices = 0

    @property
    def room_bytes(self) -> int:
        """How many bytes may be written now."""
        return self._shape.size_bytes - self._outstanding_bytes

    @property
    def may_notify(self) -> bool:
        """Whether one more notice may be sent."""
        return self._outstanding_notices < self._shape.notice_limit

    def span(self, length: int) -> tuple[int, int]:
        """Return offset and length of the next piece up to the end of the ring, and take it."""
        assert 0 < length <= self.room_bytes, (length, self.room_bytes)
        taken = min(length, self._shape.size_bytes - self._position)
        offset = self._position
        self._position = (self._position + taken) % self._shape.size_bytes
        self._outstanding_bytes += taken
        return offset, taken

    def notified(self) -> None:
        """Count a notice that was sent."""
        assert self.may_notify, "no credit for a notice"
        self._outstanding_notices += 1

    def credited(self, credit: Word) -> None:
        """Take a credit. Raises RingViolated for more than is outstanding."""
        assert credit.kind is WordKind.CREDIT, credit
        if credit.length_bytes > self._outstanding_bytes:
            raise RingViolated(
                f"credit for {credit.length_bytes} bytes of {self._outstanding_bytes} outstanding"
            )
        if credit.notices > self._outstanding_notices:
            raise RingViolated(
                f"credit for {credit.notices} notices of {self._outstanding_notices} outstanding"
            )
        self._outstanding_bytes -= credit.length_bytes
        self._outstanding_notices -= credit.notices


class RingReader:
    """What lies unread in our own ring, and the credits that are owed for what was read."""

    def __init__(self, shape: RingShape) -> None:
        """Begin with an empty ring."""
        assert shape.fault() is None, shape
        self._shape = shape
        self._position = 0
        self.readable_bytes = 0
        self._owed_bytes = 0
        self._owed_notices = 0

    def arrived(self, notice: Word) -> None:
        """Take a notice. Raises RingViolated for more than there was room for."""
        assert notice.kind is not WordKind.CREDIT, notice
        room_bytes = self._shape.size_bytes - self.readable_bytes - self._owed_bytes
        if notice.length_bytes > room_bytes:
            raise RingViolated(f"{notice.length_bytes} bytes arrived, room was for {room_bytes}")
        if self._owed_notices >= self._shape.notice_limit:
            raise RingViolated(f"more than {self._shape.notice_limit} notices arrived")
        self.readable_bytes += notice.length_bytes
        self._owed_notices += 1

    def span(self, length: int) -> tuple[int, int]:
        """Return offset and length of the next readable piece of at most `length` bytes."""
        return self._position, min(
            length, self.readable_bytes, self._shape.size_bytes - self._position
        )

    def taken(self, length: int) -> None:
        """Count bytes that were read out of the ring."""
        assert 0 < length <= self.span(length)[1], (length, self.readable_bytes)
        self._position = (self._position + length) % self._shape.size_bytes
        self.readable_bytes -= length
        self._owed_bytes += length

    def credit_due(self) -> Word | None:
        """Return the credit to send now, if enough is owed; it counts as sent."""
        enough = (
            self._owed_bytes * CREDIT_FRACTION >= self._shape.size_bytes
            or self._owed_notices * CREDIT_FRACTION >= self._shape.notice_limit
        )
        if not enough:
            return None
        units = self._owed_bytes // CREDIT_UNIT_BYTES
        credit = Word(WordKind.CREDIT, units * CREDIT_UNIT_BYTES, self._owed_notices)
        self._owed_bytes -= credit.length_bytes
        self._owed_notices = 0
        return credit


class BounceRing:
    """Room of a buffer that is used and given back in order."""

    def __init__(self, size_bytes: int) -> None:
        """Begin empty."""
        assert size_bytes > 0, size_bytes
        self._size_bytes = size_bytes
        self._position = 0
        self.used_bytes = 0

    @property
    def room_bytes(self) -> int:
        """How many bytes can be placed now, not all of them in one piece perhaps."""
        return self._size_bytes - self.used_bytes

    def place(self, length: int) -> tuple[int, int]:
        """Take a piece of at most `length` bytes: offset and length, which may be 0."""
        assert length > 0, length
        taken = min(length, self.room_bytes, self._size_bytes - self._position)
        offset = self._position
        self._position = (self._position + taken) % self._size_bytes
        self.used_bytes += taken
        return offset, taken

    def give_back(self, length: int) -> None:
        """Free the oldest bytes."""
        assert 0 <= length <= self.used_bytes, (length, self.used_bytes)
        self.used_bytes -= length
