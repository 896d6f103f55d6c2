"""Seeding a guest that writes as fast as we send: braked, never left standing. Over fakes."""

import numpy as np
import pytest

from holdfast_agent.checkpoint.seeding import Seeding
from holdfast_agent.core.failures import PeerLost
from holdfast_agent.core.memory_map import MemoryMap, PageIndexes, PageRows, empty_rows
from holdfast_agent.memory import zero_pages
from holdfast_api.words import ClaimReason, Epoch

PAGES = 20_000


class FastGuest:
    """Ports VirtualMachine (what seeding uses of it), MemoryCopier, DirtyTracker and Peer.

    For each page sent while the guest runs it writes `pages_per_page` others.
    """

    name = "fast"
    can_harvest_running = True
    memory_map = MemoryMap.of_sizes([("ram", PAGES * 4096)])

    def __init__(self, pages_per_page: float) -> None:
        self.pages_per_page = pages_per_page
        self.runs = True
        self.is_paused_by_somebody = False
        self.content = np.zeros(PAGES, dtype=np.int64)
        self.received = np.full(PAGES, -1)
        self.dirty = np.zeros(PAGES, dtype=np.bool_)
        self.sent_standing = self.sent_running = 0
        self.loses_peer_after = 1 << 30
        self._next = 0
        self._owed = 0.0

    def stop(self) -> bool:
        ran, self.runs = self.runs, False
        return ran

    def resume(self) -> None:
        assert not self.runs
        assert not self.is_paused_by_somebody
        self.runs = True

    def populated(self) -> PageIndexes:
        return np.arange(PAGES)

    def harvest(self) -> PageIndexes:
        assert self.can_harvest_running or not self.runs, "its writes of this moment are lost"
        found = np.flatnonzero(self.dirty)
        self.dirty[:] = False
        return found

    def copy_out(self, indexes: PageIndexes, out: PageRows) -> None:
        out.view(np.int64)[: len(indexes), 0] = self.content[indexes]

    def copied(self, indexes: PageIndexes, rows: PageRows) -> None: ...

    def send_pages(
        self, epoch: Epoch, indexes: PageIndexes, rows: PageRows, zero_indexes: PageIndexes
    ) -> None:
        count = len(indexes) + len(zero_indexes)
        self.loses_peer_after -= count
        if self.loses_peer_after < 0:
            raise PeerLost(ClaimReason.STREAM_BROKEN, "gone")
        assert epoch == 0
        self.received[indexes] = rows.view(np.int64)[:, 0]
        self.received[zero_indexes] = 0
        if not self.runs:
            self.sent_standing += count
            return
        self.sent_running += count
        self._owed += count * self.pages_per_page
        writes = min(int(self._owed), PAGES)
        self._owed -= writes
        pages = (self._next + np.arange(writes)) % PAGES
        self._next += writes
        self.content[pages] += 1
        self.dirty[pages] = True

    def seeding(self) -> Seeding:
        return Seeding(
            vm=self,  # type: ignore[arg-type]
            tracker=self,  # type: ignore[arg-type]
            memory=self,  # type: ignore[arg-type]
            peer=self,  # type: ignore[arg-type]
            slab=empty_rows(1024),
            zero_pages=zero_pages,
            now_ns=lambda: 0,
        )


def seed(guest: FastGuest) -> tuple[Seeding, PageIndexes]:
    seeding = guest.seeding()
    seeding.start()
    while (left := seeding.step()) is None:
        assert seeding.figures.sent_bytes < PAGES * 4096 * 100
    return seeding, left


@pytest.mark.parametrize(
    ("pages_per_page", "brakes"), [(0.0, 0), (0.5, 0), (0.9, 1), (1.5, 2), (3.5, 3)]
)
def test_a_guest_is_braked_as_much_as_it_takes_and_then_little_is_left(
    pages_per_page: float, brakes: int
) -> None:
    guest = FastGuest(pages_per_page)
    seeding, left = seed(guest)
    assert seeding.figures.brakes == brakes
    assert len(left) <= 256
    assert guest.runs
    assert (guest.sent_standing > 0) == (brakes > 0)
    behind = np.flatnonzero(guest.received != guest.content)
    assert np.isin(behind, left).all(), "what was not sent is owed"


def test_a_tracker_that_can_not_harvest_a_running_guest_need_not() -> None:
    guest = FastGuest(0.5)
    guest.can_harvest_running = False
    _, left = seed(guest)
    behind = np.flatnonzero(guest.received != guest.content)
    assert np.isin(behind, left).all()
    assert guest.runs


def test_a_guest_that_outruns_every_brake_is_seeded_all_the_same() -> None:
    guest = FastGuest(30.0)
    seeding, left = seed(guest)
    assert (seeding.figures.brakes, guest.runs) == (3, True)
    behind = np.flatnonzero(guest.received != guest.content)
    assert np.isin(behind, left).all()


@pytest.mark.parametrize("pages", [PAGES + 100, PAGES * 2 + 300, PAGES * 2 + 700, PAGES * 2 + 1200])
def test_a_braked_guest_runs_again_when_the_backup_is_lost(pages: int) -> None:
    guest = FastGuest(2.0)
    guest.loses_peer_after = pages
    with pytest.raises(PeerLost):
        seed(guest)
    assert guest.runs


def test_a_guest_that_somebody_paused_meanwhile_stays_paused() -> None:
    guest = FastGuest(2.0)
    seeding = guest.seeding()
    seeding.start()
    seeding.step()
    guest.stop()
    guest.is_paused_by_somebody = True
    while seeding.step() is None:
        pass
    assert not guest.runs
