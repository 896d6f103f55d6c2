"""The clients that tests and the demo judge by, against a peer that says what we want."""

import socket
import threading
from collections.abc import Sequence

import pytest

from holdfast_lab.clients import CountingClient, RedisConnection
from holdfast_lab.errors import LabError


def connection_to(replies: Sequence[bytes]) -> RedisConnection:
    """Return a connection whose peer answers each command with the next reply, then hangs up."""
    listening = socket.create_server(("127.0.0.1", 0))
    address = listening.getsockname()

    def serve() -> None:
        peer, _ = listening.accept()
        listening.close()
        with peer:
            for reply in replies:
                if not peer.recv(4096):
                    return
                for piece in (reply[:1], reply[1:]):
                    peer.sendall(piece)

    threading.Thread(target=serve, daemon=True).start()
    return RedisConnection(socket.create_connection(address, timeout=10))


def test_answers_are_numbers_words_or_nothing() -> None:
    replies = [b"+PONG\r\n", b":41\r\n", b"$4\r\na\r\nb\r\n", b"$-1\r\n"]
    with connection_to(replies) as connection:
        assert [connection.command("x") for _ in replies] == ["PONG", 41, "a\r\nb", None]


def test_an_error_of_redis_is_an_error_here() -> None:
    with connection_to([b"-ERR no\r\n"]) as connection, pytest.raises(LabError, match="ERR no"):
        connection.command("x")


def count(replies: Sequence[bytes]) -> CountingClient:
    client = CountingClient(connection_to(replies))
    client.start()
    client.wait_for_count(1_000_000, 10)
    return client


def test_a_lost_and_a_repeated_reply_are_noticed() -> None:
    seen = count([b":1\r\n", b":3\r\n", b":3\r\n", b":4\r\n"]).stop()
    assert seen.replies == 4
    assert seen.wrong == [(2, 3), (4, 3)]


def test_a_connection_that_ends_is_noticed() -> None:
    seen = count([b":1\r\n"]).stop()
    assert seen.replies == 1
    assert seen.fault is not None
    assert seen.fault.startswith("ConnectionResetError")


def test_waiting_for_a_reply_ends_when_the_connection_does() -> None:
    client = count([b":1\r\n"])
    first = client.wait_for_reply(after=0.0, deadline_seconds=10)
    assert first is not None
    assert client.wait_for_reply(after=first, deadline_seconds=10) is None
    client.stop()


def test_the_longest_silence_between_replies_is_known() -> None:
    client = count([b":1\r\n", b":2\r\n", b":3\r\n"])
    times = list(client._reply_times)
    longest = max(times[1] - times[0], times[2] - times[1])
    assert client.stall_seconds(since=0.0) == longest
    assert client.stall_seconds(since=times[1]) == times[2] - times[1]
    assert client.stall_seconds(since=times[2]) == 0.0
    client.stop()
