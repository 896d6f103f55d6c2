"""The witness of the fault campaign: a process that judges what passes a lab's switch.

    python -m tests.chaos.witness --namespace hf-NAME-switch --report FILE

Needs root. Feeds `wire.Wire` from `capture.Capture`, takes commands on its standard input (a JSON
object a line) and writes its report, whole or not at all, once a second, when asked to, and at the
end. It ends when its input does, so also when its owner dies, or by SIGTERM.

A command counts from the frames on that enter after it was taken; those that wait are judged
before it, and who gives one waits until it is taken. Drops are asked for before every batch of
frames: a frame that found the queue full is noticed before what came behind it is judged.

`Witness` is the owner's side. End it before the lab goes down: it keeps the switch's namespace.
"""

import argparse
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.chaos.capture import Capture
from tests.chaos.wire import Wire

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 30.0
ANSWER_SECONDS = 60.0
END_SECONDS = 60.0
POLL_SECONDS = 0.01
REPORT_SECONDS = 1.0
BATCH_FRAMES = 128
DRAIN_SECONDS = 20.0
COMMAND_BYTES_MAX = 64 << 10
LOG_BYTES_SHOWN = 4000


class WitnessDied(Exception):  # noqa: N818 - reads as a sentence where it is raised
    """The witness ended by itself or does not answer: what it would have seen is not known."""


@dataclass(frozen=True)
class Testimony:
    """What a witness saw. `violations` are the first ones; the summary has the number of all."""

    summary: dict[str, int]
    violations: list[str]
    kernel_drops: int


