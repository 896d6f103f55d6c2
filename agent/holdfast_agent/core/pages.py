"""Which pages the backup still has to get: owed, or in flight and not acknowledged. Pure.

Reading the dirty set clears it, so whoever reads it owes those pages from then on:

    harvested ──owe──▶ owed ──take──▶ in flight ──acknowledged──▶ (the backup has them)
                        ▲                 │
                        └─────failed──────┘

Formula, INV-8: owed + in flight loses a page only by `acknowledged`.

An epoch dirties a few thousand of half a million pages and usually comes as one sorted set, which
then passes through untouched. So sets are kept as they came and only merged when there are several:
by sorting while they are small against the map, else through a bitmap.

Source: rule 8 of docs/invariants.md; propolis' essay on dirty pages has the same bookkeeping.
"""

import numpy as np

from holdfast_agent.core.memory_map import NO_PAGES, PageIndexes

MAX_PARTS = 16
"""Sets kept unmerged; more are merged at once, so that forgotten harvests can not pile up."""

SORT_SHARE = 16
"""Sets above this fraction of the map are merged through a bitmap. Measured for a 2 GiB map: two
sets of 4,000 pages take 0.02 ms sorted and 0.19 ms through the bitmap, two of 100,000 pages 1.4 ms
sorted and 0.5 ms through the bitmap."""


class OwedPages:
    """The page debt of one primary to one backup."""

    def __init__(self, page_count: int) -> None:
        """Start with nothing owed, over a map of `page_count` pages."""
        assert page_count > 0
        self._page_count = page_count
        self._owed: list[PageIndexes] = []
        self._in_flight: list[PageIndexes] = []

    def owe(self, indexes: PageIndexes) -> None:
        """Add harvested pages (sorted, without duplicates); the array stays the caller's."""
        if len(indexes) == 0:
            return
        assert indexes[0] >= 0, indexes[0]
        assert indexes[-1] < self._page_count, (indexes[-1], self._page_count)
        assert bool((indexes[1:] > indexes[:-1]).all()), "pages must be sorted and unique"
        debt = indexes.copy()
        debt.flags.writeable = False  # `take` hands it out, and nobody may change a debt
        self._owed.append(debt)
        if len(self._owed) > MAX_PARTS:
            self._owed = [self._merge(self._owed)]

    def take(self) -> PageIndexes:
        """Put everything owed in flight and return it, sorted and read-only.

        Seeding takes round after round without an acknowledgement; what is in flight adds up.
        """
        taken = self._merge(self._owed)
        self._owed = []
        if len(taken):
            self._in_flight.append(taken)
        if len(self._in_flight) > MAX_PARTS:
            self._in_flight = [self._merge(self._in_flight)]
        return taken

    def acknowledged(self) -> None:
        """The backup holds everything that was in flight."""
        self._in_flight = []

    def failed(self) -> None:
        """What was in flight may never have arrived: owe it again."""
        if not self._in_flight:
            return
        before = max(self.owed_count, self.in_flight_count)
        self._owed = [self._merge(self._owed + self._in_flight)]
        self._in_flight = []
        assert self.owed_count >= before, (self.owed_count, before)  # INV-8

    @property
    def owed_count(self) -> int:
        """Pages that wait to be sent."""
        self._owed = [self._merge(self._owed)] if self._owed else []
        return sum(map(len, self._owed))

    @property
    def in_flight_count(self) -> int:
        """Pages that were taken and are neither acknowledged nor failed."""
        self._in_flight = [self._merge(self._in_flight)] if self._in_flight else []
        return sum(map(len, self._in_flight))

    def _merge(self, parts: list[PageIndexes]) -> PageIndexes:
        """Return the sorted union of `parts`."""
        if not parts:
            return NO_PAGES
        if len(parts) == 1:
            return parts[0]
        if sum(map(len, parts)) * SORT_SHARE <= self._page_count:
            merged = np.concatenate(parts)
            merged.sort(kind="stable")  # which merges sorted runs, in linear time
            merged = merged[np.concatenate(([True], merged[1:] != merged[:-1]))]
        else:
            marked = np.zeros(self._page_count, dtype=np.bool_)
            for part in parts:
                marked[part] = True
            merged = np.flatnonzero(marked).astype(np.int64, copy=False)
        merged.flags.writeable = False
        return merged
