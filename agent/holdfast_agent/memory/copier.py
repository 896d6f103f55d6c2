"""Copies pages between the memory of a QEMU process and arrays of ours.

Needs ptrace rights on the process; opens `/proc/PID/map_files` (CAP_SYS_ADMIN or
CAP_CHECKPOINT_RESTORE) for shared blocks.

Theory of operation. A shared block is a file we map as well: copying is numpy's `take` (out) and
assignment by index (in), which give up the interpreter lock. A private block is reached by
`process_vm_readv` and `writev`: our side is one iovec (rows lie behind each other), theirs one per
run of pages, at most 1024 per call, in arrays made once.

A first write to pages of a shared block goes through the file, in runs: the kernel need not zero
what is overwritten at once, nor fault it in; that is twice as fast. Later writes go through the
mapping, which is twice as fast then.

Holes. A page of a shared file that was never touched, or given back by a balloon, is a hole.
Reading a hole through a mapping *allocates* it, so a backup of a ballooned guest would take its
memory back. `populated` asks the file (SEEK_DATA, SEEK_HOLE) and the page table, and touches
nothing. `copy_out` asks the file too, for runs of 32 pages and more (what a balloon gives back
comes in such runs); a hole in there is filled with zeros without being read.

A second thread was tried: no gain at 620 pages (2.5 MB), 20 % at 4,000, and in a capture QEMU's
device save needs the other core. So there is none.

The target's memory must not shrink while it is mapped: the file of a RAM block never does.

Source: process_vm_readv(2), lseek(2), Linux mm/shmem.c.
"""

import errno
import mmap
import os
from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np

from holdfast_agent.core.memory_map import (
    PAGE_SIZE_BYTES,
    MemoryBlock,
    MemoryMap,
    PageIndexes,
    PageRows,
    indexes_of,
    runs_of,
    union,
)
from holdfast_agent.memory import kernel
from holdfast_agent.memory.errors import MemoryAccessFailed
from holdfast_agent.memory.location import BlockLocation, in_map_order
from holdfast_agent.memory.pagemap import PageTable

IOVECS_MAX: Final = 1024  # UIO_MAXIOV
# A call of process_vm_readv copies at most this much (MAX_RW_COUNT, rounded down).
_BYTES_PER_CALL_MAX: Final = 1 << 30
# Below this mean length `take` is faster than one slice per run.
_SLICE_RUN_PAGES: Final = 64
_PROBE_RUN_PAGES: Final = 32
# From this mean length on, pages written for the first time go through the file.
_FILE_RUN_PAGES: Final = 8
_PAGE_VOID: Final = np.dtype(f"V{PAGE_SIZE_BYTES}")


class _BlockMemory(Protocol):
    def read(self, local: PageIndexes, out: PageRows) -> None: ...

    def write(self, local: PageIndexes, rows: PageRows) -> None: ...

    def populated(self, table: PageTable) -> PageIndexes: ...

    def close(self) -> None: ...


