"""Asks the kernel about the page table of another process. Needs ptrace rights; reads /proc.

Theory of operation: one `PageTable` keeps `/proc/PID/pagemap` open and owns the buffers of its
calls, so a scan allocates nothing but its answer. A scan answers in address ranges. It **may
return early** (its buffer is full, or the kernel chose to): `walk_end` says how far it came, and
the scan goes on from there.

The category masks matter: with `mask = return = PAGE_IS_WRITTEN` and nothing else, the kernel
takes a path of its own, twice as fast, on which a page that was dropped from a page table counts
as written. With any other mask it does not (fs/proc/task_mmu.c, pagemap_scan_pmd_entry).

Not thread-safe. Source: Linux Documentation/admin-guide/mm/pagemap.rst, uapi linux/fs.h.
"""

import errno
import mmap
import os
from typing import Final

import numpy as np
from numpy.typing import NDArray

from holdfast_agent.core.memory_map import PAGE_SIZE_BYTES
from holdfast_agent.memory import kernel

REGIONS_MAX: Final = 1 << 16

# struct pm_scan_arg, linux/fs.h: 12 u64.
_SIZE, _FLAGS, _START, _END, _WALK_END, _VECTOR, _VECTOR_LENGTH = range(7)
_MASK, _ANY_OF, _RETURN = 9, 10, 11
_ARGUMENT_WORDS: Final = 12
_REGION_BYTES: Final = 24

_PRESENT_OR_SWAPPED_BITS: Final = np.uint64(1 << 63 | 1 << 62)
SOFT_DIRTY_BIT: Final = np.uint64(1 << 55)
FRAME_BITS: Final = np.uint64((1 << 55) - 1)
_ENTRIES_PER_READ: Final = 1 << 17

AddressRuns = NDArray[np.uint64]
"""`uint64[run_count, 2]` of (start, end) addresses, in order."""


