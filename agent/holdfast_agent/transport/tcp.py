"""A plain TCP connection as a stream. Talks TCP; owns the socket it is given.

TCP_USER_TIMEOUT lets the kernel give up on unacknowledged data after the silence limit; big buffers
are asked for with SO_*BUFFORCE (CAP_NET_ADMIN), else the kernel's automatic sizing is left alone,
because a plain SO_RCVBUF would end it, often at 208 KiB.

Source: tcp(7), socket(7).
"""

import contextlib
import select
import socket
from collections.abc import Sequence

from holdfast_agent.transport.stream import Readiness

MAX_BUFFERS_PER_WRITE = 1024
"""IOV_MAX of Linux."""
SOCKET_BUFFER_BYTES = 4 * 1024 * 1024
SO_SNDBUFFORCE = 32
SO_RCVBUFFORCE = 33
"""asm-generic/socket.h; the socket module does not name them."""


class TcpStream:
    """Port `Stream` over a connected socket: TCP's, or one of a pair."""

    def __init__(self, sock: socket.socket) -> None:
        """Take over a connected socket, which never blocks from now on."""
        self._socket = sock
        sock.setblocking(False)  # noqa: FBT003 - the standard library's signature
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._socket.fileno()

    def send(self, views: Sequence[memoryview]) -> int:
        """Write in one call what the kernel has room for."""
        return self._socket.sendmsg(views[:MAX_BUFFERS_PER_WRITE])

    def receive_into(self, target: memoryview) -> int:
        """Read what is there."""
        return self._socket.recv_into(target)

    def wait(self, *, readable: bool, writable: bool, timeout_ms: float) -> Readiness:
        """Poll the socket."""
        return poll_socket(
            self._socket, readable=readable, writable=writable, timeout_ms=timeout_ms
        )

    def limit_silence(self, silence_limit_seconds: float) -> None:
        """Let the kernel give up when the peer's confirms nothing for so long."""
        limit_unconfirmed(self._socket, silence_limit_seconds)

    def end_sending(self) -> None:
        """Shut our direction down, if it still stands."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self._socket.close()


def poll_socket(
    sock: socket.socket, *, readable: bool, writable: bool, timeout_ms: float
) -> Readiness:
    """Wait as `Stream.wait` says; an error or the end makes the socket ready for everything."""
    poller = select.poll()
    poller.register(sock, (select.POLLIN if readable else 0) | (select.POLLOUT if writable else 0))
    events = dict(poller.poll(timeout_ms)).get(sock.fileno(), 0)
    return Readiness(bool(events & ~select.POLLOUT), bool(events & ~select.POLLIN))


def limit_unconfirmed(sock: socket.socket, limit_seconds: float) -> None:
    """Let the kernel give up on data that the peer's kernel has not confirmed for so long."""
    timeout_ms = max(int(limit_seconds * 1000), 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)


def enlarge_buffers(sock: socket.socket) -> None:
    """Ask for big socket buffers, before connect or listen, if we have the right to."""
    for option in (SO_SNDBUFFORCE, SO_RCVBUFFORCE):
        with contextlib.suppress(PermissionError):
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
