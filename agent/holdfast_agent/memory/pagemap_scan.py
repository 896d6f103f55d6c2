"""Finds the pages a QEMU wrote, from outside, by write protection and one scan per harvest.

Needs Linux 6.7, ptrace rights (CAP_SYS_PTRACE) and /proc. Talks to the target once, at `start`
(`injection.py`); after that only the kernel is asked.

Theory of operation. A page of the target is either *protected* or *written*. A write to a
protected page makes it written, in the kernel, for the price of a page fault. A harvest asks for
the written pages of all blocks and protects them again, atomically for each page: what is written
after that is in the next harvest. KVM's and vhost's writes go through the same page table and
count as well.

What is written without making a page written, and what is done about it:

* Pages given back (balloon, page reporting): reported by events, see `userfault.py`.
* Pages never touched: no page table, nothing to protect. The first touch makes one, whose 512
  entries then all count as written: more than was written, never less.
* **A device that writes into pages it pinned before** (O_DIRECT or io_uring reads of QEMU): the
  page counts as written when the request *begins*. A harvest in between protects it again, and
  the data that arrives later goes unseen. `stop` of QMP drains all requests. So the exact dirty
  set needs `start` and every harvest to happen while the guest stands; a harvest while it runs is
  right only if no such request is in flight, or if its pages are harvested again after a drain.
* Writes through another process's mapping (vhost-user, virtiofsd) and by a passed-through device
  are not seen at all; such VMs are refused before they get here.
* Tracked memory unmapped or replaced: `harvest` raises TrackingFailed.

**KVM.** A scan that protects tells KVM to drop its second-level mappings of the whole range
scanned, so that the guest faults again on every page it merely reads. So under KVM a harvest takes
two steps: scan without protecting, then protect (and report) only inside the ranges found. The
result is what the *second* step reports, each page atomically, so two steps are right also while
the guest runs: a page written between the steps is either inside a range, and reported by step
two, or outside, and stays written for the next harvest. (Protecting silently in step two would
lose the writes that fell into the merged gaps; only a guest that stands would make that legal.)

Invariants: pages written since the last harvest are a subset of the next one; the result is
sorted and free of duplicates.

Source: Linux mm/userfaultfd.c, fs/proc/task_mmu.c; Documentation/admin-guide/mm/pagemap.rst.
"""

import os
from collections.abc import Sequence
from typing import Final

import numpy as np

from holdfast_agent.core.memory_map import (
    NO_PAGES,
    PAGE_SIZE_BYTES,
    MemoryBlock,
    MemoryMap,
    PageIndexes,
    PageRows,
    indexes_of,
    union,
)
from holdfast_agent.memory import kernel
from holdfast_agent.memory.errors import InjectionFailed, TrackingFailed
from holdfast_agent.memory.injection import open_userfaultfd
from holdfast_agent.memory.location import BlockLocation, in_map_order
from holdfast_agent.memory.pagemap import AddressRuns, PageTable, scan_unavailable
from holdfast_agent.memory.userfault import WriteProtection, userfaultfd_unavailable

# Each range of the second step costs a call: 4 us, most of it flushing the target's TLBs.
PROTECT_CALLS_MAX: Final = 128
# Merging over wider gaps costs KVM more faults than the saved calls are worth.
PROTECT_GAP_PAGES: Final = 4

_PAGE_SHIFT: Final = np.uint64(PAGE_SIZE_BYTES.bit_length() - 1)


