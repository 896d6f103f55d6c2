"""A userfaultfd in asynchronous write-protect mode, on the memory of another process.

Needs the descriptor from `injection.open_userfaultfd`. Closing it undoes everything.

Theory of operation. Registered memory is tracked by the kernel alone: a write to a protected page
clears the page's mark and goes on, nobody is asked. What *is* sent to us are three rare events:

* REMOVE: QEMU gave pages back (balloon, free page reporting, virtio-mem): `madvise` dropped them
  and they read as zero from then on. The page table does not show all of that: on shared memory
  the mark survives the drop (also when the page is read again), and on private memory a whole
  2 MiB whose page table was freed, or that was a huge page, is passed over by the scan. So the
  dirty set needs these events.
* UNMAP, REMAP: tracked memory is gone; the tracker must say so and not stay silent.

The thread of QEMU that does this waits in the kernel until the event is read, so a thread of ours
reads at once and does nothing else. If our process is killed the kernel wakes it.

An event is read *before* the pages are dropped (the wait is in front of the drop), so a range
counts as dirty in the harvest that reads it and in the one after.

Not seen: holes punched into the file without `madvise` (QEMU does that for hugetlbfs only), and
`process_madvise` by others.

Source: Linux mm/userfaultfd.c (userfaultfd_remove), uapi linux/userfaultfd.h; QEMU 7.2
softmmu/physmem.c (ram_block_discard_range).
"""

import errno
import os
import select
import struct
import threading
from contextlib import suppress
from typing import Final

import numpy as np

from holdfast_agent.memory import kernel
from holdfast_agent.memory.pagemap import AddressRuns

_WRITE_PROTECT: Final = 1 << 0
_EVENT_REMAP: Final = 1 << 2
_EVENT_REMOVE: Final = 1 << 3
_EVENT_UNMAP: Final = 1 << 6
_WP_SHARED: Final = 1 << 12
_WP_UNPOPULATED: Final = 1 << 13
_WP_ASYNC: Final = 1 << 15
_FEATURES: Final = (
    _WRITE_PROTECT
    | _EVENT_REMAP
    | _EVENT_REMOVE
    | _EVENT_UNMAP
    | _WP_SHARED
    | _WP_UNPOPULATED
    | _WP_ASYNC
)

_REMAPPED: Final = 0x14
_REMOVED: Final = 0x15
_UNMAPPED: Final = 0x16
# struct uffd_msg: u8 event, 7 bytes reserved, then for REMOVE and UNMAP u64 start, u64 end.
_MESSAGE: Final = struct.Struct("=B7xQQ8x")
_MESSAGES_PER_READ: Final = 64
# Past this many ranges between two harvests they are not worth keeping apart.
_RANGES_MAX: Final = 1 << 14
_PIECE_BYTES: Final = 32 << 20


