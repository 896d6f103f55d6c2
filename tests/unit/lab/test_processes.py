"""Processes that outlive their starter and are found again for certain."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast_lab import processes
from holdfast_lab.processes import Process, end, is_alive, send_signal, spawn


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_a_process_is_alive_until_it_is_ended(tmp_path: Path) -> None:
    process = spawn(["sleep", "60"], log=tmp_path / "log")
    assert is_alive(process)
    end(process, grace_seconds=5)
    assert not is_alive(process)
    assert not Path(f"/proc/{process.pid}").exists(), "it stayed a zombie"


def test_a_process_that_ends_by_itself_is_not_alive(tmp_path: Path) -> None:
    process = spawn(["true"], log=tmp_path / "log")
    assert eventually(lambda: not is_alive(process))


def test_a_process_that_does_not_listen_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = spawn(["sh", "-c", "trap '' TERM; echo deaf; while :; do sleep 1; done"], log=log)
    assert eventually(lambda: log.read_text() == "deaf\n")
    end(process, grace_seconds=0.1)
    assert not is_alive(process)


def test_a_dead_process_that_its_parent_does_not_reap_is_not_alive(tmp_path: Path) -> None:
    log = tmp_path / "log"
    parent = spawn(["sh", "-c", "sleep 0 & echo $!; exec sleep 60"], log=log)
    assert eventually(lambda: log.read_text().endswith("\n"))
    pid = int(log.read_text())
    assert eventually(lambda: processes._state(pid) == "Z")
    started_ticks = processes._started_ticks(pid)
    assert started_ticks is not None
    assert not is_alive(Process(pid=pid, started_ticks=started_ticks))
    end(parent, grace_seconds=0)


def test_another_process_with_the_same_id_is_left_alone(tmp_path: Path) -> None:
    process = spawn(["sleep", "60"], log=tmp_path / "log")
    former = Process(pid=process.pid, started_ticks=process.started_ticks - 1)
    assert not is_alive(former)
    send_signal(former, signal.SIGKILL)
    end(former, grace_seconds=0)
    assert is_alive(process)
    end(process, grace_seconds=0)


def test_it_gets_its_descriptors_a_quiet_input_and_no_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    log = tmp_path / "log"
    reading, writing = os.pipe()
    try:
        process = spawn(
            ["sh", "-c", 'echo "[$(cat)] [$HTTPS_PROXY] [$EXTRA]"; echo heard >&3'],
            log=log,
            environment={"EXTRA": "given"},
            inherit=[writing],
        )
        os.close(writing)
        assert os.read(reading, 100) == b"heard\n"
    finally:
        os.close(reading)
    assert eventually(lambda: not is_alive(process))
    assert log.read_text() == "[] [] [given]\n"


def test_we_know_ourselves() -> None:
    assert is_alive(processes.this_process())


def test_a_process_stands_with_all_its_threads_when_stopping_it_returns(tmp_path: Path) -> None:
    program = """
import os, threading
def work():
    while True:
        os.fsync(file.fileno())
file = open("busy", "w")
for _ in range(4):
    threading.Thread(target=work).start()
print("works", flush=True)
"""
    log = tmp_path / "log"
    process = spawn(["env", "-C", str(tmp_path), sys.executable, "-c", program], log=log)
    try:
        assert eventually(lambda: log.read_text() == "works\n")
        for _ in range(20):
            processes.stop(process)
            assert processes._thread_states(process.pid) == "TTTTT"
            send_signal(process, signal.SIGCONT)
    finally:
        end(process, grace_seconds=0)


def test_stopping_a_process_that_is_dead_returns_at_once(tmp_path: Path) -> None:
    process = spawn(["true"], log=tmp_path / "log")
    assert eventually(lambda: not is_alive(process))
    processes.stop(process)
    assert processes._thread_states(process.pid) == ""