class PagemapScanTracker:
    """Tracks the writes of process `pid` to the located blocks. One user; not thread-safe.

    `two_step` is for guests under KVM (see above); right but slower elsewhere.
    """

    name = "pagemap-scan"
    can_harvest_running = True

    def __init__(
        self,
        pid: int,
        locations: Sequence[BlockLocation],
        memory_map: MemoryMap,
        *,
        two_step: bool = False,
        injection_timeout_s: float = 5.0,
    ) -> None:
        """Prepare; the target is not touched before `start`."""
        self._pid = pid
        self._locations = in_map_order(locations, memory_map)
        self._blocks = memory_map.blocks
        self._two_step = two_step
        self._injection_timeout_s = injection_timeout_s
        self._protection: WriteProtection | None = None
        self._table: PageTable | None = None
        self._process_descriptor = -1

    def start(self) -> None:
        """Protect everything: each page written from now on will be harvested.

        Stops the target's main thread for well under a millisecond. Raises TrackingFailed, and
        has then undone what it did.
        """
        assert self._protection is None, "a tracker starts once"
        try:
            self._process_descriptor = os.pidfd_open(self._pid)
            self._protection = WriteProtection(
                open_userfaultfd(self._pid, self._injection_timeout_s)
            )
            self._protection.set_up(
                [(location.host_address, location.size_bytes) for location in self._locations]
            )
            self._table = PageTable(self._pid)
            for location in self._locations:
                self._table.written(location.host_address, location.end_address, protect=True)
            self._check_alive()
        except InjectionFailed as error:
            self.close()
            raise TrackingFailed(self._pid, error.reason) from error
        except OSError as error:
            self.close()
            raise TrackingFailed(self._pid, f"cannot track its writes: {error}") from error
        except TrackingFailed:
            self.close()
            raise

    def harvest(self) -> PageIndexes:
        """Return the pages written since the last harvest or `start`, and protect them again.

        Raises TrackingFailed when the target ended or its memory was mapped anew: the dirty set
        is then unknown.
        """
        assert self._protection is not None, "start the tracker first"
        assert self._table is not None, "start the tracker first"
        try:
            removed = self._protection.take_removed()
            parts = [
                self._pages(location, block, removed)
                for location, block in zip(self._locations, self._blocks, strict=True)
            ]
        except OSError as error:
            self._check_alive()
            raise TrackingFailed(self._pid, f"dirty set unknown: {error}") from error
        # Asked last: the page table of a dead process is empty, which looks like "no writes".
        self._check_alive()
        found = [part for part in parts if len(part)]
        if not found:
            return NO_PAGES
        # The parts of blocks are disjoint and in order.
        return found[0] if len(found) == 1 else np.concatenate(found)

    def copied(self, indexes: PageIndexes, rows: PageRows) -> None:
        """Do nothing: this tracker does not look at contents."""

    def close(self) -> None:
        """Take all protection away; the target runs on as before. Idempotent."""
        protection, self._protection = self._protection, None
        if protection is not None:
            protection.close()
        table, self._table = self._table, None
        if table is not None:
            table.close()
        descriptor, self._process_descriptor = self._process_descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _pages(
        self, location: BlockLocation, block: MemoryBlock, removed: AddressRuns
    ) -> PageIndexes:
        runs = self._written(location.host_address, location.end_address)
        pages = _page_indexes(runs, location, block)
        if len(removed):
            inside = np.clip(removed, location.host_address, location.end_address)
            dropped = [
                _page_indexes(run[np.newaxis], location, block) for run in inside if run[0] < run[1]
            ]
            pages = union([pages, *dropped])
        return pages

    def _written(self, start: int, end: int) -> AddressRuns:
        assert self._table is not None, "start the tracker first"
        if not self._two_step:
            return self._table.written(start, end, protect=True)
        runs = self._table.written(start, end, protect=False)
        return self._table.written_in(merge_runs(runs, PROTECT_CALLS_MAX, PROTECT_GAP_PAGES))

    def _check_alive(self) -> None:
        if kernel.process_ended(self._process_descriptor):
            raise TrackingFailed(self._pid, "it ended")


def merge_runs(
    runs: AddressRuns,
    calls_max: int,
    gap_pages: int,
) -> AddressRuns:
    """Join runs over gaps up to `gap_pages`, and over wider ones until `calls_max` are left."""
    if len(runs) <= 1:
        return runs
    gaps = runs[1:, 0] - runs[:-1, 1]
    kept = gaps > np.uint64(gap_pages * PAGE_SIZE_BYTES)
    if int(np.count_nonzero(kept)) >= calls_max:
        kept = np.zeros(len(gaps), dtype=np.bool_)
        if calls_max > 1:
            kept[np.argpartition(gaps, -(calls_max - 1))[-(calls_max - 1) :]] = True
    cuts = np.flatnonzero(kept)
    starts = np.concatenate((runs[:1, 0], runs[cuts + 1, 0]))
    ends = np.concatenate((runs[cuts, 1], runs[-1:, 1]))
    return np.stack((starts, ends), axis=1)


def unavailable() -> str | None:
    """Return why this host cannot track by scans, in words; None if it can."""
    return scan_unavailable() or userfaultfd_unavailable()


def _page_indexes(runs: AddressRuns, location: BlockLocation, block: MemoryBlock) -> PageIndexes:
    if len(runs) == 0:
        return NO_PAGES
    pages = ((runs - np.uint64(location.host_address)) >> _PAGE_SHIFT).astype(np.int64)
    pages[:, 1] -= pages[:, 0]
    pages[:, 0] += block.first_page
    return indexes_of(pages)
