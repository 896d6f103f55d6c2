"""Connections that go on over another stream, or stay: the talk on TCP, without a device."""

import contextlib
import socket
from collections.abc import Iterator

import pytest
from tests.unit.rdma.wire import pair

from holdfast_agent.core.failures import PeerLost
from holdfast_agent.core.frames import FrameKind, FrameRejected
from holdfast_agent.core.payloads import RdmaOffer, TransportChoice, Welcome, decode_json
from holdfast_agent.core.ring import RingShape
from holdfast_agent.transport.connection import FrameConnection
from holdfast_agent.transport.rdma.moving import choose, make_offer
from holdfast_agent.transport.tcp import TcpStream
from holdfast_api.words import Role

SHAPE = RingShape(size_bytes=8192, notice_limit=8)
OFFER = RdmaOffer(address="192.0.2.1", port=20_000, token="0" * 32)
DEADLINE_NS = 1 << 62
Sides = tuple[FrameConnection, FrameConnection]


@pytest.fixture
def sides() -> Iterator[Sides]:
    """Both ends of a connection over TCP that was greeted and welcomed."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    found = []
    for sock, role in ((near, Role.PRIMARY), (far, Role.BACKUP)):
        connection = FrameConnection(
            TcpStream(sock),
            role=role,
            generation=7,
            silence_limit_seconds=10,
            keepalive_seconds=1,
            received_frames=1,
        )
        connection._encoder.sequence = 1
        connection.bind(4711)
        found.append(connection)
    with contextlib.closing(found[0]), contextlib.closing(found[1]):
        yield found[0], found[1]


def test_frames_go_on_over_the_other_stream_with_their_numbers(sides: Sides) -> None:
    primary, backup = sides
    primary.send(FrameKind.PAGES, 1, [b"over TCP"])
    assert backup.wait_frame(DEADLINE_NS) is not None
    ends = pair(SHAPE, SHAPE)
    primary.move_to(ends[0].stream)
    backup.move_to(ends[1].stream)
    content = bytes(range(256)) * 16
    primary.send(FrameKind.PAGES, 1, [content])
    frame = backup.wait_frame(DEADLINE_NS)
    assert frame is not None
    assert bytes(frame.payload) == content
    assert frame.header.sequence == 3
    backup.send(FrameKind.ACKNOWLEDGE, 1)
    answer = primary.wait_frame(DEADLINE_NS)
    assert answer is not None
    assert answer.header.sequence == 2


def test_the_old_stream_is_closed(sides: Sides) -> None:
    ends = pair(SHAPE, SHAPE)
    sides[0].move_to(ends[0].stream)
    with pytest.raises(PeerLost, match="hung up"):
        sides[1].wait_frame(DEADLINE_NS)


@pytest.mark.parametrize("wanted", ["tcp", "auto"])
def test_nothing_is_said_where_rdma_is_not_wanted_or_not_configured(
    sides: Sides, wanted: str
) -> None:
    source = "192.0.2.2" if wanted == "tcp" else ""
    carrier = choose(sides[0], Welcome(connection=1), wanted, source)  # type: ignore[arg-type]
    assert carrier == ("tcp", "")
    assert sides[0].counters.sent_frames == 0


def test_auto_stays_with_a_reason_where_none_is_offered(sides: Sides) -> None:
    carrier = choose(sides[0], Welcome(connection=1), "auto", "192.0.2.2")
    assert carrier.name == "tcp"
    assert "the backup offers none" in carrier.fell_back
    assert sides[0].counters.sent_frames == 0


def test_auto_stays_and_says_so_to_a_backup_that_can_not_be_reached(sides: Sides) -> None:
    """This machine has no RDMA: the attempt fails, whatever is offered."""
    carrier = choose(sides[0], Welcome(connection=1, rdma=OFFER), "auto", "192.0.2.2")
    assert carrier.name == "tcp"
    assert carrier.fell_back
    frame = sides[1].wait_frame(DEADLINE_NS)
    assert frame is not None
    assert frame.kind is FrameKind.TRANSPORT
    choice = decode_json(TransportChoice, frame.payload)
    assert choice == TransportChoice(transport="tcp", reason=carrier.fell_back)


@pytest.mark.parametrize("offer", [None, OFFER])
def test_a_policy_of_rdma_alone_takes_no_tcp(sides: Sides, offer: RdmaOffer | None) -> None:
    with pytest.raises(PeerLost, match="the policy wants RDMA and nothing else"):
        choose(sides[0], Welcome(connection=1, rdma=offer), "rdma", "192.0.2.2")


def test_a_policy_of_rdma_without_an_address_of_ours_says_what_to_set(sides: Sides) -> None:
    with pytest.raises(PeerLost, match="rdma_address"):
        choose(sides[0], Welcome(connection=1), "rdma", "")


def test_an_offer_that_was_not_asked_for_is_refused(sides: Sides) -> None:
    with pytest.raises(FrameRejected, match="not asked for"):
        choose(sides[0], Welcome(connection=1, rdma=OFFER), "tcp", "")


def test_a_host_without_rdma_offers_none() -> None:
    assert make_offer("127.0.0.1") is None
