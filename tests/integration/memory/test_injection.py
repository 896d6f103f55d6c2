"""A process that is made to run a system call must not notice, and must survive."""

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast_agent.memory import kernel
from holdfast_agent.memory.errors import InjectionFailed
from holdfast_agent.memory.injection import StoppedProcess, open_userfaultfd, run_in_process

PATIENCE_S = 10.0
GETPID = {"x86_64": 39, "aarch64": 172}[os.uname().machine]
POLL_S = 0.001


def getpid(target: StoppedProcess) -> int:
    return target.call(GETPID)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(POLL_S)


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def sleeps_in_call(pid: int) -> bool:
    """Whether the process sleeps interruptibly in a system call."""
    return state_of(pid) == "S"


def descriptors(pid: int) -> list[str]:
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(str(entry.readlink()))
        except FileNotFoundError:
            continue
    return sorted(found)


def traced(pid: int) -> bool:
    return "TracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text()


def test_the_call_runs_in_the_other_process(start_target: Any) -> None:
    target = start_target(("ram", 4, "private"))
    assert run_in_process(target.pid, getpid, PATIENCE_S) == target.pid
    assert not traced(target.pid)


def test_a_refused_call_raises_what_the_kernel_said(start_target: Any) -> None:
    target = start_target(("ram", 4, "private"))
    bad_descriptor = 1 << 20
    close = {"x86_64": 3, "aarch64": 57}[os.uname().machine]
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        run_in_process(target.pid, lambda it: it.call(close, bad_descriptor), PATIENCE_S)
    assert caught.value.errno == errno.EBADF
    assert run_in_process(target.pid, getpid, PATIENCE_S) == target.pid


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("poll", [0, 0]),
        ("ppoll", [0, 0]),
        ("nanosleep", [0, 0]),
        ("epoll_wait", [0, 0]),
        ("sigtimedwait", [-1, errno.EAGAIN]),
    ],
)
def test_a_process_waiting_in_a_call_waits_on(
    start_target: Any, call: str, expected: list[int]
) -> None:
    target = start_target(("ram", 4, "private"))
    target.begin(do="wait", call=call, ms=400)
    target.finish()
    until(lambda: sleeps_in_call(target.pid))
    for _ in range(20):
        assert run_in_process(target.pid, getpid, PATIENCE_S) == target.pid
    assert target.finish() == expected


def test_a_process_waiting_for_input_still_gets_it(start_target: Any) -> None:
    target = start_target(("ram", 4, "private"))
    target.begin(do="wait", call="read", ms=0)
    target.finish()
    until(lambda: sleeps_in_call(target.pid))
    for _ in range(20):
        run_in_process(target.pid, getpid, PATIENCE_S)
    target.process.stdin.write(b"x")
    target.process.stdin.flush()
    assert target.finish() == [1, 0]


def test_a_process_that_computes_is_put_back_exactly(start_target: Any) -> None:
    target = start_target(("ram", 512, "private"))
    target.run(do="write", block="ram", pages=list(range(512)), value=1)
    for _ in range(20):
        target.begin(do="read", block="ram", pages=[0] * 20_000 + list(range(1, 512)))
        run_in_process(target.pid, getpid, PATIENCE_S)
        assert target.finish() == 20_000


def test_signals_that_come_meanwhile_arrive_once_each(start_target: Any) -> None:
    target = start_target(("ram", 4, "private"))
    target.run(do="catch", number=int(signal.SIGUSR1))
    sent = 0
    for _ in range(30):
        stop = threading.Event()

        def storm(stop: threading.Event = stop) -> None:
            os.kill(target.pid, signal.SIGUSR1)
            stop.set()

        thread = threading.Thread(target=storm)
        thread.start()
        run_in_process(target.pid, getpid, PATIENCE_S)
        thread.join()
        sent += 1
        until(lambda sent=sent: len(target.run(do="signals")) >= sent)  # type: ignore[misc]
    assert len(target.run(do="signals")) == sent


