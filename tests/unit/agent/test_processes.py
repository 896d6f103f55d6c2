"""Processes by pid and start time, with real ones."""

import os
import subprocess
from collections.abc import Iterator

import pytest

from holdfast_agent.host.processes import is_alive, kill_and_wait, start_ticks_of


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def test_a_process_lives_at_its_own_start_time_only(child: subprocess.Popen[bytes]) -> None:
    ticks = start_ticks_of(child.pid)
    assert ticks > 0
    assert is_alive(child.pid, ticks)
    assert not is_alive(child.pid, ticks + 1)
    assert not is_alive(child.pid, 0)
    assert not is_alive(0, 0)


def test_killing_ends_the_process_meant(child: subprocess.Popen[bytes]) -> None:
    ticks = start_ticks_of(child.pid)
    assert kill_and_wait(child.pid, ticks)
    assert not is_alive(child.pid, ticks)
    assert child.wait(5) == -9
    assert kill_and_wait(child.pid, ticks)


def test_a_pid_that_was_used_again_is_left_alone(child: subprocess.Popen[bytes]) -> None:
    assert kill_and_wait(child.pid, start_ticks_of(child.pid) + 1)
    assert child.poll() is None


def test_a_dead_child_that_nobody_reaped_is_not_alive(child: subprocess.Popen[bytes]) -> None:
    ticks = start_ticks_of(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert start_ticks_of(child.pid) == 0
    assert not is_alive(child.pid, ticks)


def test_a_name_with_blanks_and_brackets_does_not_confuse() -> None:
    script = (
        "import ctypes,sys; ctypes.CDLL(None).prctl(15, b') R 1 (x'); print(flush=True); input()"
    )
    with subprocess.Popen(
        ["python3", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        ticks = start_ticks_of(process.pid)
        assert abs(ticks - start_ticks_of(os.getpid())) < 100 * 3600 * 24
        assert is_alive(process.pid, ticks)
        process.kill()


def test_a_process_that_never_was_is_not_alive() -> None:
    assert start_ticks_of(2**22 + 1) == 0
