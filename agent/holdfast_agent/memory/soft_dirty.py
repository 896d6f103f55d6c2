"""Finds the pages a QEMU wrote by the kernel's soft-dirty bits, for Linux before 6.7.

Needs CONFIG_MEM_SOFT_DIRTY, ptrace rights and CAP_SYS_ADMIN (page frame numbers). Writes to
/proc/PID/clear_refs; nothing is done inside the target.

Theory of operation. Writing 4 to `clear_refs` write-protects every page of the process and clears
its mark (bit 55 of its pagemap entry). The next write to a page faults and sets the mark. KVM and
vhost go through the same page table: clearing makes KVM drop all its second-level mappings, so
under KVM the guest faults again on every page it touches, read or written. A harvest reads the
entries of all blocks, 8 bytes a page, and clears. Its cost grows with RAM.

**Reading and clearing are two steps.** A write between them would be lost, so `start` and every
harvest happen while the guest stands (`can_harvest_running` is False). `stop` of QMP drains what
QEMU itself writes; nothing else writes private memory.

**The mark alone is not enough.** It is lost, or never set, when

* pages are given back (balloon, page reporting) and read as zero from then on: the entry is empty,
  or maps the kernel's zero page after a read, and neither is marked;
* the kernel merges equal pages (KSM): the new entry is not marked, whatever was written before.

So the whole entry is compared with what it was at the last harvest: page frame or swap slot,
presence, and whether the page is this process's alone. A page is reported when its mark is set or
its entry changed, unless it read as zero before and does now. Two different contents with one
unmarked entry would need a page that is dropped and comes back in the same frame without being
written. The zero page of 2 MiB can do that (it may be made of the very frames that were dropped),
but it is nobody's alone, which the entry says. KSM could; while it runs on memory that may be
merged this tracker refuses. Frames that the kernel moves by itself are reported: more than was
written, never less.

**Huge pages** have one mark for 512 pages. A 2 MiB found written throughout is split in that same
harvest, by advice on its first page (MADV_COLD splits what it covers in part), so it is reported
as a whole once. Where the kernel does not allow it (locked memory), it stays whole.

* Private anonymous memory only: a page of a file loses its mark when it leaves the page table.
* Tracked memory unmapped: TrackingFailed. Mapped anew: the kernel reports all of it as marked.
* One tracker for a process: a lock on its `clear_refs`. **Not seen: somebody else who writes there
  without asking for the lock** (checkpointing by CRIU does).
* Pages pinned by a request of QEMU's stay marked from harvest to harvest, as the kernel leaves
  them out of the clearing; with huge pages only `stop`'s draining helps.

Source: Linux 6.1 fs/proc/task_mmu.c (clear_refs_write, pte_to_pagemap_entry), mm/ksm.c
(replace_page), mm/memory.c (do_anonymous_page), mm/madvise.c;
Documentation/admin-guide/mm/soft-dirty.rst.
"""

import contextlib
import fcntl
import mmap
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from holdfast_agent.core.memory_map import (
    NO_PAGES,
    PAGE_SIZE_BYTES,
    MemoryBlock,
    MemoryMap,
    PageIndexes,
    PageRows,
)
from holdfast_agent.memory import kernel
from holdfast_agent.memory.errors import TrackingFailed
from holdfast_agent.memory.location import BlockLocation, in_map_order
from holdfast_agent.memory.pagemap import FRAME_BITS, SOFT_DIRTY_BIT, PageTable

HUGE_PAGE_PAGES: Final = 512
_CLEAR_SOFT_DIRTY: Final = b"4"
# Entries that are read at once: they stay in the cache until they have been compared.
_ENTRIES_PER_READ: Final = 1 << 16
_MADV_NOHUGEPAGE: Final = 15
_KSM_RUN: Final = Path("/sys/kernel/mm/ksm/run")

Entries = NDArray[np.uint64]
"""Entries of a pagemap, one for each page."""


