"""Finds written pages by comparing memory with a copy of what the backup was sent.

Needs nothing but a copier, and as much memory again as the guest's RAM (its populated part).
The cost of a harvest grows with RAM, not with what was written: for hosts that offer no better.

Theory of operation. `reference` holds, for every page, the content that was last copied out of the
guest. A page is dirty when it differs from that. Holes of the guest's memory are never read; they
are zero, and so is the reference of a page that was never seen.

**ABA.** Harvest sees B where the reference holds A, and reports the page. The guest runs on and
writes C; the loop copies the page, so the backup gets C. The guest writes B again. Had harvest
noted B, the next comparison would find B = B and the backup would keep C for good. So harvest
notes nothing; the reference changes in `copied` only, to the very bytes that were sent. A page
harvested but never copied is thus reported again: more than was written, never less.

Source: none; plain.
"""

from typing import Final, Protocol

import numpy as np

from holdfast_agent.core.memory_map import (
    NO_PAGES,
    PAGE_SIZE_BYTES,
    MemoryMap,
    PageIndexes,
    PageRows,
    empty_rows,
)

# Large enough that numpy's work outweighs the calls, small enough to stay in the cache.
_BLOCK_PAGES: Final = (2 << 20) // PAGE_SIZE_BYTES


class _Copier(Protocol):
    @property
    def memory_map(self) -> MemoryMap: ...

    def copy_out(self, indexes: PageIndexes, out: PageRows) -> None: ...

    def populated(self) -> PageIndexes: ...


class CompareTracker:
    """Tracks writes by content; uses `copier`, which stays its owner's. Not thread-safe."""

    name = "compare"
    can_harvest_running = True

    def __init__(self, copier: _Copier) -> None:
        """Prepare; nothing is read yet."""
        self._copier = copier
        self._reference: PageRows | None = None
        self._seen = np.empty(0, dtype=np.bool_)
        self._rows = empty_rows(_BLOCK_PAGES)
        self._differs = np.empty((_BLOCK_PAGES, PAGE_SIZE_BYTES // 8), dtype=np.bool_)

    def start(self) -> None:
        """Take the reference copy; what is written from now on will be harvested."""
        assert self._reference is None, "a tracker starts once"
        page_count = self._copier.memory_map.page_count
        # Zeroed pages cost no memory until they are written to.
        self._reference = np.zeros((page_count, PAGE_SIZE_BYTES), dtype=np.uint8)
        self._seen = np.zeros(page_count, dtype=np.bool_)
        indexes = self._copier.populated()
        for start in range(0, len(indexes), _BLOCK_PAGES):
            part = indexes[start : start + _BLOCK_PAGES]
            self._copier.copy_out(part, self._rows)
            self.copied(part, self._rows)

    def harvest(self) -> PageIndexes:
        """Return the pages that differ from what was last copied."""
        reference = self._reference
        assert reference is not None, "start the tracker first"
        populated = self._copier.populated()
        parts: list[PageIndexes] = []
        for start in range(0, len(populated), _BLOCK_PAGES):
            part = populated[start : start + _BLOCK_PAGES]
            self._copier.copy_out(part, self._rows)
            parts.append(part[self._rows_differ(part, reference)])
        parts.append(self._dropped(populated, reference))
        return np.sort(np.concatenate(parts))

    def copied(self, indexes: PageIndexes, rows: PageRows) -> None:
        """Note that the backup is sent `rows[i]` as page `indexes[i]`."""
        assert self._reference is not None, "start the tracker first"
        if len(indexes):
            self._reference[indexes] = rows[: len(indexes)]
            self._seen[indexes] = True

    def close(self) -> None:
        """Free the copy. Idempotent."""
        self._reference = None
        self._seen = np.empty(0, dtype=np.bool_)

    def _rows_differ(
        self, part: PageIndexes, reference: PageRows
    ) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        count = len(part)
        words = self._rows[:count].view(np.uint64)
        if int(part[-1]) - int(part[0]) == count - 1:
            known = reference[int(part[0]) : int(part[-1]) + 1].view(np.uint64)
        else:
            known = reference[part].view(np.uint64)
        differs = np.not_equal(words, known, out=self._differs[:count])
        # Booleans taken eight at a time.
        found: np.ndarray[tuple[int], np.dtype[np.bool_]] = np.any(differs.view(np.uint64), axis=1)
        return found

    def _dropped(self, populated: PageIndexes, reference: PageRows) -> PageIndexes:
        """Return pages that held data and are holes now: they read as zero."""
        held = self._seen.copy()
        held[populated] = False
        indexes = np.flatnonzero(held)
        if len(indexes) == 0:
            return NO_PAGES
        was_zero = np.fromiter(
            (not reference[index].any() for index in indexes.tolist()),
            dtype=np.bool_,
            count=len(indexes),
        )
        return indexes[~was_zero]
