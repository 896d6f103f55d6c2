"""INV-2: a checkpoint is whole when exactly its PAGES came, and never otherwise.

The receiver is shown here what a connection would have refused already by its sequence numbers: it
must not need them. An altered frame is one whose checksum fits its content, altered before it was
framed; damage on the way is the business of `test_frames`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from holdfast_agent.core.frames import FrameEncoder, FrameHeader, FrameKind, FrameRejected
from holdfast_agent.core.memory_map import PageIndexes
from holdfast_agent.core.payloads import (
    CheckpointReceiver,
    Pages,
    PagesTally,
    encode_checkpoint,
    encode_pages,
)
from holdfast_api.words import Role

MAP_PAGES = 16
FRAMES_MAX = 5

Split = dict[int, tuple[int, bool]]
"""The pages of a checkpoint: which frame each of them travels in, and whether it is zero."""
Frame = tuple[FrameHeader, memoryview]

PAGES = st.integers(0, MAP_PAGES - 1)
PLACES = st.tuples(st.integers(0, FRAMES_MAX - 1), st.booleans())
SPLITS = st.dictionaries(PAGES, PLACES)
SPLITS_WITH_PAGES = st.dictionaries(PAGES, PLACES, min_size=1)
EPOCHS = st.integers(1, 3)


def a_split(frames: int) -> Split:
    """Return a split with so many frames, each with two pages."""
    return {page: (page // 2, page % 4 == 3) for page in range(2 * frames)}


@dataclass(frozen=True)
class Sent:
    """A checkpoint as its primary frames it."""

    frames: list[Frame]
    end: Frame


class Sender:
    """The primary's side of one connection."""

    def __init__(self, sent_frames: int = 1) -> None:
        self._encoder = FrameEncoder(sender=Role.PRIMARY, generation=7)
        self._encoder.sequence = sent_frames
        self._encoder.connection = 99

    def frame(self, kind: FrameKind, epoch: int, payload: bytes) -> Frame:
        _, checksum = self._encoder.encode(kind, epoch, [payload])
        sequence = self._encoder.sequence
        header = FrameHeader(kind, 7, 99, sequence, epoch, len(payload), checksum)
        return header, memoryview(payload)

    def checkpoint(self, epoch: int, split: Split) -> Sent:
        tally = PagesTally()
        frames: list[Frame] = []
        for pages in pages_of(split):
            payload = b"".join(bytes(part) for part in encode_pages(pages))
            frames.append(self.frame(FrameKind.PAGES, epoch, payload))
            tally.add(frames[-1][0].checksum, pages.page_count)
        parts = encode_checkpoint(tally, b"devices", final=False)
        end = self.frame(FrameKind.CHECKPOINT, epoch, b"".join(map(bytes, parts)))
        return Sent(frames, end)


def pages_of(split: Split) -> list[Pages]:
    """Return what each frame carries; every page is full of its number plus one, or zero."""
    carried = []
    for frame in sorted({number for number, _ in split.values()}):
        indexes = set_of({p for p, (number, zero) in split.items() if number == frame and not zero})
        zeros = set_of({p for p, (number, zero) in split.items() if number == frame and zero})
        rows = np.repeat(indexes.astype(np.uint8)[:, None] + np.uint8(1), 4096, axis=1)
        carried.append(Pages(indexes, rows, zeros))
    return carried


def set_of(pages: set[int]) -> PageIndexes:
    return np.array(sorted(pages), dtype=np.int64)


def receive(receiver: CheckpointReceiver, frames: list[Frame], end: Frame) -> list[Pages]:
    """Return all pages if the checkpoint is whole; raises FrameRejected."""
    received = [receiver.pages(*frame) for frame in frames]
    receiver.checkpoint(*end)
    return received


def at_epoch(epoch: int) -> tuple[Sender, CheckpointReceiver]:
    """Return both ends of a connection whose next checkpoint is that of `epoch`."""
    sender, receiver = Sender(), CheckpointReceiver(MAP_PAGES)
    for earlier in range(1, epoch):
        sent = sender.checkpoint(earlier, a_split(2))
        receive(receiver, sent.frames, sent.end)
    return sender, receiver


def is_refused(receiver: CheckpointReceiver, frames: list[Frame], end: Frame) -> bool:
    before = receiver.completed_epoch
    with pytest.raises(FrameRejected):
        receive(receiver, frames, end)
    return receiver.completed_epoch == before


