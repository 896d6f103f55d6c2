"""Whatever the guest writes and however it is encoded, the backup gets it, or refuses the frame.

Both sides are the production ones: the encoder with its cache, the payload's bytes, the receiver
with its decoder, and zstd. Between them lies nothing but bytes, so each bit can be spoilt.
"""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast_agent.core.encoding import Encoding
from holdfast_agent.core.frames import (
    FrameEncoder,
    FrameHeader,
    FrameKind,
    FrameLimits,
    FrameRejected,
)
from holdfast_agent.core.memory_map import PAGE_SIZE_BYTES, PageIndexes, PageRows, zero_pages
from holdfast_agent.core.payloads import (
    CheckpointReceiver,
    PagesTally,
    encode_checkpoint,
    split_pages,
)
from holdfast_agent.transport.page_coding import (
    PLAIN_FRAMES_TO_CLEAR,
    CodingCounters,
    PageDecoder,
    PageEncoder,
)
from holdfast_api.words import Role

MAP_PAGES = 12
LIMITS = FrameLimits(slab_size_bytes=4 * PAGE_SIZE_BYTES, index_size_bytes=4096)

Writes = list[tuple[int, str, int]]
"""Which page, in what way, and how much of it."""
WRITES = st.lists(
    st.tuples(
        st.integers(0, MAP_PAGES - 1),
        st.sampled_from(("words", "noise", "fill", "zero", "again", "one bit")),
        st.integers(0, 2**32 - 1),
    ),
    max_size=14,
)
EPOCHS = st.lists(st.tuples(st.sampled_from(Encoding), WRITES), min_size=1, max_size=6)
CACHE_PAGES = st.sampled_from((0, 1, 3, 5, MAP_PAGES, 99))


def write(memory: PageRows, writes: Writes) -> PageIndexes:
    """Let the guest write; return the pages it wrote."""
    for page, way, seed in writes:
        random = np.random.default_rng(seed)
        row = memory[page]
        match way:
            case "words":
                count = int(random.integers(1, 513))
                row.view(np.uint64)[random.choice(512, count, replace=False)] = random.integers(
                    0, 1 << 60, count
                )
            case "noise":
                row[:] = random.integers(0, 256, PAGE_SIZE_BYTES)
            case "fill":
                row[:] = seed % 256
            case "zero":
                row[:] = 0
            case "one bit":
                row[seed % PAGE_SIZE_BYTES] ^= 1 << seed % 8
            case _:
                assert way == "again"
    return np.array(sorted({page for page, _, _ in writes}), dtype=np.int64)


