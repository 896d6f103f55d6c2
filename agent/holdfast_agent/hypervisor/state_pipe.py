"""A pipe too small for the device state that QEMU saves into it: QEMU stands until we have read.

Owns the reading end; QEMU holds writing ends only. Talks to the kernel alone.

Theory of operation. `xen-save-devices-state` stops a running guest, saves, and lets the guest run
again by itself: one command instead of three. But the guest must not run before its dirty pages
are copied. So QEMU is given a pipe with less room than the state has bytes. It fills the pipe,
then stands in `write`, the guest with it, until we read the rest. If the state turns out to have
fitted into the pipe, nothing held QEMU back and the guest may have run too early: `held_back`
tells, and such a capture is no checkpoint. A state's size hardly ever changes, so the pipe takes
the largest size that stays below the last one: QEMU has then done all its work but the last write.

If we die, the reading end is gone, QEMU's write fails, and QEMU lets the guest run again.

The writing end that QEMU got as a descriptor is opened anew by QEMU through `/proc/self/fd/N`
(an fdset will not do: QEMU would truncate it, which a pipe refuses). It opens with QEMU's own
rights, hence the change of owner.

Source: QEMU 7.2 `migration/savevm.c` (qmp_xen_save_devices_state), pipe(7), fcntl(2).
"""

import contextlib
import fcntl
import os

SET_PIPE_SIZE = 1031  # F_SETPIPE_SZ, linux/fcntl.h
SMALLEST_BYTES = 4096
LARGEST_BYTES = 1 << 20
"""What an unprivileged process may ask for by default."""
READ_BYTES = 1 << 20


class StatePipe:
    """One pipe for one state after the other. Not thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        """Open it; keep at most `limit_bytes` of one state (the rest is read and dropped)."""
        self._limit_bytes = limit_bytes
        self._reading, self.writing = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._reading, False)
        self._capacity_bytes = fcntl.fcntl(self._reading, SET_PIPE_SIZE, SMALLEST_BYTES)
        self._chunks: list[bytes] = []
        self.received_bytes = 0
        """Of the state that is being saved, as far as read."""

    def hand_over(self, owner: int) -> None:
        """QEMU, of user `owner`, has its own writing end now: close ours."""
        with contextlib.suppress(PermissionError):
            os.fchown(self.writing, owner, -1)
        os.close(self.writing)
        self.writing = -1

    def fileno(self) -> int:
        """Return the descriptor that is readable once QEMU has written something."""
        return self._reading

    def begin(self) -> None:
        """Forget the last state and what is left of it; fit the size of the pipe to its size."""
        self.drain()
        wanted = fitting_bytes(self.received_bytes)
        if self.received_bytes and wanted != self._capacity_bytes:
            with contextlib.suppress(OSError):
                self._capacity_bytes = fcntl.fcntl(self._reading, SET_PIPE_SIZE, wanted)
        self._chunks.clear()
        self.received_bytes = 0

    def drain(self) -> None:
        """Read all that is there, never waiting: whoever does it lets QEMU go on."""
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self._reading, READ_BYTES):
                if self.received_bytes <= self._limit_bytes:
                    self._chunks.append(chunk)
                self.received_bytes += len(chunk)

    @property
    def held_back(self) -> bool:
        """Whether QEMU can not have ended its save before the first `drain`."""
        return self.received_bytes > self._capacity_bytes

    def state(self) -> bytes:
        """Return what was read of the state."""
        return b"".join(self._chunks)

    def close(self) -> None:
        """Close our ends. Idempotent."""
        for name in ("_reading", "writing"):
            descriptor: int = getattr(self, name)
            setattr(self, name, -1)
            if descriptor >= 0:
                os.close(descriptor)


def fitting_bytes(state_bytes: int) -> int:
    """Return the largest size of a pipe that a state of `state_bytes` does not fit into."""
    size = SMALLEST_BYTES
    while size * 2 < min(state_bytes, LARGEST_BYTES + 1):
        size *= 2
    return size
