"""How connections begin: addresses, greetings, refusals, and handing the socket to a worker."""

import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.integration.transport.loopback import (
    DEADLINE_SECONDS,
    Sockets,
    hello,
    next_frame,
    stream_over,
)

from holdfast_agent.core.failures import PeerLost
from holdfast_agent.core.frames import FrameEncoder, FrameKind, FrameRejected, RejectionCode
from holdfast_agent.core.payloads import Refusal
from holdfast_agent.transport.connection import FrameConnection
from holdfast_agent.transport.opening import (
    AddressNotUnderstood,
    PeerRefused,
    accept,
    connect,
    greet,
    listen,
    parse_address,
    receive_hello,
    refuse,
    welcome,
)
from holdfast_api.words import ClaimReason, Role

Pair = Callable[..., Sockets]


def connection_over(sock: socket.socket, role: Role, received_frames: int = 0) -> FrameConnection:
    return FrameConnection(
        stream_over(sock),
        role=role,
        generation=7,
        silence_limit_seconds=5,
        keepalive_seconds=1,
        received_frames=received_frames,
    )


def hello_frame(generation: int = 7) -> bytes:
    encoder = FrameEncoder(sender=Role.PRIMARY, generation=generation)
    return b"".join(encoder.encode(FrameKind.HELLO, 0, [hello().model_dump_json().encode()])[0])


def test_a_greeting_is_welcomed_and_both_sides_are_bound(sockets: Pair) -> None:
    primary_socket, backup_socket = sockets()
    primary = connection_over(primary_socket, Role.PRIMARY)

    def answer() -> None:
        heard = receive_hello(stream_over(backup_socket), 5)
        assert heard == hello()
        backup = connection_over(backup_socket, Role.BACKUP, received_frames=1)
        welcome(backup)
        backup.send(FrameKind.ACKNOWLEDGE, 1)
        assert next_frame(backup).kind is FrameKind.PAGES

    worker = threading.Thread(target=answer)
    worker.start()
    answered = greet(primary, hello(), DEADLINE_SECONDS)
    assert answered.connection > 0
    primary.send(FrameKind.PAGES, 0, [b"x"])
    assert next_frame(primary).kind is FrameKind.ACKNOWLEDGE
    worker.join(DEADLINE_SECONDS)
    assert not worker.is_alive()


def test_two_connections_never_share_an_id(sockets: Pair) -> None:
    ids = set()
    for _ in range(3):
        _, backup_socket = sockets()
        ids.add(welcome(connection_over(backup_socket, Role.BACKUP, received_frames=1)).connection)
    assert len(ids) == 3


def test_a_refusal_says_why(sockets: Pair) -> None:
    primary_socket, backup_socket = sockets()
    refuse(stream_over(backup_socket), 7, Refusal(code="wrong-machine", explanation="no q35 here"))
    with pytest.raises(PeerRefused, match="no q35 here") as caught:
        greet(connection_over(primary_socket, Role.PRIMARY), hello(), DEADLINE_SECONDS)
    assert caught.value.refusal.code == "wrong-machine"


def test_refusing_a_peer_that_has_gone_does_not_matter(sockets: Pair) -> None:
    primary_socket, backup_socket = sockets()
    backup_socket.shutdown(socket.SHUT_WR)
    primary_socket.close()
    refuse(stream_over(backup_socket), 7, Refusal(code="x", explanation="y"))


def test_a_welcome_of_another_generation_is_refused(sockets: Pair) -> None:
    primary_socket, backup_socket = sockets()
    encoder = FrameEncoder(sender=Role.BACKUP, generation=6)
    views, _ = encoder.encode(FrameKind.WELCOME, 0, [b'{"connection": 5}'])
    backup_socket.setblocking(True)
    backup_socket.sendall(b"".join(views))
    with pytest.raises(FrameRejected, match="wrong-generation"):
        greet(connection_over(primary_socket, Role.PRIMARY), hello(), DEADLINE_SECONDS)


def test_an_agent_that_does_not_answer_is_lost_in_time(sockets: Pair) -> None:
    primary_socket, _ = sockets()
    with pytest.raises(PeerLost) as caught:
        greet(connection_over(primary_socket, Role.PRIMARY), hello(), 0.05)
    assert caught.value.reason == ClaimReason.PEER_SILENT


def test_a_hello_is_read_without_a_byte_of_what_follows(sockets: Pair) -> None:
    primary_socket, backup_socket = sockets()
    primary_socket.sendall(hello_frame() + b"next")
    assert receive_hello(stream_over(backup_socket), DEADLINE_SECONDS) == hello()
    assert backup_socket.recv(100) == b"next"