@dataclass
class Pair:
    """A primary and a backup, and the memory of both."""

    cache_pages: int = MAP_PAGES
    memory: PageRows = field(
        default_factory=lambda: np.zeros((MAP_PAGES, PAGE_SIZE_BYTES), np.uint8)
    )
    standby: PageRows = field(
        default_factory=lambda: np.zeros((MAP_PAGES, PAGE_SIZE_BYTES), np.uint8)
    )
    epoch: int = 0
    kept_bytes: int = 0

    def __post_init__(self) -> None:
        self.sent, self.received = CodingCounters(), CodingCounters()
        self.encoder = PageEncoder(
            self.sent,
            map_page_count=MAP_PAGES,
            delta_cache_bytes=self.cache_pages * PAGE_SIZE_BYTES,
            clock=lambda: 0,
        )
        self.decoder = PageDecoder(
            self.received,
            limits=LIMITS,
            read_base=self._read_base,
            keep=self._keep,
            give_back=lambda size: self._keep(-size),
            clock=lambda: 0,
        )
        self.receiver = CheckpointReceiver(MAP_PAGES, self.decoder.decode, LIMITS)
        self._frames = FrameEncoder(sender=Role.PRIMARY, generation=1, limits=LIMITS)
        self._frames.sequence = 1

    def _read_base(self, indexes: PageIndexes, rows: PageRows) -> None:
        rows[:] = self.standby[indexes]

    def _keep(self, size_bytes: int) -> None:
        self.kept_bytes += size_bytes

    def frame(self, kind: FrameKind, epoch: int, payload: bytes) -> tuple[FrameHeader, memoryview]:
        _, checksum = self._frames.encode(kind, epoch, [payload])
        header = FrameHeader(kind, 1, 0, self._frames.sequence, epoch, len(payload), checksum)
        return header, memoryview(payload)

    def payloads(self, epoch: int, indexes: PageIndexes) -> list[tuple[bytes, int]]:
        """Return what is sent for pages of the primary's memory, with each one's page count."""
        rows = self.memory[indexes]
        empty = zero_pages(rows)
        return [
            (
                b"".join(
                    bytes(part)
                    for part in self.encoder.encode(epoch, pages, base_is_there=epoch > 0)
                ),
                pages.page_count,
            )
            for pages in split_pages(indexes[~empty], rows[~empty], indexes[empty], LIMITS)
        ]

    def checkpoint(self, indexes: PageIndexes) -> None:
        """Send a checkpoint of `indexes` and apply it."""
        self.epoch += 1
        tally, arrived = PagesTally(), []
        for payload, page_count in self.payloads(self.epoch, indexes):
            header, view = self.frame(FrameKind.PAGES, self.epoch, payload)
            arrived.append(self.receiver.pages(header, view))
            tally.add(header.checksum, page_count)
        parts = encode_checkpoint(tally, b"devices", final=False)
        self.receiver.checkpoint(
            *self.frame(FrameKind.CHECKPOINT, self.epoch, b"".join(map(bytes, parts)))
        )
        for pages in arrived:
            self.standby[pages.indexes] = pages.rows
            self.standby[pages.zero_indexes] = 0
        self.decoder.release()


@given(CACHE_PAGES, WRITES, EPOCHS)
@settings(deadline=None)
def test_the_backup_has_what_the_guest_wrote_however_it_was_encoded(
    cache_pages: int, before: Writes, epochs: list[tuple[Encoding, Writes]]
) -> None:
    pair = Pair(cache_pages)
    write(pair.memory, before)
    pair.standby[:] = pair.memory
    for encoding, writes in epochs:
        pair.encoder.encoding = encoding
        pair.checkpoint(write(pair.memory, writes))
        assert (pair.standby == pair.memory).all()
        assert pair.kept_bytes == 0
    assert pair.sent.encoded_bytes <= pair.sent.content_bytes
    assert pair.sent.delta_pages == pair.received.delta_pages