class SoftDirtyTracker:
    """Tracks the writes of process `pid` to the located blocks. One user; not thread-safe."""

    name = "soft-dirty"
    can_harvest_running = False

    def __init__(self, pid: int, locations: Sequence[BlockLocation], memory_map: MemoryMap) -> None:
        """Prepare; the target is not touched before `start`."""
        self._pid = pid
        self._locations = in_map_order(locations, memory_map)
        self._blocks = memory_map.blocks
        self._process_descriptor = -1
        self._clear_descriptor = -1
        self._table: PageTable | None = None
        self._remembered: list[Entries] = []
        self._entries = np.empty(_ENTRIES_PER_READ, dtype=np.uint64)
        self._zero_entry = np.uint64(0)
        self._mappings: tuple[bytes, ...] = ()
        self._is_unmergeable = False

    def start(self) -> None:
        """Clear all marks: each page written from now on will be harvested.

        The target must stand. Raises TrackingFailed, and has then undone what it did.
        """
        assert self._table is None, "a tracker starts once"
        try:
            self._process_descriptor = os.pidfd_open(self._pid)
            self._table = PageTable(self._pid)
            self._zero_entry = _zero_page_entry()
            self._check_mappings()
            self._check_merging()
            self._clear_descriptor = os.open(
                f"/proc/{self._pid}/clear_refs", os.O_WRONLY | os.O_CLOEXEC
            )
            self._lock()
            self._remembered = [
                np.zeros(block.page_count, dtype=np.uint64) for block in self._blocks
            ]
            for location, remembered in zip(self._locations, self._remembered, strict=True):
                self._written(location, remembered)
            self._clear()
            self._check_alive()
        except OSError as error:
            self.close()
            raise TrackingFailed(self._pid, f"cannot track its writes: {error}") from error
        except TrackingFailed:
            self.close()
            raise

    def harvest(self) -> PageIndexes:
        """Return the pages written since the last harvest or `start`, and clear their marks.

        The target must stand. Raises TrackingFailed when the target ended, its memory was mapped
        anew or may be merged: the dirty set is then unknown, for good.
        """
        assert self._table is not None, "start the tracker first"
        parts: list[PageIndexes] = []
        try:
            self._check_merging()
            for location, block, remembered in zip(
                self._locations, self._blocks, self._remembered, strict=True
            ):
                parts.extend(self._harvest_block(location, block, remembered))
            self._split_huge_pages(parts)  # it marks what it splits, so before clearing
            self._clear()
            self._check_mappings()
        except OSError as error:
            self._check_alive()
            raise TrackingFailed(self._pid, f"dirty set unknown: {error}") from error
        # Asked last: the page table of a dead process is empty, which looks like "dropped".
        self._check_alive()
        return np.concatenate(parts) if parts else NO_PAGES

    def copied(self, indexes: PageIndexes, rows: PageRows) -> None:
        """Do nothing: this tracker does not look at contents."""

    def close(self) -> None:
        """Let go; there is nothing to undo in the target. Idempotent."""
        table, self._table = self._table, None
        if table is not None:
            table.close()
        for name in ("_clear_descriptor", "_process_descriptor"):
            descriptor: int = getattr(self, name)
            setattr(self, name, -1)
            if descriptor >= 0:
                os.close(descriptor)
        self._remembered = []

    def _harvest_block(
        self, location: BlockLocation, block: MemoryBlock, remembered: Entries
    ) -> list[PageIndexes]:
        return [part + block.first_page for part in self._written(location, remembered)]

    def _written(self, location: BlockLocation, remembered: Entries) -> list[PageIndexes]:
        """Return what was written of a block, by position in it, and remember its entries."""
        assert self._table is not None, "start the tracker first"
        parts: list[PageIndexes] = []
        for first in range(0, len(remembered), _ENTRIES_PER_READ):
            known = remembered[first : first + _ENTRIES_PER_READ]
            entries = self._entries[: len(known)]
            self._table.read_entries(location.host_address + first * PAGE_SIZE_BYTES, entries)
            found = written_positions(entries, known, self._zero_entry)
            if len(found):
                parts.append(found + first)
        return parts

    def _clear(self) -> None:
        os.write(self._clear_descriptor, _CLEAR_SOFT_DIRTY)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._clear_descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrackingFailed(self._pid, "busy: another one tracks its writes") from error

    def _check_mappings(self) -> None:
        """Raise TrackingFailed unless private anonymous memory is mapped throughout the blocks."""
        text = b"\n" + Path(f"/proc/{self._pid}/maps").read_bytes()
        if self._mappings and all(line in text for line in self._mappings):
            return
        # A dead process has no mappings: that is another matter, and said as such.
        self._check_alive()
        lines = text.splitlines()[1:]
        self._mappings = tuple(
            b"\n" + line + b"\n"
            for location in self._locations
            for line in self._mappings_of(location, lines)
        )

    def _mappings_of(self, location: BlockLocation, lines: Iterable[bytes]) -> list[bytes]:
        found: list[bytes] = []
        covered = location.host_address
        for line in lines:
            fields = line.split(maxsplit=5)
            start, end = (int(part, 16) for part in fields[0].split(b"-"))
            if end <= location.host_address or start >= location.end_address:
                continue
            if start > covered:
                break
            if fields[1].endswith(b"s") or fields[4] != b"0":
                raise TrackingFailed(
                    self._pid,
                    f"block {location.name} is shared or maps a file: soft-dirty marks are kept "
                    "for private anonymous memory only",
                )
            found.append(line)
            covered = end
        if covered < location.end_address:
            raise TrackingFailed(
                self._pid, f"tracked memory of block {location.name} at {covered:#x} is unmapped"
            )
        return found

    def _check_merging(self) -> None:
        """Raise TrackingFailed if the kernel may merge pages of ours: that takes marks away."""
        if self._is_unmergeable or not _merging_runs():
            return
        mergeable = _mergeable_blocks(self._pid, self._locations)
        if mergeable:
            raise TrackingFailed(
                self._pid,
                f"the kernel merges equal pages of {', '.join(mergeable)} and drops their marks: "
                f"write 0 to {_KSM_RUN}, or start QEMU with -machine mem-merge=off",
            )
        self._is_unmergeable = True

    def _split_huge_pages(self, parts: Sequence[PageIndexes]) -> None:
        """Split what was written throughout; where that is not possible it stays as it is."""
        addresses: list[int] = []
        for location, block in zip(self._locations, self._blocks, strict=True):
            skew = location.host_address // PAGE_SIZE_BYTES % HUGE_PAGE_PAGES
            first = location.host_address - skew * PAGE_SIZE_BYTES
            addresses += [
                first + number * HUGE_PAGE_PAGES * PAGE_SIZE_BYTES
                for number in whole_regions(parts, block, skew).tolist()
            ]
        if addresses:
            with contextlib.suppress(OSError):
                kernel.advise_cold(self._process_descriptor, addresses, PAGE_SIZE_BYTES)

    def _check_alive(self) -> None:
        if kernel.process_ended(self._process_descriptor):
            raise TrackingFailed(self._pid, "it ended")


