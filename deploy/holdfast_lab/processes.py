"""Starts processes that outlive their starter and finds them again by id and start time.

Spawns, signals and reaps; reads /proc.

A process id alone is not proof: ids are used again. Together with the start time that the kernel
notes it names one process for as long as the machine runs, so a record on disk can be trusted by
another command of the lab, hours later.
"""

import contextlib
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from holdfast_lab.errors import LabTimedOut
from holdfast_lab.namespaces import NETNS_FOLDER

POLL_SECONDS = 0.002
ENTER_SECONDS = 10.0
FIRST_INHERITED = 3
"""Inherited descriptors are numbered from here in the new process, as systemd does it."""


class Process(BaseModel):
    """One process, for certain."""

    model_config = ConfigDict(frozen=True)

    pid: int
    started_ticks: int
    """Field 22 of /proc/PID/stat: clock ticks after boot."""


def spawn(
    argv: Sequence[str],
    *,
    log: Path,
    namespace: str | None = None,
    environment: Mapping[str, str] | None = None,
    inherit: Sequence[int] = (),
) -> Process:
    """Start a program in a session of its own, its output appended to `log`.

    Returns when it is inside `namespace`, if given. There it also sees that namespace's /sys. The
    descriptors `inherit` become 3, 4, ... there and stay the caller's here. Nothing ends the
    process but its owner.
    """
    command = [*(("ip", "netns", "exec", namespace) if namespace else ()), *argv]
    log.parent.mkdir(parents=True, exist_ok=True)
    actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    actions += [
        (os.POSIX_SPAWN_DUP2, descriptor, FIRST_INHERITED + index)
        for index, descriptor in enumerate(inherit)
    ]
    pid = os.posix_spawnp(
        command[0],
        command,
        {**_own_environment(), "PYTHONUNBUFFERED": "1", **(environment or {})},
        file_actions=actions,
        setsid=True,
        setsigmask=[],
        # Python ignores SIGPIPE, and an ignored signal stays ignored in a new program.
        setsigdef=[signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGHUP],
    )
    started_ticks = _started_ticks(pid)
    # Even if it has ended by now: it is our child and not reaped, so /proc still has it.
    assert started_ticks is not None
    process = Process(pid=pid, started_ticks=started_ticks)
    if namespace is not None:
        _wait_inside(process, namespace)
    return process


def _wait_inside(process: Process, namespace: str) -> None:
    """Wait until a process has entered its namespace: who clears it before would miss it."""
    wanted = (NETNS_FOLDER / namespace).stat().st_ino
    deadline = time.monotonic() + ENTER_SECONDS
    while is_alive(process) and time.monotonic() < deadline:
        with contextlib.suppress(OSError):  # it ends just now
            if Path(f"/proc/{process.pid}/ns/net").stat().st_ino == wanted:
                return
        time.sleep(POLL_SECONDS)


def _own_environment() -> dict[str, str]:
    """Return ours without the machine's proxies: inside a lab there is no way to them."""
    return {
        name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")
    }


def this_process() -> Process:
    """Return the caller itself."""
    started_ticks = _started_ticks(os.getpid())
    assert started_ticks is not None
    return Process(pid=os.getpid(), started_ticks=started_ticks)


def is_alive(process: Process) -> bool:
    """Tell whether the process still runs; one that is dead but not reaped does not."""
    _reap(process)
    return _started_ticks(process.pid) == process.started_ticks and _state(process.pid) not in "ZX"


def send_signal(process: Process, number: signal.Signals) -> None:
    """Send a signal if the process is still the same one."""
    if is_alive(process):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def stop(process: Process, *, deadline_seconds: float = 10.0) -> None:
    """Stop a process where it is (SIGSTOP); returns when none of its threads runs any more.

    The signal alone is no more than an order: a thread on its way through the kernel takes its
    time. Raises LabTimedOut if one does not stand by the deadline; the order is not taken back.
    """
    send_signal(process, signal.SIGSTOP)
    deadline = time.monotonic() + deadline_seconds
    while is_alive(process) and not set(_thread_states(process.pid)) <= set("TtZX"):
        if time.monotonic() > deadline:
            raise LabTimedOut(f"process {process.pid} runs on after {deadline_seconds:.0f} s")
        time.sleep(POLL_SECONDS)


def end(process: Process, *, grace_seconds: float, deadline_seconds: float = 10.0) -> None:
    """End a process: by SIGTERM, after `grace_seconds` by SIGKILL; returns when it is gone.

    Raises LabTimedOut if it survives even that for `deadline_seconds`.
    """
    if grace_seconds > 0:
        send_signal(process, signal.SIGTERM)
        if _wait_gone(process, grace_seconds):
            return
    send_signal(process, signal.SIGKILL)
    if not _wait_gone(process, deadline_seconds):
        raise LabTimedOut(f"process {process.pid} did not end within {deadline_seconds:.0f} s")


def _wait_gone(process: Process, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_alive(process):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _reap(process: Process) -> None:
    """Take the status of a dead child, if it is ours: else it would stay a zombie."""
    if _started_ticks(process.pid) == process.started_ticks:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process.pid, os.WNOHANG)


def _stat_fields(pid: int | str) -> list[str]:
    """Return the fields of /proc/PID/stat from the third on; empty when there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    # The second field is the program's name, in brackets, and may hold blanks and brackets itself.
    return text.rpartition(")")[2].split()


def _started_ticks(pid: int) -> int | None:
    fields = _stat_fields(pid)
    return int(fields[19]) if fields else None


def _state(pid: int | str) -> str:
    fields = _stat_fields(pid)
    return fields[0] if fields else "X"


def _thread_states(pid: int) -> str:
    """Return the kernel's letter for each thread of a process; empty when there is none."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
    except FileNotFoundError:
        return ""
    return "".join(_state(f"{pid}/task/{thread.name}") for thread in threads)