class Witness:
    """The owner's side: starts a witness, tells it what it can not see, ends it."""

    def __init__(self, namespace: str, folder: Path) -> None:
        """Start it at a switch's namespace; it listens when this returns. Raises WitnessDied.

        Leaves `witness.json` and `witness.log` in `folder`.
        """
        self._report = folder / "witness.json"
        self._log = folder / "witness.log"
        self._asked = 0
        self._last: Testimony | None = None
        self._report.unlink(missing_ok=True)
        argv = [sys.executable, "-m", "tests.chaos.witness"]
        argv += ["--namespace", namespace, "--report", str(self._report)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=log, stderr=log
            )
        try:
            self._wait_report(0, START_SECONDS)
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close; what was raised inside is not covered up."""
        if kind is None:
            self.close()
        else:
            self._end()

    def name_guest(self, address: str, vm: str) -> None:
        """Say which VM speaks with this address, from now on. Raises WitnessDied."""
        self._tell({"do": "name-guest", "address": address, "vm": vm})
        self.read()

    def declare_lost(self, address: str) -> None:
        """Say that nothing may come from this address any more. Raises WitnessDied."""
        self._tell({"do": "declare-lost", "address": address})
        self.read()

    def read(self) -> Testimony:
        """Return what it saw until now. Raises WitnessDied."""
        if self._last is not None:
            return self._last
        self._asked += 1
        self._tell({"do": "report", "number": self._asked})
        return self._wait_report(self._asked, ANSWER_SECONDS)

    def close(self) -> Testimony:
        """End it and return all that it saw. Idempotent. Raises WitnessDied."""
        if self._last is not None:
            return self._last
        self._check_alive()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            status = self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired as error:
            self._end()
            raise WitnessDied(f"it did not end within {END_SECONDS} s; {self._tail()}") from error
        if status != 0:
            raise WitnessDied(f"it ended with status {status}: {self._tail()}")
        self._last = self._wait_report(self._asked, 0)
        return self._last

    def _end(self) -> None:
        """End the process, whatever it does. Idempotent."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(1 if self._process.poll() is None else 0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _tell(self, command: dict[str, Any]) -> None:
        self._check_alive()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise WitnessDied(f"it takes no commands: {error}; {self._tail()}") from error

    def _check_alive(self) -> None:
        status = self._process.poll()
        if status is not None:
            self._end()
            raise WitnessDied(f"it ended by itself with status {status}: {self._tail()}")

    def _wait_report(self, number: int, seconds: float) -> Testimony:
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(FileNotFoundError):
                report = json.loads(self._report.read_text())
                if report.pop("number") >= number:
                    return Testimony(**report)
            self._check_alive()
            if time.monotonic() > deadline:
                raise WitnessDied(f"no report within {seconds} s; {self._tail()}")
            time.sleep(POLL_SECONDS)

    def _tail(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return self._log.read_bytes()[-LOG_BYTES_SHOWN:].decode(errors="replace")
        return "it left no log"


class _Sitting:
    """The witness's own side: until its input ends."""

    def __init__(self, capture: Capture, report: Path, wake: socket.socket) -> None:
        self._capture = capture
        self._path = report
        self._wake = wake
        self._wire = Wire()
        self._drops = 0
        self._number = 0
        self._unread = b""

    def run(self) -> None:
        """Judge until the input ends or a signal comes; then what still waits, and report."""
        poller = select.poll()
        for descriptor in (self._capture.fileno(), sys.stdin.fileno(), self._wake.fileno()):
            poller.register(descriptor, select.POLLIN)
        self._write_report()
        due = time.monotonic() + REPORT_SECONDS
        goes_on = True
        while goes_on:
            ready = {fd for fd, _ in poller.poll(max(0, due - time.monotonic()) * 1000)}
            if self._wake.fileno() in ready:
                goes_on = False
            elif sys.stdin.fileno() in ready:
                goes_on = self._hear()
            else:
                self._judge_batch()
            if time.monotonic() >= due:
                self._write_report()
                due = time.monotonic() + REPORT_SECONDS
        self._drain()
        self._write_report()

    def _hear(self) -> bool:
        """Carry out commands; return False at the end of the input."""
        piece = os.read(sys.stdin.fileno(), COMMAND_BYTES_MAX)
        self._drain()
        *lines, self._unread = (self._unread + piece).split(b"\n")
        assert len(self._unread) < COMMAND_BYTES_MAX, "a command has no end"
        for line in lines:
            command = json.loads(line)
            match command["do"]:
                case "name-guest":
                    self._wire.name_guest(command["address"], command["vm"])
                case "declare-lost":
                    self._wire.declare_lost(command["address"])
                case "report":
                    self._number = command["number"]
                    self._write_report()
                case other:
                    raise ValueError(f"there is no command {other!r}")
        return bool(piece)

    def _drain(self) -> None:
        deadline = time.monotonic() + DRAIN_SECONDS
        while self._judge_batch() and time.monotonic() < deadline:
            pass

    def _judge_batch(self) -> bool:
        """Judge some frames; return whether there may be more."""
        drops = self._capture.note_drops()
        if drops > self._drops:
            self._drops = drops
            self._wire.lose_track()
        for _ in range(BATCH_FRAMES):
            frame = self._capture.take()
            if frame is None:
                return False
            self._wire.see(frame.port, frame.data)
        return True

    def _write_report(self) -> None:
        report = {
            "number": self._number,
            "summary": self._wire.summary(),
            "violations": self._wire.violations,
            "kernel_drops": self._drops,
        }
        fresh = self._path.with_suffix(".new")
        fresh.write_text(json.dumps(report, indent=1))
        fresh.replace(self._path)


def main() -> int:
    """Be a witness; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.witness")
    parser.add_argument("--namespace", required=True, help="of the lab's switch")
    parser.add_argument("--report", required=True, type=Path, help="where to write what was seen")
    options = parser.parse_args()
    wake, signalled = socket.socketpair()
    signalled.setblocking(False)
    signal.set_wakeup_fd(signalled.fileno())
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for its owner, who ends it
    with wake, signalled, contextlib.closing(Capture(options.namespace)) as capture:
        _Sitting(capture, options.report, wake).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
