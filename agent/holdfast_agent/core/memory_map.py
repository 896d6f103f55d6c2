"""How the pages of a VM are numbered: its RAM blocks, one after the other. Pure.

Pure but for setting memory aside, in `empty_rows` and `sparse_rows`.

Every page of every block that a backup must hold has one index, counted from 0 through all blocks
in the order of the map. Both sides use the same map (the primary sends it), so an index means the
same page on both, wherever each QEMU mapped it.

Sets of pages are sorted, duplicate-free `int64[page_count]` arrays (`PageIndexes`); contents are
`uint8[page_count, 4096]` (`PageRows`).

Invariant: blocks are contiguous and in order: `blocks[i+1].first_page == blocks[i].end_page`.
"""

import contextlib
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

PAGE_SIZE_BYTES = 4096

PageIndexes: TypeAlias = NDArray[np.int64]
PageRows: TypeAlias = NDArray[np.uint8]

NO_PAGES: PageIndexes = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class MemoryBlock:
    """One RAM block of the VM, by QEMU's name for it (`pc.ram`, `ram0`, `vga.vram`)."""

    name: str
    first_page: int
    page_count: int

    @property
    def end_page(self) -> int:
        """Index of the first page behind this block."""
        return self.first_page + self.page_count

    @property
    def size_bytes(self) -> int:
        """Size of the block."""
        return self.page_count * PAGE_SIZE_BYTES


@dataclass(frozen=True)
class MemoryMap:
    """All blocks of a VM that a checkpoint covers."""

    blocks: tuple[MemoryBlock, ...]

    @classmethod
    def of_sizes(cls, sizes_bytes: Iterable[tuple[str, int]]) -> "MemoryMap":
        """Number the pages of blocks given as (name, size in bytes)."""
        blocks: list[MemoryBlock] = []
        first_page = 0
        for name, size_bytes in sizes_bytes:
            if size_bytes <= 0 or size_bytes % PAGE_SIZE_BYTES:
                raise ValueError(f"block {name} has {size_bytes} bytes, not whole pages")
            blocks.append(MemoryBlock(name, first_page, size_bytes // PAGE_SIZE_BYTES))
            first_page = blocks[-1].end_page
        if len({block.name for block in blocks}) != len(blocks):
            raise ValueError(f"two blocks share a name: {[block.name for block in blocks]}")
        return cls(tuple(blocks))

    @property
    def page_count(self) -> int:
        """Pages of all blocks together."""
        return self.blocks[-1].end_page if self.blocks else 0

    @property
    def size_bytes(self) -> int:
        """Size of all blocks together."""
        return self.page_count * PAGE_SIZE_BYTES

    def split(self, indexes: PageIndexes) -> list[tuple[int, int]]:
        """Return for each block the slice bounds (start, end) of `indexes` that fall into it."""
        edges = [block.first_page for block in self.blocks] + [self.page_count]
        cuts = np.searchsorted(indexes, edges)
        return [(int(cuts[i]), int(cuts[i + 1])) for i in range(len(self.blocks))]


def empty_rows(page_count: int) -> PageRows:
    """Return uninitialised rows that begin at a page boundary.

    It matters: numpy starts large arrays 16 bytes behind a page boundary, and copying whole pages
    to there is four times slower (each load waits for an earlier store with the same low 12 bits
    of the address). Any multiple of 64 bytes is as good.
    """
    spare = np.empty((page_count + 1) * PAGE_SIZE_BYTES, dtype=np.uint8)
    offset = -spare.ctypes.data % PAGE_SIZE_BYTES
    return spare[offset : offset + page_count * PAGE_SIZE_BYTES].reshape(-1, PAGE_SIZE_BYTES)


def sparse_rows(page_count: int) -> PageRows:
    """Return at least one row of zeros, which take memory one by one as they are written.

    numpy asks for huge pages instead. Then the first hundred scattered rows are 200 MiB that the
    kernel clears while the interpreter's lock is held, which took longer than a peer may be silent.
    """
    memory = mmap.mmap(-1, page_count * PAGE_SIZE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # EINVAL: a kernel that has no huge pages to begin with
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8).reshape(-1, PAGE_SIZE_BYTES)


def runs_of(indexes: PageIndexes) -> NDArray[np.int64]:
    """Return the maximal runs of consecutive indexes as `int64[run_count, 2]` of (first, count)."""
    if len(indexes) == 0:
        return np.empty((0, 2), dtype=np.int64)
    breaks = np.flatnonzero(indexes[1:] - indexes[:-1] != 1)
    runs = np.empty((len(breaks) + 1, 2), dtype=np.int64)
    runs[0, 0] = indexes[0]
    runs[1:, 0] = indexes[breaks + 1]
    runs[-1, 1] = len(indexes)
    runs[:-1, 1] = breaks + 1
    runs[1:, 1] -= runs[:-1, 1].copy()
    return runs


def indexes_of(runs: NDArray[np.int64]) -> PageIndexes:
    """Return the page indexes of `int64[run_count, 2]` runs of (first, count ≥ 1)."""
    if len(runs) == 0:
        return NO_PAGES
    first, count = runs[:, 0], runs[:, 1]
    behind = np.cumsum(count)
    page_count = int(behind[-1])
    if page_count == len(runs):  # single pages, the common case of random writes
        return np.ascontiguousarray(first)
    pages = np.repeat(first - behind + count, count)
    pages += np.arange(page_count, dtype=np.int64)
    return pages


def union(parts: Sequence[PageIndexes]) -> PageIndexes:
    """Return the sorted union of page sets."""
    if not parts:
        return NO_PAGES
    if len(parts) == 1:
        return parts[0]
    return np.unique(np.concatenate(parts))


def zero_pages(rows: PageRows) -> NDArray[np.bool_]:
    """Return `bool[page_count]`: which rows are zero throughout.

    Most pages that are not zero show it in their first word, so only the others are read whole.
    """
    words = rows.view(np.uint64)
    zero: NDArray[np.bool_] = words[:, 0] == 0
    candidates = np.flatnonzero(zero)
    if len(candidates) * 2 > len(rows):
        zero[:] = np.bitwise_or.reduce(words, axis=1) == 0
    elif len(candidates):
        zero[candidates] = np.bitwise_or.reduce(words[candidates], axis=1) == 0
    return zero
