"""How a connection that was opened over TCP goes on over RDMA, or stays. Talks both.

    primary                                   backup
    HELLO (rdma: true)                 ──▶
                                       ◀──    WELCOME (rdma: address, port, token)
    RDMA CM: request with the token    ──▶    checks the token, accepts
    TRANSPORT rdma, the last on TCP    ──▶    goes on over RDMA
    or TRANSPORT tcp, and why          ──▶    closes what it offered, stays

The primary decides, and says so in a frame of the connection itself, in order with everything else:
both sides change over at the same place, numbers and ids go on. Nobody has relied on anything yet
(INV-7), so whatever fails here costs a seeding and nothing more.

What goes over RDMA is checksummed like everything, but not encrypted; an address of RDMA in the
agent's configuration says that its network is for hosts alone.
"""

import contextlib
import logging
import select
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

from holdfast_agent.core.failures import PeerLost
from holdfast_agent.core.frames import FrameKind, FrameRejected, RejectionCode
from holdfast_agent.core.payloads import RdmaOffer, TransportChoice, Welcome, decode_json
from holdfast_agent.transport.connection import FrameConnection
from holdfast_agent.transport.rdma.binding import RdmaMissing
from holdfast_agent.transport.rdma.opening import RdmaListener, connect
from holdfast_api.words import ClaimReason

LOGGER = logging.getLogger(__name__)
CONNECT_SECONDS = 10.0
CHOICE_SECONDS = 20.0
"""So long a backup waits for TRANSPORT; the primary tries for at most CONNECT_SECONDS."""
LOOK_MS = 20


class Carrier(NamedTuple):
    """What carries a connection, and why it is not RDMA if that was wanted."""

    name: Literal["tcp", "rdma"]
    fell_back: str = ""


def choose(
    connection: FrameConnection,
    welcome: Welcome,
    wanted: Literal["auto", "tcp", "rdma"],
    source: str,
) -> Carrier:
    """Let a primary's welcomed `connection` go on as its policy wants, RDMA from `source` of ours.

    Raises PeerLost, also if nothing but RDMA is wanted and there is none, or FrameRejected.
    """
    if wanted == "tcp" or (wanted == "auto" and not source):
        if welcome.rdma is not None:
            raise FrameRejected(
                RejectionCode.BAD_PAYLOAD, "an offer of RDMA that was not asked for"
            )
        return Carrier("tcp")
    if not source:
        why: str | None = "this host has no `rdma_address` in its configuration"
    elif welcome.rdma is None:
        why = "the backup offers none: its log says why, or it has no `rdma_address` configured"
    else:
        why = take_offer(connection, welcome.rdma, source)
    if why is None:
        return Carrier("rdma")
    if wanted == "rdma":
        raise PeerLost(ClaimReason.PEER_FAILED, f"the policy wants RDMA and nothing else: {why}")
    return Carrier("tcp", why)


def take_offer(connection: FrameConnection, offer: RdmaOffer, source: str) -> str | None:
    """Let the primary's `connection` go on over RDMA, from our address `source`.

    Returns None, or why it stays on TCP. Raises PeerLost.
    """
    stream = None
    reason = ""
    try:
        stream = connect(source, offer, CONNECT_SECONDS)
    except (RdmaMissing, OSError) as error:
        reason = str(error)[:1000]
    choice = TransportChoice(transport="tcp" if stream is None else "rdma", reason=reason)
    try:
        connection.send(FrameKind.TRANSPORT, 0, [choice.model_dump_json().encode()])
    except BaseException:
        if stream is not None:
            stream.close()
        raise
    if stream is None:
        return reason
    connection.move_to(stream)
    return None


def make_offer(address: str) -> RdmaListener | None:
    """Listen for a primary at our RDMA address; None, and a line in the log, if that can not be."""
    try:
        return RdmaListener(address)
    except (RdmaMissing, OSError) as error:
        LOGGER.warning("RDMA is not offered: %s", error)
        return None


def await_choice(
    connection: FrameConnection,
    listener: RdmaListener,
    *,
    timeout_seconds: float = CHOICE_SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> bool:
    """Let the backup's `connection` go on as the primary chooses; True for RDMA.

    The listener is closed, or the connection's. Raises PeerLost or FrameRejected.
    """
    deadline = clock() + timeout_seconds
    with contextlib.ExitStack() as undo:
        undo.callback(listener.close)
        stream = None
        failure: OSError | None = None
        choice: TransportChoice | None = None
        while choice is None or (choice.transport == "rdma" and stream is None):
            if clock() > deadline or (choice is not None and failure is not None):
                raise PeerLost(
                    ClaimReason.PEER_FAILED, f"the primary's RDMA connection: {failure or 'none'}"
                )
            if stream is None and failure is None:
                try:
                    stream = listener.advance()
                except OSError as error:
                    failure = error
                if stream is not None:
                    undo.pop_all()  # it owns what the listener had
                    undo.callback(stream.close)
            choice = choice or _choice(connection)
            _wait(connection, listener, is_listening=stream is None and failure is None)
        if choice.transport == "tcp":
            LOGGER.info("the primary stays on TCP: %s", choice.reason)
            return False
        undo.pop_all()
    assert stream is not None
    connection.move_to(stream)
    return True


def _wait(connection: FrameConnection, listener: RdmaListener, *, is_listening: bool) -> None:
    """Wait a moment for whatever comes next."""
    poller = select.poll()
    poller.register(connection.fileno(), select.POLLIN)
    if is_listening:
        poller.register(listener.fileno(), select.POLLIN)
    poller.poll(LOOK_MS)


def _choice(connection: FrameConnection) -> TransportChoice | None:
    frame = connection.receive()
    if frame is None:
        return None
    if frame.kind is not FrameKind.TRANSPORT:
        raise FrameRejected(
            RejectionCode.UNEXPECTED_KIND, f"{frame.kind.name} in the place of TRANSPORT"
        )
    return decode_json(TransportChoice, frame.payload)