class GuestMemory:
    """The located blocks of process `pid`, by page index. Owns its mappings; not thread-safe."""

    def __init__(self, pid: int, locations: Sequence[BlockLocation], memory_map: MemoryMap) -> None:
        """Map the shared blocks; raises MemoryAccessFailed, ValueError for a wrong location."""
        self._memory_map = memory_map
        self._pid = pid
        self._process_descriptor = -1
        self._table: PageTable | None = None
        self._blocks: list[_BlockMemory] = []
        try:
            self._process_descriptor = os.pidfd_open(pid)
            self._table = PageTable(pid)
            for location in in_map_order(locations, memory_map):
                if location.shared:
                    self._blocks.append(_SharedBlock(pid, location))
                else:
                    self._blocks.append(_PrivateBlock(pid, self._process_descriptor, location))
        except OSError as error:
            self.close()
            raise MemoryAccessFailed(pid, "(opening)", 0, str(error)) from error
        except (MemoryAccessFailed, ValueError):
            self.close()
            raise

    @property
    def memory_map(self) -> MemoryMap:
        """How pages are numbered."""
        return self._memory_map

    def copy_out(self, indexes: PageIndexes, out: PageRows) -> None:
        """Copy the pages `indexes` (sorted) into the first `len(indexes)` rows of `out`.

        `out: uint8[>= page_count, 4096]`, contiguous; four times faster when it begins at a
        multiple of 64 bytes (`memory_map.empty_rows`). Raises MemoryAccessFailed.
        """
        self._check(indexes, out)
        for number, (first, start, end) in self._split(indexes):
            self._blocks[number].read(indexes[start:end] - first, out[start:end])

    def copy_in(self, indexes: PageIndexes, rows: PageRows) -> None:
        """Write `rows[i]` to page `indexes[i]` (sorted). Raises MemoryAccessFailed."""
        self._check(indexes, rows)
        for number, (first, start, end) in self._split(indexes):
            self._blocks[number].write(indexes[start:end] - first, rows[start:end])

    def populated(self) -> PageIndexes:
        """Return all pages that may differ from zero; allocates nothing in the guest.

        Raises MemoryAccessFailed.
        """
        assert self._table is not None, "closed"
        parts = [
            memory.populated(self._table) + block.first_page
            for memory, block in zip(self._blocks, self._memory_map.blocks, strict=True)
        ]
        return np.concatenate(parts)

    def close(self) -> None:
        """Unmap and close; the guest is untouched. Idempotent."""
        blocks, self._blocks = self._blocks, []
        for block in blocks:
            block.close()
        table, self._table = self._table, None
        if table is not None:
            table.close()
        descriptor, self._process_descriptor = self._process_descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _check(self, indexes: PageIndexes, rows: PageRows) -> None:
        assert self._table is not None, "closed"
        assert rows.dtype == np.uint8, rows.dtype
        assert rows.flags.c_contiguous, "rows must lie behind each other"
        assert rows.shape[0] >= len(indexes), (rows.shape, len(indexes))
        assert rows.shape[1] == PAGE_SIZE_BYTES, rows.shape
        if len(indexes):
            # Sorted, so the ends tell; `take` would clip a stray index and never say so.
            assert indexes[0] >= 0, int(indexes[0])
            assert indexes[-1] < self._memory_map.page_count, int(indexes[-1])

    def _split(self, indexes: PageIndexes) -> list[tuple[int, tuple[int, int, int]]]:
        blocks: tuple[MemoryBlock, ...] = self._memory_map.blocks
        return [
            (number, (blocks[number].first_page, start, end))
            for number, (start, end) in enumerate(self._memory_map.split(indexes))
            if start < end
        ]


