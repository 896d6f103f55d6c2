"""Encoded checkpoints over real sockets: every encoding, a wrong base, memory that is kept."""

import select
import time
from collections.abc import Callable

import numpy as np
import pytest
from tests.integration.transport.loopback import DEADLINE_SECONDS, Sockets, over

from holdfast_agent.core.encoding import Encoding
from holdfast_agent.core.failures import PeerLost
from holdfast_agent.core.frames import FrameLimits
from holdfast_agent.core.memory_map import NO_PAGES, PageIndexes, PageRows
from holdfast_agent.core.peer_messages import CheckpointArrived, PagesArrived, PeerMessage
from holdfast_agent.transport.buffers import StagingLimitReached
from holdfast_agent.transport.peer import FramePeer
from holdfast_api.words import ClaimReason, Role

Pair = Callable[..., Sockets]
MAP_PAGES = 64
LIMITS = FrameLimits(slab_size_bytes=8 * 4096, index_size_bytes=4096)


class Ends:
    """A primary and a backup, with the memory of their guest and of its standby."""

    def __init__(self, pair: Sockets, *, staging_limit_bytes: int = 1 << 20) -> None:
        self.memory = np.zeros((MAP_PAGES, 4096), dtype=np.uint8)
        self.standby = np.zeros((MAP_PAGES, 4096), dtype=np.uint8)
        self.epoch = 0
        self.primary, self.backup = (
            FramePeer(
                over(sock, role, limits=LIMITS, staging_limit_bytes=staging_limit_bytes),
                map_page_count=MAP_PAGES,
                silence_limit_seconds=5,
                limits=LIMITS,
                delta_cache_bytes=1 << 20 if role is Role.PRIMARY else 0,
                read_base=self._read_base if role is Role.BACKUP else None,
            )
            for sock, role in zip(pair, (Role.PRIMARY, Role.BACKUP), strict=True)
        )

    def _read_base(self, indexes: PageIndexes, rows: PageRows) -> None:
        rows[:] = self.standby[indexes]

    def send(self, indexes: PageIndexes, encoding: Encoding, zeros: PageIndexes = NO_PAGES) -> None:
        self.epoch += 1
        self.primary.use_encoding(encoding)
        self.primary.send_pages(self.epoch, indexes, self.memory[indexes], zeros)
        self.primary.send_checkpoint(self.epoch, b"devices", final=False)

    def apply(self) -> None:
        """Receive the checkpoint, acknowledge and apply it."""
        arrived = []
        while isinstance(message := wait(self.backup), PagesArrived):
            arrived.append(message)
        assert isinstance(message, CheckpointArrived)
        self.backup.send_acknowledgement(self.epoch)
        for pages in arrived:
            self.standby[pages.indexes] = pages.rows
            self.standby[pages.zero_indexes] = 0
        self.backup.release_buffers()
        wait(self.primary)

    def checkpoint(self, indexes: PageIndexes, encoding: Encoding) -> int:
        """Send and apply a checkpoint; return how many bytes crossed the wire for it."""
        before = self.primary.counters.sent_bytes
        self.send(indexes, encoding)
        self.apply()
        return self.primary.counters.sent_bytes - before

    def kept_bytes(self) -> int:
        return self.backup._connection.kept_bytes


def wait(peer: FramePeer) -> PeerMessage:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while (message := peer.receive()) is None:
        assert time.monotonic() < deadline
        select.select([peer], [], [], 0.1)
    return message


def a_guest(ends: Ends) -> np.random.Generator:
    """Let the guest have something in every page, and the standby the same."""
    random = np.random.default_rng(1)
    ends.memory[:] = random.integers(0, 256, ends.memory.shape, dtype=np.uint8)
    ends.standby[:] = ends.memory
    return random


@pytest.mark.parametrize("encoding", list(Encoding))
def test_a_standby_stays_what_its_guest_is(sockets: Pair, encoding: Encoding) -> None:
    ends = Ends(sockets())
    random = a_guest(ends)
    sizes = []
    for _ in range(5):
        indexes = np.sort(random.choice(MAP_PAGES, 40, replace=False))
        ends.memory[indexes, :64] = random.integers(0, 256, (40, 64), dtype=np.uint8)
        sizes.append(ends.checkpoint(indexes, encoding))
        assert (ends.standby == ends.memory).all()
        assert ends.kept_bytes() == 0
    assert ends.primary.coding.delta_pages == ends.backup.coding.delta_pages
    assert (ends.backup.coding.delta_pages > 0) == encoding.is_delta
    assert (sizes[-1] < sizes[0] / 2) == encoding.is_delta


