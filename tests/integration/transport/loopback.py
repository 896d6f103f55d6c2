"""Both sides of connections over real loopback sockets."""

import socket
import ssl
import time
from collections.abc import Callable

from holdfast_agent.core.frames import FrameLimits
from holdfast_agent.core.payloads import Hello
from holdfast_agent.transport.connection import Frame, FrameConnection
from holdfast_agent.transport.stream import Stream
from holdfast_agent.transport.tcp import TcpStream
from holdfast_agent.transport.tls import TlsStream
from holdfast_api.words import Role

DEADLINE_SECONDS = 20.0
CONNECTION_ID = 4711

Sockets = tuple[socket.socket, socket.socket]
"""A connected pair: the primary's, the backup's."""


def next_frame(connection: FrameConnection) -> Frame:
    """Return the next frame; fails when there is none until the deadline."""
    frame = connection.wait_frame(time.monotonic_ns() + int(DEADLINE_SECONDS * 1e9))
    assert frame is not None, "no frame came"
    return frame


def hello(**changes: object) -> Hello:
    """A HELLO for a VM of 256 pages."""
    fields: dict[str, object] = {
        "vm": "web",
        "generation": 7,
        "primary": "h1",
        "backup": "h2",
        "keepalive_ms": 50,
        "silence_limit_ms": 250,
        "blocks": (("pc.ram", 1 << 20),),
    }
    return Hello.model_validate(fields | changes)


def stream_over(sock: socket.socket) -> Stream:
    """Return the stream that fits the socket."""
    return TlsStream(sock) if isinstance(sock, ssl.SSLSocket) else TcpStream(sock)


def over(
    sock: socket.socket,
    role: Role,
    *,
    silence_limit_seconds: float = 5,
    keepalive_seconds: float = 1,
    limits: FrameLimits | None = None,
    staging_limit_bytes: int = 1 << 30,
    clock: Callable[[], int] = time.monotonic_ns,
) -> FrameConnection:
    """Return a side of a connection that was greeted and welcomed already."""
    connection = FrameConnection(
        stream_over(sock),
        role=role,
        generation=7,
        silence_limit_seconds=silence_limit_seconds,
        keepalive_seconds=keepalive_seconds,
        limits=limits or FrameLimits(),
        staging_limit_bytes=staging_limit_bytes,
        received_frames=1,
        clock=clock,
    )
    connection._encoder.sequence = 1
    connection.bind(CONNECTION_ID)
    return connection
