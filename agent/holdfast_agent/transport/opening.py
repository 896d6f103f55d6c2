"""How connections between agents begin: listen, connect, greet, welcome, refuse. Talks TCP.

An agent listens for all its VMs. It accepts, reads exactly the HELLO (not a byte more), and passes
the socket to the worker of that VM by SCM_RIGHTS; the worker goes on with a FrameConnection that
has `received_frames=1`. The primary sends nothing between HELLO and WELCOME.

An address is `host:port`, with brackets around an IPv6 address: `[fd00::1]:7600`.
"""

import secrets
import socket
import time

from holdfast_agent.core.failures import PeerLost
from holdfast_agent.core.frames import (
    DEFAULT_LIMITS,
    FrameEncoder,
    FrameKind,
    FrameLimits,
    FrameRejected,
    RejectionCode,
)
from holdfast_agent.core.payloads import Hello, Refusal, Welcome, decode_json
from holdfast_agent.transport.connection import FrameConnection
from holdfast_agent.transport.tcp import TcpStream, enlarge_buffers
from holdfast_api.words import ClaimReason, Role

BACKLOG = 128
PORT_MAX = 65_535


class AddressNotUnderstood(ValueError):  # noqa: N818 - reads as a sentence where it is raised
    """An address that is not `host:port`."""


class PeerRefused(Exception):  # noqa: N818
    """The backup's agent or worker answered, and will not take the VM."""

    def __init__(self, refusal: Refusal) -> None:
        """Remember the refusal."""
        super().__init__(f"{refusal.code}: {refusal.explanation}")
        self.refusal = refusal


def parse_address(address: str) -> tuple[str, int]:
    """Return host and port of `host:port` or `[host]:port`. Raises AddressNotUnderstood."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > PORT_MAX:
        raise AddressNotUnderstood(f"{address!r} is not an address: write host:port")
    return host, int(port)


def listen(address: str) -> socket.socket:
    """Return a non-blocking listening socket; port 0 takes a free one. The caller closes it."""
    host, port = parse_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        enlarge_buffers(listener)  # inherited by what is accepted
        listener.bind((host, port))
        listener.listen(BACKLOG)
        listener.setblocking(False)  # noqa: FBT003 - the standard library's signature
    except OSError:
        listener.close()
        raise
    return listener


def accept(listener: socket.socket) -> socket.socket | None:
    """Return the next connection, or None when none waits. The caller closes it."""
    try:
        return listener.accept()[0]
    except (BlockingIOError, ConnectionAbortedError):
        return None


def connect(address: str, timeout_seconds: float) -> socket.socket:
    """Return a socket connected to `address`. Raises PeerLost. The caller closes it."""
    host, port = parse_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        enlarge_buffers(sock)
        sock.settimeout(timeout_seconds)
        sock.connect((host, port))
    except TimeoutError as error:
        sock.close()
        raise PeerLost(
            ClaimReason.PEER_SILENT, f"{address} did not answer within {timeout_seconds} s"
        ) from error
    except OSError as error:
        sock.close()
        raise PeerLost(ClaimReason.STREAM_BROKEN, f"{address}: {error}") from error
    return sock


def greet(connection: FrameConnection, hello: Hello, timeout_seconds: float) -> Welcome:
    """Say HELLO, wait for the answer, and bind the connection to the id the backup chose.

    Raises PeerRefused, PeerLost (also when no answer comes in time) or FrameRejected.
    """
    deadline_ns = time.monotonic_ns() + int(timeout_seconds * 1e9)
    connection.send(FrameKind.HELLO, 0, [hello.model_dump_json().encode()])
    frame = connection.wait_frame(deadline_ns)
    if frame is None:
        raise PeerLost(ClaimReason.PEER_SILENT, f"no answer within {timeout_seconds} s")
    if frame.kind is FrameKind.REFUSED:
        raise PeerRefused(decode_json(Refusal, frame.payload))
    welcome = decode_json(Welcome, frame.payload)
    connection.bind(welcome.connection)
    return welcome


def welcome(connection: FrameConnection) -> Welcome:
    """Answer a HELLO: choose the connection's id and bind the connection to it.

    Raises PeerLost.
    """
    answer = Welcome(connection=1 + secrets.randbelow((1 << 64) - 1))
    connection.send(FrameKind.WELCOME, 0, [answer.model_dump_json().encode()])
    connection.bind(answer.connection)
    return answer


def receive_hello(
    sock: socket.socket, timeout_seconds: float, limits: FrameLimits = DEFAULT_LIMITS
) -> Hello:
    """Read the HELLO of a primary that just connected, and not a byte more; blocks till then.

    The socket stays open and the caller's, also on errors. Raises FrameRejected or PeerLost; the
    whole must be there within `timeout_seconds`, however slowly it drips.
    """
    connection = FrameConnection(
        TcpStream(sock),
        role=Role.BACKUP,
        generation=None,
        silence_limit_seconds=timeout_seconds,
        keepalive_seconds=timeout_seconds,
        limits=limits,
    )
    frame = connection.wait_frame(time.monotonic_ns() + int(timeout_seconds * 1e9))
    if frame is None:
        raise PeerLost(ClaimReason.PEER_SILENT, f"no HELLO within {timeout_seconds} s")
    hello = decode_json(Hello, frame.payload)
    if hello.generation != frame.header.generation:
        raise FrameRejected(
            RejectionCode.WRONG_GENERATION,
            f"HELLO of {hello.generation} in a frame of {frame.header.generation}",
        )
    return hello


def refuse(sock: socket.socket, generation: int, refusal: Refusal) -> None:
    """Answer a HELLO with REFUSED; the caller closes the socket. Errors do not matter any more."""
    encoder = FrameEncoder(sender=Role.BACKUP, generation=generation)
    views, _ = encoder.encode(FrameKind.REFUSED, 0, [refusal.model_dump_json().encode()])
    try:
        sock.send(b"".join(views))  # a few KiB into an empty buffer: goes whole or not at all
    except OSError:
        return
