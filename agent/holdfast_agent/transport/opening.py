"""How connections between agents begin: listen, connect, greet, welcome, refuse. Talks TCP and TLS.

    primary                        agent of the backup          worker of the backup
    connect, preface        ──▶    read it, pick the worker
                                   pass the socket on    ──▶    (`admission`)
    TLS handshake           ◀─────────────────────────────▶     TLS handshake
    HELLO                   ─────────────────────────────▶      is it who is expected?
                            ◀─────────────────────────────      WELCOME or REFUSED

An agent listens for all its VMs. A TLS session cannot be passed on, so the agent reads exactly the
preface, in the clear, and whoever answers the HELLO shakes hands. With `tls` off there is no
handshake, and all else is the same. The primary sends nothing between HELLO and WELCOME.

An address is `host:port`, with brackets around an IPv6 address: `[fd00::1]:7600`.
"""

import contextlib
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
from holdfast_agent.core.payloads import Hello, RdmaOffer, Refusal, Welcome, decode_json
from holdfast_agent.core.preface import Preface, encode_preface
from holdfast_agent.transport.connection import FrameConnection
from holdfast_agent.transport.identity import Identity, host_of
from holdfast_agent.transport.stream import Stream
from holdfast_agent.transport.tcp import TcpStream, enlarge_buffers
from holdfast_agent.transport.tls import TlsStream, shake_hands
from holdfast_api.words import ClaimReason, HostId, Role

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


def reach(
    address: str,
    preface: Preface,
    backup: HostId,
    identity: Identity | None,
    timeout_seconds: float,
) -> Stream:
    """Connect to the worker of `backup` that `preface` names; with an identity over TLS.

    Blocks at most twice so long: to connect, and to shake hands. Raises PeerLost, also for a
    certificate that is not that host's, and IdentityUnusable. The caller closes the stream.
    """
    assert preface.tls == (identity is not None)
    context = identity.context(is_server=False) if identity else None
    sock = connect(address, timeout_seconds)
    try:
        sock.sendall(encode_preface(preface))
    except OSError as error:
        sock.close()
        raise PeerLost(ClaimReason.STREAM_BROKEN, f"{address}: {error}") from error
    if context is None:
        return TcpStream(sock)
    tls = shake_hands(sock, context, is_server=False, timeout_seconds=timeout_seconds)
    found = host_of(tls.getpeercert())
    if found != backup:
        tls.close()
        raise PeerLost(
            ClaimReason.PEER_FAILED,
            f"at {address} answers {found or 'no host'} by its certificate, and not {backup}: "
            "is the address another host's now, or the certificate in the wrong place?",
        )
    return TlsStream(tls)


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


def welcome(connection: FrameConnection, rdma: RdmaOffer | None = None) -> Welcome:
    """Answer a HELLO: choose the connection's id and bind the connection to it.

    With an offer of RDMA the primary's next frame is TRANSPORT. Raises PeerLost.
    """
    answer = Welcome(connection=1 + secrets.randbelow((1 << 64) - 1), rdma=rdma)
    connection.send(FrameKind.WELCOME, 0, [answer.model_dump_json().encode()])
    connection.bind(answer.connection)
    return answer


def receive_hello(
    stream: Stream, timeout_seconds: float, limits: FrameLimits = DEFAULT_LIMITS
) -> Hello:
    """Read the HELLO of a primary that just connected, and not a byte more; blocks till then.

    The stream stays open and the caller's, also on errors. Raises FrameRejected or PeerLost; the
    whole must be there within `timeout_seconds`, however slowly it drips.
    """
    connection = FrameConnection(
        stream,
        role=Role.BACKUP,
        generation=None,
        silence_limit_seconds=timeout_seconds,
        keepalive_seconds=timeout_seconds,
        limits=limits,
    )
    frame = connection.wait_frame(time.monotonic_ns() + int(timeout_seconds * 1e9))
    if frame is None:
        raise PeerLost(ClaimReason.PEER_SILENT, f"no HELLO within {timeout_seconds:.1f} s")
    hello = decode_json(Hello, frame.payload)
    if hello.generation != frame.header.generation:
        raise FrameRejected(
            RejectionCode.WRONG_GENERATION,
            f"HELLO of {hello.generation} in a frame of {frame.header.generation}",
        )
    return hello


def refuse(stream: Stream, generation: int, refusal: Refusal) -> None:
    """Answer a HELLO with REFUSED; the caller closes the stream. Errors do not matter any more."""
    encoder = FrameEncoder(sender=Role.BACKUP, generation=generation)
    views, _ = encoder.encode(FrameKind.REFUSED, 0, [refusal.model_dump_json().encode()])
    rest = memoryview(b"".join(views))
    with contextlib.suppress(OSError):  # a few KiB into an empty buffer: there is room
        while rest:
            rest = rest[stream.send([rest]) :]
    stream.end_sending()