def written_positions(entries: Entries, remembered: Entries, zero_entry: np.uint64) -> PageIndexes:
    """Return where `entries` show that a page may have changed, and bring `remembered` up to date.

    `remembered` holds the same pages' entries of the last time, without marks; `zero_entry` is that
    of the kernel's zero page.
    """
    # Marks are never remembered, so one comparison finds marked and changed entries alike.
    different = np.flatnonzero(entries != remembered)
    if len(different) == 0:
        return NO_PAGES
    found, known = entries[different], remembered[different]
    now = found & ~SOFT_DIRTY_BIT
    remembered[different] = now
    zero_before = (known == 0) | (known == zero_entry)
    zero_now = (found == 0) | (found == zero_entry)
    written: PageIndexes = different[~(zero_before & zero_now)]
    return written


def whole_regions(parts: Sequence[PageIndexes], block: MemoryBlock, skew: int) -> PageIndexes:
    """Return the 2 MiB regions of `block` that are in `parts` throughout.

    Region 0 begins `skew` pages before the block; the pages of `parts` count through all blocks.
    """
    regions = [
        (part[(part >= block.first_page) & (part < block.end_page)] - block.first_page + skew)
        // HUGE_PAGE_PAGES
        for part in parts
        if len(part)
    ]
    if not regions:
        return NO_PAGES
    return np.flatnonzero(np.bincount(np.concatenate(regions)) == HUGE_PAGE_PAGES)


def unavailable() -> str | None:
    """Return why this host cannot track by soft-dirty marks, in words; None if it can."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return "this kernel has no clear_refs (CONFIG_PROC_PAGE_MONITOR)"
    try:
        entry = _zero_page_entry(marked=True)
    except OSError as error:
        return f"the page table can not be read: {error}"
    if not entry & SOFT_DIRTY_BIT:
        return "this kernel marks no written pages (CONFIG_MEM_SOFT_DIRTY)"
    if not entry & FRAME_BITS:
        return "page frame numbers are hidden: it needs CAP_SYS_ADMIN"
    return None


def _zero_page_entry(*, marked: bool = False) -> np.uint64:
    """Return the entry of a page of ours that was only read; new memory is marked."""
    entries = np.empty(1, dtype=np.uint64)
    probe = mmap.mmap(-1, PAGE_SIZE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    table = PageTable(os.getpid(), regions_max=1)
    try:
        # A neighbour's huge zero page would have another frame.
        probe.madvise(_MADV_NOHUGEPAGE)
        assert probe[0] == 0, "new memory reads as zero"
        view = np.frombuffer(probe, dtype=np.uint8)
        table.read_entries(int(view.ctypes.data), entries)
        del view
    finally:
        table.close()
        probe.close()
    entry: np.uint64 = entries[0]
    return entry if marked else entry & ~SOFT_DIRTY_BIT


def _merging_runs() -> bool:
    try:
        return _KSM_RUN.read_bytes().strip() == b"1"
    except FileNotFoundError:
        return False


def _mergeable_blocks(pid: int, locations: Sequence[BlockLocation]) -> list[str]:
    """Return the names of blocks with memory that KSM was allowed to merge."""
    found: dict[str, None] = {}
    start = end = 0
    with Path(f"/proc/{pid}/smaps").open(encoding="utf-8") as lines:
        for line in lines:
            word = line.split(maxsplit=1)[0]
            if not word.endswith(":"):
                start, end = (int(part, 16) for part in word.split("-"))
            elif word == "VmFlags:" and "mg" in line.split():
                for location in locations:
                    if start < location.end_address and location.host_address < end:
                        found[location.name] = None
    return list(found)
