"""The kernel calls Python lacks, with errno turned into OSError. Needs ptrace rights on the target.

Theory of operation: `ctypes.CDLL` gives up the interpreter lock around a call, `PyDLL` keeps it.
Memory copies give it up (they run for milliseconds); ptrace keeps it, because between two ptrace
calls the target stands still and must not wait for another Python thread's time slice.

Source: Linux uapi `linux/fs.h` (PAGEMAP_SCAN), `linux/userfaultfd.h`, `linux/ptrace.h`,
`asm-generic/unistd.h`, `asm-generic/mman-common.h`; process_vm_readv(2).
"""

import ctypes
import errno
import os
import platform
import select
from collections.abc import Sequence
from typing import Final

import numpy as np

_releasing = ctypes.CDLL(None, use_errno=True)
_keeping = ctypes.PyDLL(None, use_errno=True)

_ioctl = _releasing.ioctl
_ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
_ioctl.restype = ctypes.c_int

_syscall = _releasing.syscall
_syscall.restype = ctypes.c_long

_vm_read = _releasing.process_vm_readv
_vm_write = _releasing.process_vm_writev
for _call in (_vm_read, _vm_write):
    _call.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_ulong,
    ]
    _call.restype = ctypes.c_ssize_t

_ptrace = _keeping.ptrace
_ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_ptrace.restype = ctypes.c_long

PIDFD_GETFD_NUMBER: Final = 438  # the same on every architecture
PROCESS_MADVISE_NUMBER: Final = 440  # the same on every architecture
ADVICE_COLD: Final = 20  # MADV_COLD
IOVECS_PER_CALL: Final = 1024  # UIO_MAXIOV
USERFAULTFD_NUMBERS: Final = {"x86_64": 323, "aarch64": 282}

PAGEMAP_SCAN: Final = 0xC0606610
SCAN_WRITE_PROTECT: Final = 1  # PM_SCAN_WP_MATCHING
SCAN_CHECK_ASYNC: Final = 2  # PM_SCAN_CHECK_WPASYNC: EPERM where tracking is not set up
PAGE_IS_WRITTEN: Final = 1 << 1
PAGE_IS_PRESENT: Final = 1 << 3
PAGE_IS_SWAPPED: Final = 1 << 4

UFFDIO_API: Final = 0xC018AA3F
UFFDIO_REGISTER: Final = 0xC020AA00
UFFDIO_UNREGISTER: Final = 0x8010AA01
UFFD_API_VERSION: Final = 0xAA
UFFD_USER_MODE_ONLY: Final = 1
UFFD_REGISTER_WP: Final = 2


def _raise_errno(what: str) -> None:
    number = ctypes.get_errno()
    raise OSError(number, f"{what}: {os.strerror(number)}")


def ioctl(descriptor: int, request: int, address: int) -> int:
    """Run an ioctl on the structure at `address`; retried when a signal interrupts it."""
    while True:
        result: int = _ioctl(descriptor, request, address)
        if result >= 0:
            return result
        if ctypes.get_errno() != errno.EINTR:
            _raise_errno(f"ioctl {request:#x}")


def pidfd_getfd(pidfd: int, descriptor: int) -> int:
    """Return a duplicate (close-on-exec) of the target's `descriptor`."""
    result: int = _syscall(
        ctypes.c_long(PIDFD_GETFD_NUMBER),
        ctypes.c_long(pidfd),
        ctypes.c_long(descriptor),
        ctypes.c_long(0),
    )
    if result < 0:
        _raise_errno("pidfd_getfd")
    return result


def process_ended(pidfd: int) -> bool:
    """Return whether the process has ended (it may still be unreaped)."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def userfaultfd(flags: int) -> int:
    """Return a userfaultfd for our own memory (to learn what the kernel offers)."""
    number = USERFAULTFD_NUMBERS.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"userfaultfd of {platform.machine()} is not known here")
    result: int = _syscall(ctypes.c_long(number), ctypes.c_long(flags))
    if result < 0:
        _raise_errno("userfaultfd")
    return result


def process_vm_copy(
    pid: int, local: int, local_count: int, remote: int, remote_count: int, *, write: bool
) -> int:
    """Copy between our iovecs at `local` and the target's at `remote`; returns bytes copied."""
    call = _vm_write if write else _vm_read
    result: int = call(pid, local, local_count, remote, remote_count, 0)
    if result < 0:
        _raise_errno("process_vm_writev" if write else "process_vm_readv")
    return result


def advise_cold(pidfd: int, addresses: Sequence[int], size_bytes: int) -> None:
    """Tell the kernel that `size_bytes` at each of the target's addresses are not in use now.

    That is nearly all it does, but a huge page of which only a part is named is split.
    """
    for start in range(0, len(addresses), IOVECS_PER_CALL):
        part = addresses[start : start + IOVECS_PER_CALL]
        vector = np.empty((len(part), 2), dtype=np.uint64)
        vector[:, 0], vector[:, 1] = part, size_bytes
        result: int = _syscall(
            ctypes.c_long(PROCESS_MADVISE_NUMBER),
            ctypes.c_long(pidfd),
            ctypes.c_void_p(vector.ctypes.data),
            ctypes.c_long(len(part)),
            ctypes.c_long(ADVICE_COLD),
            ctypes.c_long(0),
        )
        if result < 0:
            _raise_errno("process_madvise")


def ptrace(request: int, pid: int, address: int = 0, data: int = 0) -> int:
    """Run a ptrace request whose result is not data (raw PEEK requests do not fit)."""
    result: int = _ptrace(request, pid, address, data)
    if result < 0:
        _raise_errno(f"ptrace {request:#x}")
    return result
