"""Processes by pid *and* start time, so that a reused pid is never taken for its predecessor.

Reads /proc; sends signals only to a process that is still the one meant.
"""

import os
import select
import signal
from pathlib import Path


def start_ticks_of(pid: int) -> int:
    """Return the start time of `pid` in clock ticks since boot; 0 when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    fields = stat[stat.rindex(")") + 2 :].split()
    if fields[0] in ("Z", "X"):
        return 0  # dead already; only its parent has not looked yet
    return int(fields[19])


def is_alive(pid: int, start_ticks: int) -> bool:
    """Return whether the process that had this pid at that start time still runs."""
    return pid > 0 and start_ticks > 0 and start_ticks_of(pid) == start_ticks


def wait_for_end(pidfd: int, timeout_seconds: float) -> bool:
    """Return whether the process of a pidfd has ended, waiting so long for it at most."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(timeout_seconds * 1000))


def kill_and_wait(pid: int, start_ticks: int, timeout_seconds: float = 5.0) -> bool:
    """SIGKILL the process if it is still the one meant; return whether it is gone.

    A child of ours is gone when it is dead; reaping it is its owner's business.
    """
    if not is_alive(pid, start_ticks):
        return True
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        if not is_alive(pid, start_ticks):
            return True
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        return wait_for_end(descriptor, timeout_seconds)
    except ProcessLookupError:
        return True
    finally:
        os.close(descriptor)