class PageTable:
    """The page table of process `pid`, read through `/proc/PID/pagemap`."""

    def __init__(self, pid: int, regions_max: int = REGIONS_MAX) -> None:
        """Open it, with room for `regions_max` ranges per call; raises OSError."""
        self._regions_max = regions_max
        self._descriptor = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._regions = np.zeros((regions_max, 3), dtype=np.uint64)
        self._regions_address = self._regions.ctypes.data
        self._argument = np.zeros(_ARGUMENT_WORDS, dtype=np.uint64)
        self._argument_address = self._argument.ctypes.data

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def written(self, start: int, end: int, *, protect: bool) -> AddressRuns:
        """Return what was written in [start, end); `protect` starts anew, atomically per page.

        Raises OSError EPERM where no tracking is set up (the mapping was replaced).
        """
        flags = kernel.SCAN_CHECK_ASYNC | (kernel.SCAN_WRITE_PROTECT if protect else 0)
        written = kernel.PAGE_IS_WRITTEN
        return self._scan(start, end, flags=flags, mask=written, any_of=0, returned=written)

    def written_in(self, runs: AddressRuns) -> AddressRuns:
        """Like `written(protect=True)`, only inside the given runs: one call for each.

        A call costs as much in Python as in the kernel, so all arguments are laid out beforehand.
        """
        written = kernel.PAGE_IS_WRITTEN
        arguments = np.zeros((len(runs), _ARGUMENT_WORDS), dtype=np.uint64)
        arguments[:, _SIZE] = _ARGUMENT_WORDS * 8
        arguments[:, _FLAGS] = kernel.SCAN_CHECK_ASYNC | kernel.SCAN_WRITE_PROTECT
        arguments[:, _START : _END + 1] = runs
        arguments[:, _MASK] = arguments[:, _RETURN] = written
        words = arguments.reshape(-1).data
        address, filled = arguments.ctypes.data, 0
        parts: list[AddressRuns] = []
        for base in range(0, len(words), _ARGUMENT_WORDS):
            if filled == self._regions_max:
                parts.append(self._regions[:, :2].copy())
                filled = 0
            words[base + _VECTOR] = self._regions_address + filled * _REGION_BYTES
            words[base + _VECTOR_LENGTH] = self._regions_max - filled
            filled += kernel.ioctl(self._descriptor, kernel.PAGEMAP_SCAN, address + base * 8)
            walked, end = words[base + _WALK_END], words[base + _END]
            if walked < end:
                parts.append(self._regions[:filled, :2].copy())
                filled = 0
                parts.append(self.written(walked, end, protect=True))
        parts.append(self._regions[:filled, :2].copy())
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def populated(self, start: int, end: int) -> AddressRuns:
        """Return what the page table holds in [start, end), in memory or swapped out.

        A superset: it may count pages that were dropped and are still marked.
        """
        held = kernel.PAGE_IS_PRESENT | kernel.PAGE_IS_SWAPPED
        try:
            return self._scan(start, end, flags=0, mask=0, any_of=held, returned=held)
        except OSError as error:
            if error.errno not in (errno.ENOTTY, errno.EINVAL):
                raise
            return self.populated_by_entries(start, end)

    def read_entries(self, start: int, out: NDArray[np.uint64]) -> None:
        """Fill `out` with the entries of the pages from address `start` on, 8 bytes each.

        Raises OSError, ESRCH when the process has no memory any more.
        """
        left = out.data.cast("B")
        position = start // PAGE_SIZE_BYTES * 8
        while left:
            count = os.preadv(self._descriptor, [left], position)
            if count == 0:
                raise OSError(errno.ESRCH, "pagemap ended: the process has no memory any more")
            left, position = left[count:], position + count

    def populated_by_entries(self, start: int, end: int) -> AddressRuns:
        """Return the same on a kernel before 6.7: one 8-byte entry per page."""
        first, last = start // PAGE_SIZE_BYTES, end // PAGE_SIZE_BYTES
        parts: list[NDArray[np.uint64]] = []
        while first < last:
            wanted = min(last - first, _ENTRIES_PER_READ)
            data = os.pread(self._descriptor, wanted * 8, first * 8)
            if not data:
                raise OSError(errno.ESRCH, "pagemap ended: the process has no memory any more")
            entries = np.frombuffer(data[: len(data) // 8 * 8], dtype=np.uint64)
            held = np.flatnonzero(entries & _PRESENT_OR_SWAPPED_BITS).astype(np.uint64)
            parts.append(held + np.uint64(first))
            first += len(entries)
        pages = np.concatenate(parts) if parts else np.empty(0, dtype=np.uint64)
        addresses = pages * np.uint64(PAGE_SIZE_BYTES)
        return np.stack((addresses, addresses + np.uint64(PAGE_SIZE_BYTES)), axis=1)

    def _scan(
        self, start: int, end: int, *, flags: int, mask: int, any_of: int, returned: int
    ) -> AddressRuns:
        argument = self._argument
        argument[_SIZE] = _ARGUMENT_WORDS * 8
        argument[_FLAGS] = flags
        argument[_START] = start
        argument[_END] = end
        argument[_MASK], argument[_ANY_OF], argument[_RETURN] = mask, any_of, returned
        parts: list[AddressRuns] = []
        filled, position = 0, start
        while position < end:
            if filled == self._regions_max:
                parts.append(self._regions[:, :2].copy())
                filled = 0
            argument[_START] = position
            argument[_VECTOR] = self._regions_address + filled * _REGION_BYTES
            argument[_VECTOR_LENGTH] = self._regions_max - filled
            filled += kernel.ioctl(self._descriptor, kernel.PAGEMAP_SCAN, self._argument_address)
            walked = int(argument[_WALK_END])
            if walked <= position:
                raise OSError(errno.EIO, f"scan made no way at {position:#x}")
            position = walked
        parts.append(self._regions[:filled, :2].copy())
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def scan_unavailable() -> str | None:
    """Return why this kernel cannot scan page tables for written pages; None if it can."""
    table = PageTable(os.getpid())
    probe = mmap.mmap(-1, PAGE_SIZE_BYTES)
    try:
        view = np.frombuffer(probe, dtype=np.uint8)
        address = int(view.ctypes.data)
        del view
        table._scan(  # noqa: SLF001 - same module
            address,
            address + PAGE_SIZE_BYTES,
            flags=0,
            mask=kernel.PAGE_IS_WRITTEN,
            any_of=0,
            returned=kernel.PAGE_IS_WRITTEN,
        )
    except OSError as error:
        return f"this kernel has no PAGEMAP_SCAN ({error.strerror}): it needs Linux 6.7 or newer"
    finally:
        probe.close()
        table.close()
    return None
