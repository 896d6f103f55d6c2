"""Fixtures of the command's tests: `main` in this process, the program in another one."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest
from tests.unit.api.canned import FakeController

from holdfast_api.cli.main import main

PROGRAM = (sys.executable, "-m", "holdfast_api.cli.main")
END_SECONDS_MAX = 60.0


@dataclass(frozen=True)
class Result:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str


Spawn = Callable[..., "subprocess.Popen[str]"]


class Run(Protocol):
    """Runs `holdfast` in this process."""

    def __call__(self, *arguments: str, url: str | None = None) -> Result: ...


@pytest.fixture
def controller() -> Iterator[FakeController]:
    """One controller, a real HTTP server."""
    started = FakeController()
    try:
        started.start()
        yield started
    finally:
        started.stop()


@pytest.fixture
def holdfast(
    controller: FakeController,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Run the command against `controller`, or against another URL."""

    def run(*arguments: str, url: str | None = None) -> Result:
        monkeypatch.setenv("HOLDFAST_URL", url or controller.url)
        monkeypatch.setattr(sys, "argv", ["holdfast", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        code = ended.value.code
        return Result(int(code) if isinstance(code, int) else 0, out, err)

    return run


@pytest.fixture
def spawn(controller: FakeController, tmp_path: Path) -> Iterator[Spawn]:
    """Start the program itself; it is ended after the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
        environment = os.environ | {"HOLDFAST_URL": controller.url, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            [*PROGRAM, *arguments],
            env=environment,
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait(END_SECONDS_MAX)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