def test_a_signal_sent_while_it_stands_is_not_lost_nor_seen_early(start_target: Any) -> None:
    target = start_target(("ram", 4, "private"))
    target.run(do="catch", number=int(signal.SIGUSR1))
    target.begin(do="wait", call="ppoll", ms=20_000)
    target.finish()
    until(lambda: sleeps_in_call(target.pid))

    def with_signal(it: StoppedProcess) -> int:
        os.kill(it.pid, signal.SIGUSR1)
        return it.call(GETPID)

    assert run_in_process(target.pid, with_signal, PATIENCE_S) == target.pid
    assert target.finish() == [-1, errno.EINTR]  # by the signal, as without us
    assert target.run(do="signals") == [signal.SIGUSR1]


def test_a_blocked_signal_stays_blocked(start_target: Any) -> None:
    target = start_target(("ram", 4, "private"))
    mask = Path(f"/proc/{target.pid}/status").read_text().split("SigBlk:\t")[1].split()[0]
    target.begin(do="wait", call="ppoll", ms=300)  # waits with SIGUSR2 blocked
    target.finish()
    until(lambda: sleeps_in_call(target.pid))
    run_in_process(target.pid, getpid, PATIENCE_S)
    assert target.finish() == [0, 0]
    after = Path(f"/proc/{target.pid}/status").read_text().split("SigBlk:\t")[1].split()[0]
    assert after == mask


def test_a_stopped_process_can_be_used_and_stays_stopped(start_target: Any) -> None:
    target = start_target(("ram", 4, "private"))
    os.kill(target.pid, signal.SIGSTOP)
    until(lambda: state_of(target.pid) == "T")
    assert run_in_process(target.pid, getpid, PATIENCE_S) == target.pid
    until(lambda: state_of(target.pid) == "T")
    os.kill(target.pid, signal.SIGCONT)
    assert target.run(do="signals") == []


def test_a_stop_signal_that_comes_meanwhile_stops_it_afterwards(start_target: Any) -> None:
    target = start_target(("ram", 4, "private"))

    def with_stop(it: StoppedProcess) -> int:
        os.kill(it.pid, signal.SIGSTOP)
        return it.call(GETPID)

    assert run_in_process(target.pid, with_stop, PATIENCE_S) == target.pid
    until(lambda: state_of(target.pid) == "T")
    os.kill(target.pid, signal.SIGCONT)
    assert target.run(do="signals") == []


def test_a_process_that_dies_while_it_stands_is_reported(start_target: Any) -> None:
    target = start_target(("ram", 4, "private"))

    def deadly(it: StoppedProcess) -> int:
        os.kill(it.pid, signal.SIGKILL)
        return it.call(GETPID)

    with pytest.raises(InjectionFailed, match=r"died|gone"):
        run_in_process(target.pid, deadly, PATIENCE_S)
    # Its end is still there for the one who started it.
    assert target.process.wait(PATIENCE_S) == -signal.SIGKILL


def test_the_parent_of_a_process_that_dies_while_it_stands_learns_of_it() -> None:
    script = (
        "import subprocess, sys\n"
        "child = subprocess.Popen(['/bin/sleep', '1000'])\n"
        "print(child.pid, flush=True)\n"
        "print(child.wait(), flush=True)\n"
    )

    def deadly(it: StoppedProcess) -> int:
        os.kill(it.pid, signal.SIGKILL)
        return it.call(GETPID)

    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        try:
            # A parent goes on when exec has begun, before the new program is wholly there.
            until(lambda: sleeps_in_call(child))
            with pytest.raises(InjectionFailed, match=r"died|gone"):
                run_in_process(child, deadly, PATIENCE_S)
        except BaseException:
            os.kill(child, signal.SIGKILL)  # the parent waits for it
            raise
        assert int(parent.stdout.readline()) == -signal.SIGKILL


