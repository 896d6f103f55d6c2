"""Who is let in: preface, certificate, HELLO and what was ordered must agree."""

import contextlib
import dataclasses
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from tests.integration.transport.certificates import cluster
from tests.integration.transport.loopback import DEADLINE_SECONDS, Sockets, hello
from tests.integration.transport.threads import both

from holdfast_agent.core.failures import PeerLost
from holdfast_agent.core.payloads import Hello, Refusal
from holdfast_agent.core.preface import Preface, decode_preface
from holdfast_agent.transport import admission
from holdfast_agent.transport.admission import (
    Admitted,
    Expected,
    Reception,
    TurnedAway,
    admit,
    judge,
    turn_away,
)
from holdfast_agent.transport.connection import FrameConnection
from holdfast_agent.transport.identity import Identity
from holdfast_agent.transport.opening import PeerRefused, accept, greet, listen, reach, welcome
from holdfast_agent.transport.tls import shake_hands
from holdfast_api.words import Role

Pair = Callable[..., Sockets]
EXPECTED = Expected("web", 7, primary="h1", backup="h2")
PREFACE = Preface("web", 7, tls=True)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with contextlib.closing(listen("127.0.0.1:0")) as made:
        yield made


def primary(
    listener: socket.socket,
    said: Hello,
    *,
    preface: Preface = PREFACE,
    identity: Identity | None = None,
    backup: str = "h2",
) -> str:
    """Connect and greet as a primary does; return how it ended."""
    if preface.tls:
        identity = identity or cluster().identity("h1")
    host, port = listener.getsockname()
    try:
        stream = reach(f"{host}:{port}", preface, backup, identity, DEADLINE_SECONDS)
        with FrameConnection(
            stream,
            role=Role.PRIMARY,
            generation=said.generation,
            silence_limit_seconds=DEADLINE_SECONDS,
            keepalive_seconds=1,
        ) as connection:
            greet(connection, said, DEADLINE_SECONDS)
    except PeerRefused as refused:
        return str(refused)
    except PeerLost as lost:
        return lost.explanation
    return "welcome"


def handed_over(listener: socket.socket) -> tuple[socket.socket, Preface]:
    """Return the next connection as an agent passes it on."""
    assert select.select([listener], [], [], DEADLINE_SECONDS)[0]
    sock = accept(listener)
    assert sock is not None
    sock.settimeout(DEADLINE_SECONDS)
    return sock, decode_preface(sock.recv(80, socket.MSG_WAITALL))


def backup(listener: socket.socket, identity: Identity | None) -> str:
    """Let in or turn away as a worker does; return how it ended."""
    sock, preface = handed_over(listener)
    try:
        admitted = admit(sock, preface, EXPECTED, identity, DEADLINE_SECONDS)
    except TurnedAway as error:
        assert sock.fileno() == -1, "the socket is closed"
        return str(error)
    with FrameConnection(
        admitted.stream,
        role=Role.BACKUP,
        generation=admitted.hello.generation,
        silence_limit_seconds=DEADLINE_SECONDS,
        keepalive_seconds=1,
        received_frames=1,
    ) as connection:
        welcome(connection)
        connection.discard_until_end(time.monotonic_ns() + int(DEADLINE_SECONDS * 1e9))
    return "welcome"


@pytest.mark.parametrize("tls", [True, False])
def test_the_expected_primary_is_welcome(listener: socket.socket, *, tls: bool) -> None:
    ends = both(
        lambda: primary(listener, hello(), preface=dataclasses.replace(PREFACE, tls=tls)),
        lambda: backup(listener, cluster().identity("h2") if tls else None),
    )
    assert ends == ("welcome", "welcome")


@pytest.mark.parametrize("tls", [True, False])
@pytest.mark.parametrize(
    ("changes", "preface", "code"),
    [
        ({"vm": "db"}, {"vm": "db"}, "not-expected"),
        ({"generation": 6}, {"generation": 6}, "not-expected"),
        ({"generation": 8}, {"generation": 8}, "not-expected"),
        ({}, {"vm": "db"}, "wrong-preface"),
        ({"generation": 8}, {}, "wrong-preface"),
        ({"backup": "h3"}, {}, "wrong-backup"),
    ],
)
def test_whoever_asks_for_something_else_is_turned_away_and_told_why(
    listener: socket.socket,
    changes: dict[str, object],
    preface: dict[str, object],
    code: str,
    *,
    tls: bool,
) -> None:
    said = dataclasses.replace(PREFACE, tls=tls, **preface)  # type: ignore[arg-type]
    heard, logged = both(
        lambda: primary(listener, hello(**changes), preface=said),
        lambda: backup(listener, cluster().identity("h2") if tls else None),
    )
    assert heard.startswith(code)
    assert logged.startswith(code)


def test_a_host_that_is_not_the_primary_is_turned_away(listener: socket.socket) -> None:
    heard, logged = both(
        lambda: primary(listener, hello(primary="h3"), identity=cluster().identity("h3")),
        lambda: backup(listener, cluster().identity("h2")),
    )
    assert heard.startswith("wrong-primary: the primary of web in generation 7 is h1, not h3")
    assert logged == heard


def test_a_host_that_speaks_in_anothers_name_is_turned_away(listener: socket.socket) -> None:
    heard, logged = both(
        lambda: primary(listener, hello(), identity=cluster().identity("h3")),
        lambda: backup(listener, cluster().identity("h2")),
    )
    assert heard.startswith("wrong-name: HELLO of h1 with a certificate of h3")
    assert logged == heard