@given(st.lists(SPLITS, max_size=3), SPLITS)
def test_a_checkpoint_is_whole_however_its_pages_are_split(
    splits: list[Split], seeding: Split
) -> None:
    sender, receiver = at_epoch(1)
    for frame in sender.checkpoint(0, seeding).frames:
        receiver.pages(*frame)
    for epoch, split in enumerate(splits, start=1):
        sent = sender.checkpoint(epoch, split)
        received = receive(receiver, sent.frames, sent.end)
        assert receiver.completed_epoch == epoch
        got: dict[int, int] = {}
        for pages in received:
            assert (pages.rows == pages.rows[:, :1]).all()
            got |= dict(zip(pages.indexes.tolist(), pages.rows[:, 0].tolist(), strict=True))
            got |= dict.fromkeys(pages.zero_indexes.tolist(), 0)
        assert got == {page: 0 if zero else page + 1 for page, (_, zero) in split.items()}


@given(EPOCHS, SPLITS, st.lists(st.integers(0, FRAMES_MAX - 1), max_size=FRAMES_MAX + 1))
def test_a_checkpoint_is_whole_only_if_each_frame_came_once_and_in_order(
    epoch: int, split: Split, order: list[int]
) -> None:
    sender, receiver = at_epoch(epoch)
    sent = sender.checkpoint(epoch, split)
    count = len(sent.frames)
    order = [number for number in order if number < count]
    assume(order != list(range(count)))
    assert is_refused(receiver, [sent.frames[number] for number in order], sent.end)


def missing(frames: list[Frame], number: int, _: int) -> list[Frame]:
    return frames[:number] + frames[number + 1 :]


def doubled(frames: list[Frame], number: int, place: int) -> list[Frame]:
    return [*frames[:place], frames[number], *frames[place:]]


def moved(frames: list[Frame], number: int, place: int) -> list[Frame]:
    others = missing(frames, number, place)
    return [*others[:place], frames[number], *others[place:]]


@pytest.mark.parametrize("fault", [missing, doubled, moved])
@given(EPOCHS, SPLITS_WITH_PAGES, st.integers(0), st.integers(0, FRAMES_MAX))
def test_a_checkpoint_with_one_frame_missing_doubled_or_out_of_order_is_refused(
    fault: Callable[[list[Frame], int, int], list[Frame]],
    epoch: int,
    split: Split,
    number: int,
    place: int,
) -> None:
    sender, receiver = at_epoch(epoch)
    sent = sender.checkpoint(epoch, split)
    frames = fault(sent.frames, number % len(sent.frames), place)
    assume(frames != sent.frames)
    assert is_refused(receiver, frames, sent.end)


@given(EPOCHS, SPLITS_WITH_PAGES, st.integers(0), st.integers(0), st.integers(1, 255))
@example(1, a_split(2), 1, 5000, 1)  # content
@example(1, a_split(2), 0, 16, 2)  # which pages they are
def test_a_checkpoint_with_an_altered_frame_is_refused(
    epoch: int, split: Split, number: int, position: int, mask: int
) -> None:
    sender, receiver = at_epoch(epoch)
    sent = sender.checkpoint(epoch, split)
    number %= len(sent.frames)
    header, payload = sent.frames[number]
    altered = bytearray(payload)
    altered[position % len(altered)] ^= mask
    # Framed by its own sender, at the same place of the connection.
    sent.frames[number] = Sender(header.sequence - 1).frame(FrameKind.PAGES, epoch, bytes(altered))
    assert is_refused(receiver, sent.frames, sent.end)


@given(EPOCHS, SPLITS_WITH_PAGES, st.integers(0), st.integers(0, 5))
def test_a_checkpoint_with_a_frame_of_another_epoch_is_refused(
    epoch: int, split: Split, number: int, other: int
) -> None:
    assume(other != epoch)
    sender, receiver = at_epoch(epoch)
    sent = sender.checkpoint(epoch, split)
    number %= len(sent.frames)
    header, payload = sent.frames[number]
    sent.frames[number] = (replace(header, epoch=other), payload)
    assert is_refused(receiver, sent.frames, sent.end)


@given(EPOCHS, SPLITS, st.integers(0, 5))
def test_a_checkpoint_that_says_another_epoch_is_refused(
    epoch: int, split: Split, other: int
) -> None:
    assume(other != epoch)
    sender, receiver = at_epoch(epoch)
    sent = sender.checkpoint(epoch, split)
    header, payload = sent.end
    assert is_refused(receiver, sent.frames, (replace(header, epoch=other), payload))