def test_a_signal_on_its_way_when_we_come_is_delivered(
    start_target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = start_target(("ram", 4, "private"))
    target.run(do="catch", number=int(signal.SIGUSR1))
    target.begin(do="wait", call="ppoll", ms=20_000)
    target.finish()
    until(lambda: sleeps_in_call(target.pid))
    interrupt, real = 0x4207, kernel.ptrace

    def with_signal_before(request: int, pid: int, address: int = 0, data: int = 0) -> int:
        if request == interrupt:
            os.kill(pid, signal.SIGUSR1)
            until(lambda: state_of(pid) == "t")  # it stands at the delivery of the signal
        return real(request, pid, address, data)

    monkeypatch.setattr(kernel, "ptrace", with_signal_before)
    assert run_in_process(target.pid, getpid, PATIENCE_S) == target.pid
    assert target.finish() == [-1, errno.EINTR]
    assert target.run(do="signals") == [signal.SIGUSR1]


def test_a_process_that_does_not_exist_is_a_clear_error(start_target: Any) -> None:
    target = start_target(("ram", 4, "private"))
    target.end()
    with pytest.raises(InjectionFailed, match="does not exist"):
        run_in_process(target.pid, getpid, PATIENCE_S)


def test_what_the_job_raises_comes_through_and_the_process_runs_on(start_target: Any) -> None:
    target = start_target(("ram", 4, "private"))

    def broken(it: StoppedProcess) -> int:
        raise LookupError(it.pid)

    with pytest.raises(LookupError):
        run_in_process(target.pid, broken, PATIENCE_S)
    assert not traced(target.pid)
    assert target.run(do="signals") == []


def test_a_process_under_a_debugger_is_refused_by_name(start_target: Any) -> None:
    target = start_target(("ram", 4, "private"))
    script = (
        "import ctypes, sys\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        f"assert libc.ptrace(0x4206, {target.pid}, None, None) == 0\n"
        "print('tracing', flush=True)\n"
        "sys.stdin.read()\n"
    )
    debugger = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert debugger.stdout is not None
        assert debugger.stdout.readline() == b"tracing\n"
        with pytest.raises(InjectionFailed, match=f"process {debugger.pid} traces it"):
            run_in_process(target.pid, getpid, PATIENCE_S)
    finally:
        debugger.communicate()
    assert run_in_process(target.pid, getpid, PATIENCE_S) == target.pid


def test_a_process_that_cannot_stop_in_time_is_let_go(tmp_path: Path) -> None:
    # The parent of a vfork cannot be interrupted until its child has opened the pipe.
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    script = (
        "import os\n"
        f"opening = [(os.POSIX_SPAWN_OPEN, 0, {str(pipe)!r}, os.O_RDONLY, 0)]\n"
        "print('spawning', flush=True)\n"
        "pid = os.posix_spawn('/bin/true', ['true'], {}, file_actions=opening)\n"
        "print(os.waitpid(pid, 0)[1], flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"spawning\n"
        until(lambda: state_of(parent.pid) == "D")
        with pytest.raises(InjectionFailed, match="did not stop in time"):
            run_in_process(parent.pid, getpid, timeout_s=0.1)
        until(lambda: not traced(parent.pid))
        os.close(os.open(pipe, os.O_WRONLY))
        assert parent.stdout.readline() == b"0\n"
    assert parent.returncode == 0


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the filter is written for x86-64")
def test_a_seccomp_filter_that_kills_does_not_kill(start_target: Any) -> None:
    target = start_target(("ram", 4, "private"))
    assert target.run(do="refuse_userfaultfd") == 0
    descriptor = open_userfaultfd(target.pid)
    os.close(descriptor)
    assert target.run(do="signals") == []


def test_our_descriptor_is_the_only_one(start_target: Any) -> None:
    target = start_target(("ram", 4, "private"))
    before = descriptors(target.pid)
    descriptor = open_userfaultfd(target.pid)
    try:
        assert "userfaultfd" in Path(f"/proc/self/fd/{descriptor}").readlink().name
        assert not os.get_inheritable(descriptor)
        assert stat.S_IFMT(os.fstat(descriptor).st_mode) == 0  # an anonymous inode
        assert descriptors(target.pid) == before
    finally:
        os.close(descriptor)
    assert descriptors(target.pid) == before
