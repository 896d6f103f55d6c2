"""Joins emulated hosts by a network that exists only between their processes.

Theory of operation: a wire is a pair of datagram sockets, one Ethernet frame to a datagram. Two
hosts hold the two ends of one wire. More are joined by a switch, a thread that learns which address
is behind which wire; it drops a frame that a host does not take at once, as a real one does.
"""

import contextlib
import os
import selectors
import socket
import threading
from collections.abc import Iterator, Sequence

FRAME_BYTES_MAX = 65536
BUFFER_BYTES = 1 << 20
ENDS_SECONDS_MAX = 10.0


def _wire() -> tuple[socket.socket, socket.socket]:
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    return ends


@contextlib.contextmanager
def wired(count: int) -> Iterator[Sequence[socket.socket | None]]:
    """Yield an end of a wire for each of `count` hosts, all joined; a single host gets none."""
    if count == 1:
        yield [None]
        return
    if count == 2:
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(end) for end in _wire()]
        return
    with contextlib.ExitStack() as stack:
        pairs = [_wire() for _ in range(count)]
        for end in (each for pair in pairs for each in pair):
            stack.enter_context(end)
        switch = Switch([ours for ours, _ in pairs])
        stack.callback(switch.close)
        yield [theirs for _, theirs in pairs]


class Switch:
    """Forwards frames between wires until it is closed. Does not own the wires."""

    def __init__(self, ports: Sequence[socket.socket]) -> None:
        """Start to forward."""
        self._ports = ports
        self._behind: dict[bytes, socket.socket] = {}
        self._woken, self._waker = os.pipe()
        self._thread = threading.Thread(target=self._forward, name="switch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop forwarding."""
        os.close(self._waker)
        self._thread.join(ENDS_SECONDS_MAX)
        assert not self._thread.is_alive(), "the switch does not end"
        os.close(self._woken)

    def _forward(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            for port in self._ports:
                port.setblocking(False)
                selector.register(port, selectors.EVENT_READ, port)
            while True:
                for key, _ in selector.select():
                    if key.data is None:
                        return
                    with contextlib.suppress(OSError):  # a host that died; others go on
                        self._pass_on(key.data, key.data.recv(FRAME_BYTES_MAX))

    def _pass_on(self, source: socket.socket, frame: bytes) -> None:
        self._behind[frame[6:12]] = source
        known = self._behind.get(frame[:6])
        targets = [known] if known else [port for port in self._ports if port is not source]
        for target in targets:
            with contextlib.suppress(OSError):
                target.send(frame)