@given(st.sampled_from(Encoding), WRITES, WRITES, st.data())
@settings(deadline=None)
def test_a_payload_with_one_bit_flipped_is_refused_or_says_nothing_else(
    encoding: Encoding, first: Writes, second: Writes, data: st.DataObject
) -> None:
    """A checksum would have found it before; the pages are judged by themselves here."""
    if encoding is Encoding.NONE:
        return
    pair = Pair()
    pair.encoder.encoding = encoding
    pair.checkpoint(write(pair.memory, first))
    payloads = pair.payloads(2, write(pair.memory, second))
    if not payloads:
        return
    payload = bytearray(payloads[data.draw(st.integers(0, len(payloads) - 1))][0])
    if not any(payload[16:20]):  # sent plain, as it did not get shorter: the frame's checksum holds
        return
    at = data.draw(st.integers(0, len(payload) - 1))
    payload[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        pages = pair.receiver.pages(*pair.frame(FrameKind.PAGES, 2, bytes(payload)))
    except FrameRejected:
        return
    # Which pages they are is the checksum's to hold; their content never differs.
    content = {row.tobytes() for row in pages.rows}
    assert content <= {row.tobytes() for row in pair.memory}


@pytest.mark.parametrize("encoding", [Encoding.DELTA, Encoding.DELTA_ZSTD])
@given(st.integers(0, MAP_PAGES - 1), st.integers(0, PAGE_SIZE_BYTES - 1), st.integers(0, 7))
@settings(deadline=None, max_examples=40)
def test_a_base_that_differs_in_one_bit_is_found_before_the_checkpoint_is_whole(
    encoding: Encoding, page: int, place: int, bit: int
) -> None:
    pair = Pair()
    pair.encoder.encoding = encoding
    everything = np.arange(MAP_PAGES)
    pair.memory[:] = np.arange(1, MAP_PAGES + 1, dtype=np.uint8)[:, None]
    pair.checkpoint(everything)
    pair.standby[page, place] ^= 1 << bit
    pair.memory[:, 0] += 1
    with pytest.raises(FrameRejected, match="not the ones that were encoded"):
        pair.checkpoint(everything)
    assert pair.receiver.completed_epoch == 1


@given(st.binary(max_size=3000), st.integers(0, 3), st.integers(0, 4), st.integers(0, 2**40))
@settings(deadline=None)
def test_noise_as_content_is_refused_and_sets_no_more_than_a_slab_aside(
    noise: bytes, flags: int, delta_pages: int, length: int
) -> None:
    pair = Pair()
    pair.checkpoint(np.arange(MAP_PAGES))
    indexes = np.arange(4, dtype=np.int64)
    head = b"".join(
        number.to_bytes(size, "little")
        for number, size in ((1, 4), (0, 4), (4, 4), (0, 4), (flags, 4), (delta_pages, 4))
    )
    head += length.to_bytes(8, "little") + b"d" * 16
    payload = head + np.array([[0, 4]], dtype=np.int64).tobytes() + noise
    with pytest.raises(FrameRejected):
        pair.receiver.pages(*pair.frame(FrameKind.PAGES, 2, payload))
    assert pair.kept_bytes <= indexes.size * PAGE_SIZE_BYTES


@pytest.mark.parametrize("encoding", [Encoding.DELTA, Encoding.DELTA_ZSTD])
def test_a_difference_while_seeding_is_refused(encoding: Encoding) -> None:
    """A page may be sent twice while seeding: nobody knows what a difference would be to."""
    sender, listener = Pair(), Pair()
    sender.encoder.encoding = encoding
    everything = np.arange(MAP_PAGES)
    sender.memory[:] = np.random.default_rng(1).integers(1, 256, sender.memory.shape, np.uint8)
    listener.standby[:] = sender.memory
    sender.checkpoint(everything)
    sender.memory[:, 8] += 1
    (payload, _), *_ = sender.payloads(2, everything)
    header, view = sender.frame(FrameKind.PAGES, 0, payload)
    with pytest.raises(FrameRejected, match="while seeding"):
        listener.receiver.pages(header, view)
    header, view = sender.frame(FrameKind.PAGES, 1, payload)
    assert listener.receiver.pages(header, view).is_decoded


def test_a_guest_that_changes_little_is_sent_in_little() -> None:
    pair = Pair()
    pair.encoder.encoding = Encoding.DELTA
    everything = np.arange(MAP_PAGES)
    pair.memory[:] = np.random.default_rng(1).integers(1, 256, pair.memory.shape, np.uint8)
    pair.checkpoint(everything)
    plain = pair.sent.encoded_bytes
    assert plain == MAP_PAGES * PAGE_SIZE_BYTES
    marks = 3  # a byte for each of three frames
    for count in range(1, 5):
        pair.memory[:, 8] += 1
        pair.checkpoint(everything)
        assert pair.sent.encoded_bytes - plain == count * (MAP_PAGES * (64 + 8) + marks)
        assert pair.sent.delta_pages == count * MAP_PAGES
        assert (pair.standby == pair.memory).all()


def test_without_differences_for_long_the_cache_gives_its_memory_back() -> None:
    pair = Pair()
    pair.memory[:] = 1
    page = np.array([3])

    def send(encoding: Encoding, frames: int) -> None:
        pair.encoder.encoding = encoding
        for _ in range(frames):
            pair.payloads(1, page)

    send(Encoding.DELTA, 1)
    send(Encoding.NONE, PLAIN_FRAMES_TO_CLEAR - 1)
    send(Encoding.DELTA, 1)
    send(Encoding.NONE, PLAIN_FRAMES_TO_CLEAR - 1)
    assert len(pair.encoder._cache._rows) == MAP_PAGES
    send(Encoding.NONE, 1)
    assert len(pair.encoder._cache._rows) == 0