class _SharedBlock:
    """A block whose file we map."""

    def __init__(self, pid: int, location: BlockLocation) -> None:
        assert location.map_path is not None, "held by BlockLocation"
        self._pid = pid
        self._location = location
        self._descriptor = -1
        try:
            self._descriptor = os.open(location.map_path, os.O_RDWR | os.O_CLOEXEC)
            self._mapping = mmap.mmap(
                self._descriptor, location.size_bytes, offset=location.file_offset
            )
        except (OSError, ValueError) as error:
            if self._descriptor >= 0:
                os.close(self._descriptor)
            raise MemoryAccessFailed(
                pid, location.name, 0, f"cannot map {location.map_path}: {error}"
            ) from error
        self._pages: PageRows = np.frombuffer(self._mapping, dtype=np.uint8).reshape(
            -1, PAGE_SIZE_BYTES
        )
        self._voids = self._pages.view(_PAGE_VOID).reshape(-1)
        self._is_fresh = np.ones(len(self._pages), dtype=np.bool_)

    def read(self, local: PageIndexes, out: PageRows) -> None:
        run_count = 1 + int(np.count_nonzero(local[1:] - local[:-1] != 1))
        if len(local) < run_count * _SLICE_RUN_PAGES and not self._worth_probing(local):
            np.take(self._pages, local, axis=0, out=out, mode="clip")
            return
        has_holes = self._has_holes()
        row = 0
        for first, count in runs_of(local).tolist():
            rows = out[row : row + count]
            if has_holes and count >= _PROBE_RUN_PAGES:
                self._read_around_holes(first, rows)
            else:
                np.copyto(rows, self._pages[first : first + count])
            row += count

    def write(self, local: PageIndexes, rows: PageRows) -> None:
        fresh = self._is_fresh[local]
        if fresh.any():
            self._is_fresh[local] = False
            runs = runs_of(local)
            if fresh.all() and len(local) >= len(runs) * _FILE_RUN_PAGES:
                self._write_file(runs.tolist(), rows)
                return
        self._voids[local] = rows.view(_PAGE_VOID).reshape(-1)

    def populated(self, table: PageTable) -> PageIndexes:
        del table  # the file knows better: pages QEMU has not mapped may hold data
        return data_pages(self._descriptor, self._location.file_offset, self._location.size_bytes)

    def close(self) -> None:
        # The mapping cannot be closed while arrays look at it.
        del self._pages, self._voids
        self._mapping.close()
        os.close(self._descriptor)

    def _write_file(self, runs: Sequence[Sequence[int]], rows: PageRows) -> None:
        """Write runs of pages through the file; where that can not be done, through the mapping."""
        row = 0
        for first, count in runs:
            data = rows[row : row + count].reshape(-1).data
            position = self._location.file_offset + first * PAGE_SIZE_BYTES
            try:
                while len(data):
                    written = os.pwrite(self._descriptor, data, position)
                    data, position = data[written:], position + written
            except OSError as error:
                if error.errno != errno.EINVAL:  # a file of huge pages can be mapped only
                    raise MemoryAccessFailed(
                        self._pid, self._location.name, first, str(error)
                    ) from error
                np.copyto(self._pages[first : first + count], rows[row : row + count])
            row += count

    def _worth_probing(self, local: PageIndexes) -> bool:
        """Whether a run of 32 pages may be in there and the file has holes at all."""
        if len(local) < _PROBE_RUN_PAGES:
            return False
        reach = _PROBE_RUN_PAGES - 1
        if not bool((local[reach:] - local[:-reach] == reach).any()):
            return False
        return self._has_holes()

    def _has_holes(self) -> bool:
        status = os.fstat(self._descriptor)
        return status.st_blocks * 512 < status.st_size

    def _read_around_holes(self, first: int, rows: PageRows) -> None:
        """Fill `rows` from page `first` on; a hole is looked for at every 32nd page."""
        done, count = 0, len(rows)
        base = self._location.file_offset
        while done < count:
            position = base + (first + done) * PAGE_SIZE_BYTES
            try:
                data = os.lseek(self._descriptor, position, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise MemoryAccessFailed(
                        self._pid, self._location.name, first + done, str(error)
                    ) from error
                data = base + self._location.size_bytes  # nothing but hole up to the end
            hole = min((data - position) // PAGE_SIZE_BYTES, count - done)
            rows[done : done + hole] = 0
            done += hole
            step = min(_PROBE_RUN_PAGES, count - done)
            np.copyto(rows[done : done + step], self._pages[first + done : first + done + step])
            done += step


class _PrivateBlock:
    """A block only the process itself has mapped."""

    def __init__(self, pid: int, process_descriptor: int, location: BlockLocation) -> None:
        self._pid = pid
        self._process_descriptor = process_descriptor
        self._location = location
        self._local = np.zeros(2, dtype=np.uint64)
        self._remote = np.zeros((IOVECS_MAX, 2), dtype=np.uint64)
        self._local_address = self._local.ctypes.data
        self._remote_address = self._remote.ctypes.data

    def read(self, local: PageIndexes, out: PageRows) -> None:
        self._copy(local, out, write=False)

    def write(self, local: PageIndexes, rows: PageRows) -> None:
        self._copy(local, rows, write=True)

    def populated(self, table: PageTable) -> PageIndexes:
        location = self._location
        try:
            runs = table.populated(location.host_address, location.end_address)
            pages = (
                (runs - np.uint64(location.host_address)) // np.uint64(PAGE_SIZE_BYTES)
            ).astype(np.int64)
            pages[:, 1] -= pages[:, 0]
            file_pages = self._file_pages()
        except OSError as error:
            self._check_alive(0)
            raise MemoryAccessFailed(self._pid, location.name, 0, str(error)) from error
        self._check_alive(0)  # asked last: a dead process has an empty page table
        return union([indexes_of(pages), file_pages])

    def close(self) -> None:
        """Nothing to close: the descriptors belong to GuestMemory."""

    def _file_pages(self) -> PageIndexes:
        """Return pages with data in files mapped privately: not yet in the page table, not zero."""
        location, parts = self._location, [np.empty(0, dtype=np.int64)]
        with open(f"/proc/{self._pid}/maps", encoding="utf-8") as maps:  # noqa: PTH123 - one line at a time
            for line in maps:
                fields = line.split(maxsplit=5)
                start, end = (int(part, 16) for part in fields[0].split("-"))
                if end <= location.host_address or start >= location.end_address:
                    continue
                if fields[4] == "0":  # no inode: anonymous
                    continue
                parts.append(self._file_pages_of(fields[0], start, end, int(fields[2], 16)))
        return np.concatenate(parts)

    def _file_pages_of(self, name: str, start: int, end: int, offset: int) -> PageIndexes:
        location = self._location
        begin, stop = max(start, location.host_address), min(end, location.end_address)
        descriptor = os.open(f"/proc/{self._pid}/map_files/{name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            pages = data_pages(descriptor, offset + begin - start, stop - begin)
        finally:
            os.close(descriptor)
        return pages + (begin - location.host_address) // PAGE_SIZE_BYTES

    def _copy(self, local: PageIndexes, rows: PageRows, *, write: bool) -> None:
        # A number can be reused after the process is gone; its descriptor cannot.
        self._check_alive(int(local[0]))
        address = rows.ctypes.data
        runs = _short_runs(runs_of(local))
        for batch in _batches(runs):
            address += self._copy_batch(runs[batch], address, write=write)

    def _copy_batch(self, runs: PageIndexes, address: int, *, write: bool) -> int:
        """Copy up to 1024 runs to or from `address`; returns the bytes copied, which is all."""
        count = len(runs)
        remote = self._remote[:count]
        remote[:, 0] = runs[:, 0] * PAGE_SIZE_BYTES + self._location.host_address
        remote[:, 1] = runs[:, 1] * PAGE_SIZE_BYTES
        wanted = int(runs[:, 1].sum()) * PAGE_SIZE_BYTES
        done, first = 0, 0
        while done < wanted:
            self._local[0], self._local[1] = address + done, wanted - done
            try:
                copied = kernel.process_vm_copy(
                    self._pid,
                    self._local_address,
                    1,
                    self._remote_address + first * 16,
                    count - first,
                    write=write,
                )
            except OSError as error:
                raise self._failed(int(remote[first, 0]), str(error)) from error
            if copied == 0:
                raise self._failed(int(remote[first, 0]), "nothing was copied")
            done += copied
            # The copy stops early at the first page that fails: go on behind what was copied,
            # so that the next call makes progress or names the page.
            while first < count and copied >= int(remote[first, 1]):
                copied -= int(remote[first, 1])
                first += 1
            if copied:
                remote[first, 0] += np.uint64(copied)
                remote[first, 1] -= np.uint64(copied)
        return wanted

    def _check_alive(self, page: int) -> None:
        if kernel.process_ended(self._process_descriptor):
            raise MemoryAccessFailed(self._pid, self._location.name, page, "the process ended")

    def _failed(self, address: int, reason: str) -> MemoryAccessFailed:
        page = (address - self._location.host_address) // PAGE_SIZE_BYTES
        return MemoryAccessFailed(self._pid, self._location.name, page, reason)


def data_pages(descriptor: int, offset: int, size_bytes: int) -> PageIndexes:
    """Return the pages of a file's range that are not holes, counted from `offset`.

    A file system that knows no holes answers that all is data, which is right, only more.
    """
    runs: list[tuple[int, int]] = []
    position, end = offset, offset + size_bytes
    while position < end:
        try:
            data = os.lseek(descriptor, position, os.SEEK_DATA)
            if data >= end:
                break
            hole = min(os.lseek(descriptor, data, os.SEEK_HOLE), end)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data up to the end of the file
                break
            if error.errno != errno.EINVAL:
                raise
            data, hole = position, end
        first = (data - offset) // PAGE_SIZE_BYTES
        runs.append((first, -(-(hole - offset) // PAGE_SIZE_BYTES) - first))
        position = hole
    return indexes_of(np.array(runs, dtype=np.int64).reshape(-1, 2))


def _short_runs(runs: PageIndexes) -> PageIndexes:
    """Return the runs with none longer than one call copies."""
    longest = _BYTES_PER_CALL_MAX // PAGE_SIZE_BYTES
    if int(runs[:, 1].max()) <= longest:
        return runs
    pieces = [
        (first + done, min(longest, count - done))
        for first, count in runs.tolist()
        for done in range(0, count, longest)
    ]
    return np.array(pieces, dtype=np.int64)


def _batches(runs: PageIndexes) -> list[slice]:
    return [slice(start, start + IOVECS_MAX) for start in range(0, len(runs), IOVECS_MAX)]
