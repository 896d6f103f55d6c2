"""What the backup holds, as far as a primary remembers it: the base of deltas. Pure.

Pure but for setting memory aside, which is touched only as pages are remembered.

A page that is written in one epoch is likely to be written in the next, and most of it stays as it
was. The backup has it as it was sent last; a primary that remembers that sends the difference.

Theory of operation. Each page has one place, its number modulo the number of places, so everything
is a few operations on whole arrays. A guest smaller than the cache has a place for each page. In a
larger one pages compete: each time a page is sent its hold on its place grows (up to `HOLD_MAX`),
each time another one wants the place it shrinks, and at zero the other one takes it. So pages that
are written all the time stay, whatever passes by.

Formula: a page that is remembered is remembered as it was *sent* last in this connection, and not
as part of seeding. While epoch n + 1 is sent n is acknowledged and applied, and the connection is
over if anything sent did not arrive; so that is what the backup has. Whoever sends a page without
`exchange` must `forget` it. That both sides agree is verified by a digest of what was decoded.

Source: XBZRLE of QEMU's migration has the same idea (docs/devel/migration, `xbzrle`).
"""

import numpy as np
from numpy.typing import NDArray

from holdfast_agent.core.memory_map import (
    NO_PAGES,
    PAGE_SIZE_BYTES,
    PageIndexes,
    PageRows,
    empty_rows,
    sparse_rows,
)

HOLD_MAX = 3
NOBODY = -1
_PAGE_VOID = np.dtype(f"V{PAGE_SIZE_BYTES}")


class DeltaCache:
    """Pages as the backup has them, within `limit_bytes`. For one connection."""

    def __init__(self, page_count: int, limit_bytes: int) -> None:
        """Remember nothing yet, of a map of `page_count` pages; nothing is set aside."""
        assert limit_bytes >= 0, limit_bytes
        self._place_count = min(page_count, limit_bytes // PAGE_SIZE_BYTES)
        self._page_at: PageIndexes = NO_PAGES
        self._hold: NDArray[np.int8] = np.empty(0, dtype=np.int8)
        self._rows: PageRows = empty_rows(0)

    @property
    def page_count(self) -> int:
        """Pages that are remembered."""
        return int(np.count_nonzero(self._page_at != NOBODY))

    def exchange(self, indexes: PageIndexes, rows: PageRows) -> tuple[NDArray[np.bool_], PageRows]:
        """Return which pages are known and what is different in them; remember them as `rows`.

        `indexes` without duplicates; the difference is `uint8[known pages, 4096]`, by exclusive or,
        and the caller's.
        """
        if self._place_count == 0 or len(indexes) == 0:
            return np.zeros(len(indexes), dtype=np.bool_), empty_rows(0)
        self._set_aside()
        places = indexes % self._place_count
        known = self._page_at[places] == indexes
        all_known = bool(known.all())
        known_places = places if all_known else places[known]
        difference = empty_rows(len(known_places))
        np.take(self._rows, known_places, axis=0, out=difference, mode="clip")
        np.bitwise_xor(difference, rows if all_known else rows[known], out=difference)
        self._hold[known_places] = np.minimum(self._hold[known_places] + 1, HOLD_MAX)
        if not all_known:
            self._compete(indexes[~known], places[~known])
        # Asked again: of two new pages with one place only the last has it.
        mine = self._page_at[places] == indexes
        if mine.all():
            self._remember(places, rows)
        else:
            self._remember(places[mine], rows[mine])
        return known, difference

    def forget(self, indexes: PageIndexes) -> None:
        """Pages went to the backup another way: what is remembered of them is no longer true."""
        if len(self._page_at) == 0 or len(indexes) == 0:
            return
        places = indexes % self._place_count
        mine = places[self._page_at[places] == indexes]
        self._page_at[mine] = NOBODY
        self._hold[mine] = 0

    def clear(self) -> None:
        """Forget everything and give the memory back."""
        self._page_at = NO_PAGES
        self._hold = np.empty(0, dtype=np.int8)
        self._rows = empty_rows(0)

    def _set_aside(self) -> None:
        if len(self._page_at) == 0:
            self._page_at = np.full(self._place_count, NOBODY, dtype=np.int64)
            self._hold = np.zeros(self._place_count, dtype=np.int8)
            self._rows = sparse_rows(self._place_count)

    def _compete(self, indexes: PageIndexes, places: PageIndexes) -> None:
        """Let new pages take their places, as far as nobody holds them."""
        self._hold[places] -= 1
        won = self._hold[places] < 0
        self._page_at[places[won]] = indexes[won]
        self._hold[places[won]] = 1

    def _remember(self, places: PageIndexes, rows: PageRows) -> None:
        kept = self._rows.view(_PAGE_VOID).reshape(-1)
        kept[places] = np.ascontiguousarray(rows).view(_PAGE_VOID).reshape(-1)