class WriteProtection:
    """Owns the descriptor and the thread that reads its events."""

    def __init__(self, descriptor: int) -> None:
        """Take over the descriptor: `close` closes it."""
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._removed: list[tuple[int, int]] = []
        self._removed_before: list[tuple[int, int]] = []
        self._gone: str | None = None
        self._ranges: list[tuple[int, int]] = []
        self._wake_descriptor = -1
        self._thread: threading.Thread | None = None

    def set_up(self, ranges: list[tuple[int, int]]) -> None:
        """Agree on features, register the address ranges (start, size) and read events.

        Raises OSError; `close` then undoes what was done. Nothing is protected yet: a scan is.
        """
        api = np.array([kernel.UFFD_API_VERSION, _FEATURES, 0], dtype=np.uint64)
        kernel.ioctl(self._descriptor, kernel.UFFDIO_API, api.ctypes.data)
        self._wake_descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._read_events, name="memory-events", daemon=True)
        self._thread.start()
        for start, size_bytes in ranges:
            register = np.array([start, size_bytes, kernel.UFFD_REGISTER_WP, 0], dtype=np.uint64)
            kernel.ioctl(self._descriptor, kernel.UFFDIO_REGISTER, register.ctypes.data)
            self._ranges.append((start, size_bytes))

    def take_removed(self) -> AddressRuns:
        """Return the ranges given back up to now, each in two calls running; not in order.

        Raises OSError when tracked memory was unmapped or moved.
        """
        with self._lock:
            if self._gone is not None:
                raise OSError(errno.EFAULT, self._gone)
            now = self._removed
            both = now + self._removed_before
            self._removed, self._removed_before = [], now
        return np.array(both, dtype=np.uint64).reshape(-1, 2)

    def close(self) -> None:
        """Undo all write protection and registration. Idempotent.

        Closing the descriptor alone does it too (that is what happens when we are killed), but
        under one lock that holds up every page fault of the target, for 50 ms per 2 GiB. So it is
        done piece by piece beforehand, a millisecond each.
        """
        self._unregister()
        thread, self._thread = self._thread, None
        if thread is not None:
            os.eventfd_write(self._wake_descriptor, 1)
            thread.join()
        for name in ("_descriptor", "_wake_descriptor"):
            descriptor: int = getattr(self, name)
            setattr(self, name, -1)
            if descriptor >= 0:
                os.close(descriptor)

    def _unregister(self) -> None:
        ranges, self._ranges = self._ranges, []
        for start, size_bytes in ranges:
            position, end = start, start + size_bytes
            while position < end:
                # Cut at round addresses, so that no huge page is split by it.
                following = min((position // _PIECE_BYTES + 1) * _PIECE_BYTES, end)
                piece = np.array([position, following - position], dtype=np.uint64)
                # Whatever fails (the target may be gone) is left to the closing.
                with suppress(OSError):
                    kernel.ioctl(self._descriptor, kernel.UFFDIO_UNREGISTER, piece.ctypes.data)
                position = following

    def _read_events(self) -> None:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        poll.register(self._wake_descriptor, select.POLLIN)
        while True:
            ready = dict(poll.poll())
            if self._wake_descriptor in ready:
                return
            if ready.get(self._descriptor, 0) & ~select.POLLIN:
                with self._lock:
                    self._gone = "its userfaultfd broke"
                return
            # Under the lock: once the message is read QEMU's thread goes on, and the guest may be
            # stopped and harvested before we have noted what we read.
            with self._lock:
                self._read_messages()

    def _read_messages(self) -> None:
        try:
            data = os.read(self._descriptor, _MESSAGE.size * _MESSAGES_PER_READ)
        except BlockingIOError:
            return
        except OSError as error:
            self._gone = f"its userfaultfd broke: {error}"
            return
        for event, start, end in _MESSAGE.iter_unpack(data):
            if event == _REMOVED:
                self._note_removed(start, end)
            elif event in (_UNMAPPED, _REMAPPED):
                self._gone = f"tracked memory at {start:#x} was unmapped or moved"

    def _note_removed(self, start: int, end: int) -> None:
        ranges = self._removed
        joins = bool(ranges) and ranges[-1][0] <= end and start <= ranges[-1][1]
        if joins or len(ranges) >= _RANGES_MAX:
            ranges[-1] = (min(start, ranges[-1][0]), max(end, ranges[-1][1]))
        else:
            ranges.append((start, end))


def userfaultfd_unavailable() -> str | None:
    """Return why this kernel cannot track writes asynchronously; None if it can."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK | kernel.UFFD_USER_MODE_ONLY
    try:
        descriptor = kernel.userfaultfd(flags)
    except OSError as error:
        return f"this kernel has no userfaultfd ({error.strerror})"
    try:
        # Asking for nothing answers with all that there is.
        api = np.array([kernel.UFFD_API_VERSION, 0, 0], dtype=np.uint64)
        kernel.ioctl(descriptor, kernel.UFFDIO_API, api.ctypes.data)
    except OSError as error:
        return f"userfaultfd: {error.strerror}"
    finally:
        os.close(descriptor)
    missing = _FEATURES & ~int(api[1])
    if missing:
        return f"userfaultfd lacks the features {missing:#x}: it needs Linux 6.7 or newer"
    return None