def test_the_encoding_may_change_with_each_checkpoint(sockets: Pair) -> None:
    ends = Ends(sockets())
    random = a_guest(ends)
    everything = np.arange(MAP_PAGES)
    for encoding in (*Encoding, *reversed(Encoding), *Encoding):
        ends.memory[:, 8] = random.integers(0, 256, MAP_PAGES, dtype=np.uint8)
        ends.checkpoint(everything[:: 1 + ends.epoch % 3], encoding)
        written = everything[:: 1 + (ends.epoch - 1) % 3]
        assert (ends.standby[written] == ends.memory[written]).all()


def test_a_page_that_became_zero_and_something_again_is_right(sockets: Pair) -> None:
    ends = Ends(sockets())
    a_guest(ends)
    page = np.array([5])
    ends.checkpoint(page, Encoding.DELTA)
    ends.memory[5] = 0
    ends.send(NO_PAGES, Encoding.DELTA, zeros=page)
    ends.apply()
    ends.memory[5, 3] = 1
    ends.checkpoint(page, Encoding.DELTA)
    assert (ends.standby[5] == ends.memory[5]).all()


def test_a_standby_that_is_not_what_was_acknowledged_ends_the_connection(sockets: Pair) -> None:
    ends = Ends(sockets())
    a_guest(ends)
    indexes = np.arange(10)
    ends.checkpoint(indexes, Encoding.DELTA_ZSTD)
    ends.standby[3, 100] ^= 1
    ends.memory[indexes, 0] += 1
    ends.send(indexes, Encoding.DELTA_ZSTD)
    with pytest.raises(PeerLost, match="not the ones that were encoded") as caught:
        ends.apply()
    assert caught.value.reason is ClaimReason.PEER_FAILED
    assert ends.backup.counters.rejected_frames == 1


def test_without_an_acknowledgement_no_difference_is_sent(sockets: Pair) -> None:
    ends = Ends(sockets())
    a_guest(ends)
    indexes = np.arange(4)
    ends.checkpoint(indexes, Encoding.DELTA)
    ends.send(indexes, Encoding.DELTA)
    assert ends.primary.coding.delta_pages == 4
    ends.send(indexes, Encoding.DELTA)  # though no driver would
    assert ends.primary.coding.delta_pages == 4


def test_a_difference_while_the_checkpoint_before_is_not_applied_is_a_fault_of_ours(
    sockets: Pair,
) -> None:
    ends = Ends(sockets())
    a_guest(ends)
    indexes = np.arange(4)
    ends.checkpoint(indexes, Encoding.DELTA)
    ends.memory[indexes, 1] += 1
    ends.send(indexes, Encoding.DELTA)
    while not isinstance(wait(ends.backup), CheckpointArrived):
        pass
    ends.backup.send_acknowledgement(2)
    wait(ends.primary)
    ends.send(indexes, Encoding.DELTA)
    with pytest.raises(AssertionError, match="was not applied"):
        wait(ends.backup)


def test_seeding_is_compressed_and_never_a_difference(sockets: Pair) -> None:
    ends = Ends(sockets())
    indexes = np.arange(8)
    for encoding in (Encoding.DELTA_ZSTD, Encoding.DELTA):
        ends.primary.use_encoding(encoding)
        for value in (1, 2):
            ends.memory[indexes] = value
            before = ends.primary.counters.sent_bytes
            ends.primary.send_pages(0, indexes, ends.memory[indexes], NO_PAGES)
            pages = wait(ends.backup)
            assert isinstance(pages, PagesArrived)
            assert (pages.rows == value).all()
            sent = ends.primary.counters.sent_bytes - before
            assert (sent < 1000) == encoding.is_compressed
            ends.backup.release_buffers()
    assert ends.kept_bytes() == 0


def test_what_is_decoded_counts_against_the_staging_limit(sockets: Pair) -> None:
    ends = Ends(sockets(), staging_limit_bytes=20 * 4096)
    ends.memory[:] = 7  # a slab of it is a few bytes on the wire
    ends.send(np.arange(MAP_PAGES), Encoding.ZSTD)
    for _ in range(2):
        assert isinstance(wait(ends.backup), PagesArrived)
    with pytest.raises(StagingLimitReached):
        wait(ends.backup)
    assert ends.kept_bytes() <= 20 * 4096
