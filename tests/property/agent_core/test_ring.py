"""Two sides and a wire: bytes come out as they went in, and nobody is ever overrun."""

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from holdfast_agent.core.ring import (
    CREDIT_FRACTION,
    CREDITS_IN_FLIGHT_MAX,
    NOTICES_MAX,
    BounceRing,
    RingReader,
    RingShape,
    RingViolated,
    RingWriter,
    Word,
    WordKind,
)

SHAPE = RingShape(size_bytes=512, notice_limit=7)


class RingMachine(RuleBasedStateMachine):
    """One direction of a stream, over real bytes, with words that wait to be taken."""

    def __init__(self) -> None:
        super().__init__()
        self.writer = RingWriter(SHAPE)
        self.reader = RingReader(SHAPE)
        self.ring = bytearray(SHAPE.size_bytes)
        self.unread: set[int] = set()
        self.announced: deque[int] = deque()
        self.credits: deque[int] = deque()
        self.sent = bytearray()
        self.received = bytearray()
        self.next_byte = 0

    @precondition(lambda self: self.writer.may_notify and self.writer.room_bytes)
    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        length = wanted = data.draw(st.integers(1, self.writer.room_bytes))
        while wanted:
            offset, taken = self.writer.span(wanted)
            assert 0 < taken <= wanted
            assert offset + taken <= SHAPE.size_bytes
            assert not self.unread & set(range(offset, offset + taken)), "unread bytes overwritten"
            self.unread |= set(range(offset, offset + taken))
            for position in range(offset, offset + taken):
                self.ring[position] = self.next_byte
                self.sent.append(self.next_byte)
                self.next_byte = (self.next_byte + 1) % 251
            wanted -= taken
        self.writer.notified()
        self.announced.append(Word(WordKind.DATA, length).encode())

    @precondition(lambda self: self.announced)
    @rule()
    def take_notice(self) -> None:
        self.reader.arrived(Word.decode(self.announced.popleft()))
        self.say_credit()

    @precondition(lambda self: self.reader.readable_bytes)
    @rule(limit=st.integers(1, SHAPE.size_bytes))
    def read(self, limit: int) -> None:
        offset, length = self.reader.span(limit)
        assert 0 < length <= limit
        self.received += self.ring[offset : offset + length]
        self.unread -= set(range(offset, offset + length))
        self.reader.taken(length)
        self.say_credit()

    @precondition(lambda self: self.credits)
    @rule()
    def take_credit(self) -> None:
        self.writer.credited(Word.decode(self.credits.popleft()))

    def say_credit(self) -> None:
        credit = self.reader.credit_due()
        if credit is not None:
            self.credits.append(credit.encode())

    @invariant()
    def what_is_read_is_what_was_written(self) -> None:
        assert self.received == self.sent[: len(self.received)]

    @invariant()
    def receive_requests_suffice(self) -> None:
        """Both directions use the same requests: notices of one, credits for the other."""
        assert len(self.announced) <= SHAPE.notice_limit
        assert len(self.credits) <= CREDITS_IN_FLIGHT_MAX
        assert SHAPE.receive_requests == SHAPE.notice_limit + CREDITS_IN_FLIGHT_MAX

    @invariant()
    def a_reader_that_takes_everything_never_starves_its_writer(self) -> None:
        if not self.announced and not self.credits and not self.reader.readable_bytes:
            assert self.writer.room_bytes > SHAPE.size_bytes // CREDIT_FRACTION * 3 - 1
            assert self.writer.may_notify
            assert self.received == self.sent


TestRing = RingMachine.TestCase


class BounceMachine(RuleBasedStateMachine):
    """Pieces are placed and given back in order."""

    def __init__(self) -> None:
        super().__init__()
        self.bounce = BounceRing(40)
        self.placed: deque[tuple[int, int]] = deque()

    @rule(length=st.integers(1, 50))
    def place(self, length: int) -> None:
        free = 40 - sum(length for _, length in self.placed)
        assert self.bounce.room_bytes == free
        offset, taken = self.bounce.place(length)
        assert taken <= length
        assert (taken == 0) == (free == 0)
        if taken:
            assert 0 <= offset <= offset + taken <= 40
            mine = set(range(offset, offset + taken))
            for start, other in self.placed:
                assert not mine & set(range(start, start + other))
            self.placed.append((offset, taken))

    @precondition(lambda self: self.placed)
    @rule()
    def give_back(self) -> None:
        self.bounce.give_back(self.placed.popleft()[1])


TestBounce = BounceMachine.TestCase


@given(
    st.one_of(
        st.builds(Word, st.just(WordKind.DATA), st.integers(1, (1 << 30) - 1)),
        st.builds(
            Word,
            st.just(WordKind.CREDIT),
            st.integers(0, (1 << 24) - 1).map(lambda units: units * 64),
            st.integers(0, NOTICES_MAX),
        ),
        st.just(Word(WordKind.END)),
    )
)
def test_a_word_says_what_was_put_into_it(word: Word) -> None:
    assert Word.decode(word.encode()) == word


@given(st.integers(0, (1 << 32) - 1))
def test_any_32_bits_are_a_word_or_refused(value: int) -> None:
    try:
        word = Word.decode(value)
    except RingViolated:
        return
    assert word.encode() == value


@pytest.mark.parametrize("value", [0, 0xC000_0000, 0x8000_0001])
def test_words_that_say_nothing_are_refused(value: int) -> None:
    with pytest.raises(RingViolated):
        Word.decode(value)


def test_more_bytes_than_there_is_room_for_are_refused() -> None:
    reader = RingReader(SHAPE)
    reader.arrived(Word(WordKind.DATA, 500))
    reader.taken(100)
    with pytest.raises(RingViolated, match="13 bytes arrived, room was for 12"):
        reader.arrived(Word(WordKind.DATA, 13))
    reader.arrived(Word(WordKind.DATA, 12))


def test_more_notices_than_there_are_requests_for_are_refused() -> None:
    reader = RingReader(SHAPE)
    for _ in range(SHAPE.notice_limit):
        reader.arrived(Word(WordKind.DATA, 1))
    with pytest.raises(RingViolated, match="more than 7 notices"):
        reader.arrived(Word(WordKind.DATA, 1))


def test_credit_for_what_was_not_sent_is_refused() -> None:
    writer = RingWriter(SHAPE)
    writer.span(128)
    writer.notified()
    with pytest.raises(RingViolated, match="192 bytes"):
        writer.credited(Word(WordKind.CREDIT, 192, 1))
    with pytest.raises(RingViolated, match="2 notices"):
        writer.credited(Word(WordKind.CREDIT, 128, 2))
    writer.credited(Word(WordKind.CREDIT, 128, 1))
    assert writer.room_bytes == SHAPE.size_bytes


@pytest.mark.parametrize(
    "shape",
    [
        RingShape(0, 7),
        RingShape(128, 7),
        RingShape(520, 7),
        RingShape(1 << 31, 7),
        RingShape(512, 3),
        RingShape(512, 64),
    ],
)
def test_a_ring_that_can_not_work_has_a_fault(shape: RingShape) -> None:
    assert shape.fault() is not None
    assert SHAPE.fault() is None
    assert RingShape(16 << 20, 60).fault() is None
