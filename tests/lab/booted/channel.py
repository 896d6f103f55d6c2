"""Starts commands in a booted host and follows them. Talks to the runner inside over a socket.

Theory of operation: a thread reads the lines that the runner sends (see `runner`) and files them
with their command; whoever waits for a command is woken by a condition. When the connection ends,
because the host died or was never there, every command that had not ended gets the status 125.
"""

import base64
import contextlib
import itertools
import json
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab.booted.runner import CUT, TCP_PORT

NEVER_REPORTED = 125
"""The status of a command whose host did not live to tell."""
COMMAND_SECONDS_MAX = 120.0
GRACE_SECONDS = 30.0
"""How long after a command's deadline we wait for the host to say that it was cut."""
OUTPUT_BYTES_MAX = 64 << 20
ENDS_SECONDS_MAX = 10.0

__all__ = ["CUT", "NEVER_REPORTED", "Channel", "Command", "Finished"]


@dataclass(frozen=True)
class Finished:
    """How a command ended: status as a shell's, 124 for cut at its deadline, 125 for no word."""

    status: int
    output: bytes

    @property
    def text(self) -> str:
        """Both output and error output, in the order in which they were written."""
        return self.output.decode(errors="replace")

    def checked(self) -> str:
        """Return the output; a status that is not 0 is an AssertionError that shows it."""
        assert self.status == 0, f"status {self.status}:\n{self.text}"
        return self.text


class Command:
    """A command that was started in a host."""

    def __init__(self, channel: "Channel", number: int, seconds_max: float) -> None:
        """Made by `Channel.start`."""
        self._channel = channel
        self._number = number
        self._deadline = time.monotonic() + seconds_max + GRACE_SECONDS
        self.output = bytearray()
        self.status: int | None = None

    @property
    def text(self) -> str:
        """What it has written so far."""
        return self.output.decode(errors="replace")

    def wait(self) -> Finished:
        """Wait for its end, at most until its deadline and some grace."""
        with self._channel.changed:
            while self.status is None:
                left = self._deadline - time.monotonic()
                if not self._channel.changed.wait(left) and self.status is None:
                    self.status = NEVER_REPORTED
            return Finished(self.status, bytes(self.output))

    def wait_for(self, marker: str, seconds_max: float = COMMAND_SECONDS_MAX) -> None:
        """Wait until it has written `marker`; AssertionError when it ends or is late instead."""
        wanted, deadline = marker.encode(), time.monotonic() + seconds_max
        with self._channel.changed:
            while wanted not in self.output:
                in_time = self._channel.changed.wait(deadline - time.monotonic())
                if wanted not in self.output and (self.status is not None or not in_time):
                    ended = f"ended with {self.status}" if self.status is not None else "was late"
                    raise AssertionError(f"no {marker!r}: the command {ended}:\n{self.text}")

    def more(self, offset: int, seconds_max: float) -> bytes:
        """Wait until there is output after `offset` or the command ended; return that output."""
        with self._channel.changed:
            self._channel.changed.wait_for(
                lambda: len(self.output) > offset or self.status is not None, seconds_max
            )
            return bytes(self.output[offset:])

    def end(self) -> Finished:
        """Kill it with its whole process group, and wait for that."""
        self._channel.say(end=self._number)
        return self.wait()


class Channel:
    """A connection to the runner inside a host. Owns the socket and a thread; close it."""

    def __init__(self, connection: socket.socket) -> None:
        """Take over a connected socket."""
        self.changed = threading.Condition()
        self.release: str | None = None
        self.is_lost = False
        self._connection = connection
        self._commands: dict[int, Command] = {}
        self._numbers = itertools.count(1)
        self._sending = threading.Lock()
        self._reader = threading.Thread(target=self._read, name="booted-channel", daemon=True)
        self._reader.start()

    @classmethod
    def to_host(cls, address: str, seconds_max: float = 30.0) -> "Channel":
        """Connect, from inside one host, to another one of its network."""
        connection = socket.create_connection((address, TCP_PORT), timeout=seconds_max)
        connection.settimeout(None)
        return cls(connection)

    def wait_ready(self, seconds_max: float) -> bool:
        """Wait for the runner's first line; False when the connection ends or time is up."""
        with self.changed:
            self.changed.wait_for(lambda: self.release is not None or self.is_lost, seconds_max)
            return self.release is not None and not self.is_lost

    def start(
        self,
        argv: Sequence[str | Path],
        *,
        environment: Mapping[str, str] | None = None,
        folder: str | Path | None = None,
        seconds_max: float = COMMAND_SECONDS_MAX,
    ) -> Command:
        """Start a command, in the caller's folder unless told otherwise, and return at once."""
        with self.changed:
            command = Command(self, next(self._numbers), seconds_max)
            if self.is_lost:
                command.status = NEVER_REPORTED
                return command
            self._commands[command._number] = command
        self.say(
            start=command._number,
            argv=[str(word) for word in argv],
            environment=dict(environment or {}),
            folder=str(folder or Path.cwd()),
            seconds_max=seconds_max,
        )
        return command

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        environment: Mapping[str, str] | None = None,
        folder: str | Path | None = None,
        seconds_max: float = COMMAND_SECONDS_MAX,
    ) -> Finished:
        """Run a command to its end."""
        started = self.start(argv, environment=environment, folder=folder, seconds_max=seconds_max)
        return started.wait()

    def say(self, **words: Any) -> None:
        """Send a line; to a host that is gone it is not sent, as its commands have ended."""
        try:
            with self._sending:
                self._connection.sendall(json.dumps(words).encode() + b"\n")
        except OSError:
            self._lose()

    def close(self) -> None:
        """End the connection; commands that still run are killed by the runner."""
        with contextlib.suppress(OSError):  # the other side may have been first
            self._connection.shutdown(socket.SHUT_RDWR)
        self._reader.join(ENDS_SECONDS_MAX)
        assert not self._reader.is_alive(), "the channel's thread does not end"
        self._connection.close()

    def _read(self) -> None:
        received = b""
        while data := self._receive():
            *lines, received = (received + data).split(b"\n")
            for line in lines:
                self._file(json.loads(line))
        self._lose()

    def _receive(self) -> bytes:
        try:
            return self._connection.recv(1 << 18)
        except OSError:
            return b""

    def _file(self, words: dict[str, Any]) -> None:
        with self.changed:
            if "ready" in words:
                self.release = words["ready"]
            elif "output" in words:
                command = self._commands[words["output"]]
                if len(command.output) < OUTPUT_BYTES_MAX:
                    command.output += base64.b64decode(words["data"])
                    if len(command.output) >= OUTPUT_BYTES_MAX:
                        command.output += b"\n[more output was dropped]\n"
            else:
                self._commands.pop(words["ended"]).status = words["status"]
            self.changed.notify_all()

    def _lose(self) -> None:
        with self.changed:
            self.is_lost = True
            for command in self._commands.values():
                command.status = NEVER_REPORTED
            self._commands.clear()
            self.changed.notify_all()