def test_a_stream_that_heard_a_hello_goes_on_with_what_follows(sockets: Pair) -> None:
    primary_socket, backup_socket = sockets()
    primary_socket.sendall(hello_frame())
    stream = stream_over(backup_socket)
    heard = receive_hello(stream, DEADLINE_SECONDS)
    with FrameConnection(
        stream,
        role=Role.BACKUP,
        generation=heard.generation,
        silence_limit_seconds=5,
        keepalive_seconds=1,
        received_frames=1,
    ) as backup:
        answered = welcome(backup)
        primary = connection_over(primary_socket, Role.PRIMARY)
        primary._encoder.sequence = 1
        assert next_frame(primary).kind is FrameKind.WELCOME
        primary.bind(answered.connection)
        primary.send(FrameKind.PAGES, 0, [b"x"])
        assert next_frame(backup).header.generation == heard.generation


def test_a_hello_that_drips_is_given_up_at_the_deadline(sockets: Pair) -> None:
    primary_socket, backup_socket = sockets()
    ended = threading.Event()

    def drip() -> None:
        for byte in hello_frame():
            if ended.wait(0.02):
                return
            primary_socket.sendall(bytes([byte]))

    dripper = threading.Thread(target=drip)
    dripper.start()
    try:
        with pytest.raises(PeerLost) as caught:
            receive_hello(stream_over(backup_socket), 0.2)
        assert caught.value.reason == ClaimReason.PEER_SILENT
    finally:
        ended.set()
        dripper.join(DEADLINE_SECONDS)


def test_a_peer_that_hangs_up_before_its_hello_is_lost(sockets: Pair) -> None:
    primary_socket, backup_socket = sockets()
    primary_socket.close()
    with pytest.raises(PeerLost) as caught:
        receive_hello(stream_over(backup_socket), DEADLINE_SECONDS)
    assert caught.value.reason == ClaimReason.STREAM_BROKEN


def test_a_hello_whose_words_and_header_disagree_is_refused(sockets: Pair) -> None:
    primary_socket, backup_socket = sockets()
    primary_socket.sendall(hello_frame(generation=8))
    with pytest.raises(FrameRejected) as caught:
        receive_hello(stream_over(backup_socket), DEADLINE_SECONDS)
    assert caught.value.code is RejectionCode.WRONG_GENERATION


def test_somebody_who_speaks_http_is_refused(sockets: Pair) -> None:
    primary_socket, backup_socket = sockets()
    primary_socket.sendall(b"GET / HTTP/1.1\r\n" + b"X" * 64)
    with pytest.raises(FrameRejected, match="bad-magic"):
        receive_hello(stream_over(backup_socket), DEADLINE_SECONDS)


def test_an_address_where_nobody_listens_is_lost_at_once() -> None:
    with listen("127.0.0.1:0") as listener:
        port = listener.getsockname()[1]
    with pytest.raises(PeerLost, match=f"127.0.0.1:{port}") as caught:
        connect(f"127.0.0.1:{port}", 5)
    assert caught.value.reason == ClaimReason.STREAM_BROKEN


def test_a_listener_with_nobody_waiting_accepts_none() -> None:
    with listen("127.0.0.1:0") as listener:
        assert accept(listener) is None


def test_a_port_that_is_taken_is_an_error_and_leaves_no_socket() -> None:
    with listen("127.0.0.1:0") as listener:
        before = len(list(Path("/proc/self/fd").iterdir()))
        with pytest.raises(OSError, match="in use"):
            listen(f"127.0.0.1:{listener.getsockname()[1]}")
        assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_ipv6_works_as_well() -> None:
    with listen("[::1]:0") as listener, connect(f"[::1]:{listener.getsockname()[1]}", 5):
        assert select.select([listener], [], [], DEADLINE_SECONDS)[0]
        accepted = accept(listener)
        assert accepted is not None
        accepted.close()


@pytest.mark.parametrize(
    ("address", "parsed"),
    [
        ("h2:7600", ("h2", 7600)),
        ("10.0.0.1:1", ("10.0.0.1", 1)),
        ("[fd00::1]:65535", ("fd00::1", 65535)),
    ],
)
def test_addresses_are_understood(address: str, parsed: tuple[str, int]) -> None:
    assert parse_address(address) == parsed


@pytest.mark.parametrize("address", ["", "h2", ":7600", "h2:", "h2:x", "h2:65536", "h2:-1", "h2:²"])
def test_an_address_without_host_or_port_is_refused_with_advice(address: str) -> None:
    with pytest.raises(AddressNotUnderstood, match="write host:port"):
        parse_address(address)


def test_waiting_for_a_frame_ends_at_its_deadline(sockets: Pair) -> None:
    _, backup_socket = sockets()
    backup = connection_over(backup_socket, Role.BACKUP)
    assert backup.wait_frame(time.monotonic_ns() + 10_000_000) is None
