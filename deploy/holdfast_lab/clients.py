"""Clients of a guest, for tests and the demo: one Redis connection, and one that counts.

Talks TCP. Knows just as much of the Redis protocol as integers and short strings need.
Source: the Redis serialization protocol specification, version 2.
"""

import itertools
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from holdfast_lab.errors import LabError

REDIS_PORT = 6379
CHUNK_BYTES = 65536


def _encoded(words: Sequence[str | int]) -> bytes:
    """Return a command as Redis reads it."""
    encoded = [str(word).encode() for word in words]
    parts = [b"*%d\r\n" % len(encoded)]
    return b"".join(parts + [b"$%d\r\n%s\r\n" % (len(word), word) for word in encoded])


class RedisConnection:
    """One TCP connection to a Redis; commands one after the other. Owns the socket."""

    def __init__(self, connected: socket.socket) -> None:
        """Take over a connected socket; its timeout stays as it is."""
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connected
        self._unread = b""

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def command(self, *words: str | int) -> str | int | None:
        """Send a command and return its answer.

        Raises LabError when Redis answers with an error or something too rich for this client, and
        OSError (TimeoutError among them) when the connection fails.
        """
        return self.commands([words])[0]

    def commands(self, commands: Sequence[Sequence[str | int]]) -> list[str | int | None]:
        """Send commands at once and return their answers. Raises as `command` does."""
        self._socket.sendall(b"".join(_encoded(words) for words in commands))
        return [self._answer() for _ in commands]

    def _answer(self) -> str | int | None:
        line = self._line()
        kind, rest = line[:1], line[1:]
        if kind == b":":
            return int(rest)
        if kind == b"+":
            return rest.decode()
        if kind == b"$":
            return None if rest == b"-1" else self._exactly(int(rest) + 2)[:-2].decode()
        raise LabError(f"Redis answered {line.decode(errors='replace')}")

    def _line(self) -> bytes:
        while b"\r\n" not in self._unread:
            self._receive()
        line, _, self._unread = self._unread.partition(b"\r\n")
        return line

    def _exactly(self, size: int) -> bytes:
        while len(self._unread) < size:
            self._receive()
        taken, self._unread = self._unread[:size], self._unread[size:]
        return taken

    def _receive(self) -> None:
        chunk = self._socket.recv(CHUNK_BYTES)
        if not chunk:
            raise ConnectionResetError("Redis closed the connection")
        self._unread += chunk


@dataclass
class Count:
    """What a counting client has seen so far."""

    replies: int = 0
    wrong: list[tuple[int, int]] = field(default_factory=list)
    """Replies that were not the next number: (expected, received)."""
    fault: str | None = None
    """Why the connection ended, if it did."""


REPLY_TIMES_MAX = 1_000_000


class CountingClient:
    """Increments one key over one connection, as fast as replies come, in a thread of its own."""

    def __init__(
        self, connection: RedisConnection, *, key: str = "count", rest_seconds: float = 0.0
    ) -> None:
        """Count on this connection, resting after each reply; `start` begins. Owns it."""
        self._connection = connection
        self._key = key
        self._rest_seconds = rest_seconds
        self._stopping = threading.Event()
        self._changed = threading.Condition()
        self._count = Count()
        self._reply_times: deque[float] = deque(maxlen=REPLY_TIMES_MAX)
        self._thread = threading.Thread(target=self._run, name="counting client", daemon=True)

    def start(self) -> None:
        """Begin to count."""
        self._thread.start()

    def stop(self, deadline_seconds: float = 30.0) -> Count:
        """Let the last reply come in, close the connection and return what was seen."""
        self._stopping.set()
        self._thread.join(deadline_seconds)
        self._connection.close()
        return self.seen()

    def seen(self) -> Count:
        """Return a copy of what was seen so far."""
        with self._changed:
            now = self._count
            return Count(now.replies, list(now.wrong), now.fault)

    def wait_for_reply(self, *, after: float, deadline_seconds: float) -> float | None:
        """Wait for the first reply later than `after` (seconds of the monotonic clock).

        Returns when it came, or None if none came in time or the connection failed.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._count.fault is not None or self._latest() > after, deadline_seconds
            )
            return next((moment for moment in self._reply_times if moment > after), None)

    def stall_seconds(self, *, since: float) -> float:
        """Return the longest time between two replies of which the second came after `since`."""
        with self._changed:
            times = list(self._reply_times)
        gaps = [later - earlier for earlier, later in itertools.pairwise(times) if later > since]
        return max(gaps, default=0.0)

    def _latest(self) -> float:
        return self._reply_times[-1] if self._reply_times else 0.0

    def wait_for_count(self, replies: int, deadline_seconds: float) -> bool:
        """Wait until so many replies came; False when they did not in time."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._count.replies >= replies or self._count.fault is not None,
                deadline_seconds,
            ) and (self._count.replies >= replies)

    def _run(self) -> None:
        expected = 1
        while not self._stopping.is_set():
            try:
                value = self._connection.command("INCR", self._key)
            except (OSError, LabError) as fault:
                with self._changed:
                    self._count.fault = f"{type(fault).__name__}: {fault}"
                    self._changed.notify_all()
                return
            self._note(expected, int(value or 0))
            expected = int(value or 0) + 1
            if self._rest_seconds:
                self._stopping.wait(self._rest_seconds)

    def _note(self, expected: int, value: int) -> None:
        with self._changed:
            count = self._count
            count.replies += 1
            self._reply_times.append(time.monotonic())
            if value != expected:
                count.wrong.append((expected, value))
            self._changed.notify_all()
