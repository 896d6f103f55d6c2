"""Somebody in the middle: forwards what two sockets say, and does to it what a test asks for."""

import contextlib
import select
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from tests.integration.transport.loopback import DEADLINE_SECONDS, Sockets


class Relay:
    """Stands between two ends; what the first one says can be damaged, repeated and cut off."""

    def __init__(self, sockets: Callable[..., Sockets]) -> None:
        """Make two pairs of sockets and forward between them; `ends` are what is left to use."""
        ours, self._in = sockets()
        self._out, theirs = sockets()
        self.ends = ours, theirs
        self._lock = threading.Lock()
        self._passed = bytearray()
        self._damaged_at: int | None = None
        self._stopped = threading.Event()
        for sock in (self._in, self._out):
            sock.setblocking(True)
        self._threads = [
            threading.Thread(target=self._forward),
            threading.Thread(target=self._back),
        ]

    def __enter__(self) -> Self:
        """Start."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(DEADLINE_SECONDS)
        self._in.close()
        self._out.close()

    @property
    def passed(self) -> bytes:
        """All that the first end has said, as it passed."""
        with self._lock:
            return bytes(self._passed)

    def damage_after(self, offset: int) -> None:
        """Change one bit of what comes, so many bytes from now."""
        with self._lock:
            self._damaged_at = len(self._passed) + offset

    def inject(self, data: bytes) -> None:
        """Say something to the second end."""
        with self._lock:
            self._out.sendall(data)

    def cut(self) -> None:
        """End what the second end hears."""
        self._out.shutdown(socket.SHUT_WR)

    def _forward(self) -> None:
        while data := self._receive(self._in):
            with self._lock:
                at = self._damaged_at
                first, last = len(self._passed), len(self._passed) + len(data)
                if at is not None and first <= at < last:
                    changed = bytearray(data)
                    changed[at - first] ^= 0x04
                    data = bytes(changed)
                self._passed += data
                with contextlib.suppress(OSError):
                    self._out.sendall(data)
        with contextlib.suppress(OSError):
            self._out.shutdown(socket.SHUT_WR)

    def _back(self) -> None:
        while data := self._receive(self._out):
            with contextlib.suppress(OSError):
                self._in.sendall(data)

    def _receive(self, sock: socket.socket) -> bytes:
        while not self._stopped.is_set():
            if select.select([sock], [], [], 0.05)[0]:
                with contextlib.suppress(OSError):
                    return sock.recv(65536)
                return b""
        return b""