def test_a_primary_says_nothing_to_a_host_that_is_not_its_backup(listener: socket.socket) -> None:
    heard, logged = both(
        lambda: primary(listener, hello()),
        lambda: backup(listener, cluster().identity("h3")),
    )
    assert "answers h3 by its certificate, and not h2" in heard
    assert "said no HELLO" in logged


@pytest.mark.parametrize(
    ("theirs", "ours", "heard", "logged"),
    [
        (True, False, "what came is no TLS: is `tls` off there?", "tls-off"),
        (False, True, "tls-required", "tls-required"),
    ],
)
def test_peers_that_do_not_agree_on_tls_both_say_so(
    listener: socket.socket, heard: str, logged: str, *, theirs: bool, ours: bool
) -> None:
    found = both(
        lambda: primary(listener, hello(), preface=dataclasses.replace(PREFACE, tls=theirs)),
        lambda: backup(listener, cluster().identity("h2") if ours else None),
    )
    assert heard in found[0]
    assert found[1].startswith(logged)
    assert "must be the same on every host" in found[1]


@pytest.mark.parametrize("tls", [True, False])
def test_whom_nobody_expects_is_told_so_by_the_same_rules(
    listener: socket.socket, *, tls: bool
) -> None:
    identity = cluster().identity("h2") if tls else None

    def refuse() -> None:
        sock, preface = handed_over(listener)
        refusal = Refusal(code="not-expected", explanation="not yet")
        turn_away(sock, preface, refusal, identity, DEADLINE_SECONDS)

    preface = dataclasses.replace(PREFACE, tls=tls)
    heard, _ = both(lambda: primary(listener, hello(), preface=preface), refuse)
    assert heard == "not-expected: not yet"


def test_a_certified_peer_that_says_no_hello_is_turned_away(tcp_sockets: Pair) -> None:
    ours, theirs = tcp_sockets()
    context = cluster().identity("h1").context(is_server=False)

    def admitting() -> str:
        with pytest.raises(TurnedAway) as caught:
            admit(theirs, PREFACE, EXPECTED, cluster().identity("h2"), 0.5)
        return str(caught.value)

    tls, logged = both(
        lambda: shake_hands(ours, context, is_server=False, timeout_seconds=DEADLINE_SECONDS),
        admitting,
    )
    tls.close()
    assert "no HELLO within" in logged


def test_without_tls_a_name_in_a_certificate_is_not_asked_for() -> None:
    assert judge(dataclasses.replace(PREFACE, tls=False), hello(), None, EXPECTED) is None


# --- reception ------------------------------------------------------------------------------------


def results(reception: Reception, count: int) -> list[Admitted | str]:
    found: list[Admitted | str] = []
    deadline = time.monotonic() + DEADLINE_SECONDS
    while len(found) < count and time.monotonic() < deadline:
        select.select([reception], [], [], 0.1)
        found += reception.results()
    return found


def test_somebody_who_says_nothing_does_not_keep_the_primary_out(
    listener: socket.socket, tcp_sockets: Pair
) -> None:
    silent = [tcp_sockets() for _ in range(admission.GREETED_MAX - 1)]
    with contextlib.closing(Reception(EXPECTED, cluster().identity("h2"))) as reception:
        for _, end in silent:
            reception.greet(end, PREFACE, "silent")
        outcome: list[str] = []
        caller = threading.Thread(target=lambda: outcome.append(primary(listener, hello())))
        caller.start()
        reception.greet(*handed_over(listener), "primary")
        (admitted,) = results(reception, 1)
        assert isinstance(admitted, Admitted)
        assert admitted.hello == hello()
        admitted.stream.close()
        caller.join(DEADLINE_SECONDS)
        for ours, _ in silent:
            ours.close()
        assert len(results(reception, len(silent))) == len(silent)


def test_more_than_can_be_greeted_at_once_are_turned_away(tcp_sockets: Pair) -> None:
    with contextlib.closing(Reception(EXPECTED, cluster().identity("h2"))) as reception:
        silent = [tcp_sockets() for _ in range(admission.GREETED_MAX + 1)]
        for _, end in silent:
            reception.greet(end, PREFACE, "10.0.0.9:1")
        assert results(reception, 1) == ["10.0.0.9:1: too many connect at once"]
        for ours, _ in silent:
            ours.close()
        ends = results(reception, admission.GREETED_MAX)  # who hangs up makes room
        assert len(ends) == admission.GREETED_MAX


def test_strangers_are_turned_away_and_the_primary_behind_them_is_let_in(
    listener: socket.socket,
) -> None:
    with contextlib.closing(Reception(EXPECTED, cluster().identity("h2"))) as reception:
        calls = [
            lambda: primary(listener, hello(), identity=cluster().identity("h3")),
            lambda: primary(listener, hello()),
        ]
        found = []
        for call in calls:
            caller = threading.Thread(target=call)
            caller.start()
            reception.greet(*handed_over(listener), "x")
            found += results(reception, 1)
            if isinstance(found[-1], Admitted):
                found[-1].stream.close()
            caller.join(DEADLINE_SECONDS)
    assert isinstance(found[0], str)
    assert found[0].startswith("x: wrong-name")
    assert isinstance(found[1], Admitted)


def test_whoever_comes_after_the_end_is_let_go(listener: socket.socket) -> None:
    reception = Reception(EXPECTED, cluster().identity("h2"))
    outcome: list[str] = []
    caller = threading.Thread(target=lambda: outcome.append(primary(listener, hello())))
    caller.start()
    sock, preface = handed_over(listener)
    reception.close()
    reception.greet(sock, preface, "late")
    caller.join(DEADLINE_SECONDS)
    assert outcome == ["the peer hung up between frames"]
