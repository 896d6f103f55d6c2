"""Who is let in: the backup's side of a connection that begins. Talks TCP and TLS; owns threads.

Four things must agree before a primary is welcomed: what its preface said, what its HELLO says,
what this host was ordered, and the name in its certificate. Whoever is not let in is told why by a
REFUSED frame, inside TLS wherever TLS is on, so that nobody else can say no in a backup's name.

A worker has nothing else to do until its primary is there, but somebody who connects and says
nothing must not keep the primary out. So `Reception` greets each in a thread of its own, a few at a
time and each with a deadline.
"""

import contextlib
import os
import queue
import socket
import ssl
import threading
import time
from dataclasses import dataclass

from holdfast_agent.core.failures import PeerLost
from holdfast_agent.core.frames import FrameRejected
from holdfast_agent.core.payloads import Hello, Refusal
from holdfast_agent.core.preface import Preface
from holdfast_agent.transport.identity import Identity, IdentityUnusable, host_of
from holdfast_agent.transport.opening import receive_hello, refuse
from holdfast_agent.transport.stream import Stream
from holdfast_agent.transport.tcp import TcpStream
from holdfast_agent.transport.tls import ALERT_SECONDS, TlsStream, linger, shake_hands
from holdfast_api.words import Generation, HostId, VmId

ADMISSION_SECONDS = 5.0
GREETED_MAX = 8
"""At once, by one worker."""


class TurnedAway(Exception):  # noqa: N818 - reads as a sentence where it is raised
    """Somebody connected and was not let in; the connection is closed."""


@dataclass(frozen=True)
class Expected:
    """Whom a worker waits for."""

    vm: VmId
    generation: Generation
    primary: HostId
    backup: HostId


@dataclass(frozen=True)
class Admitted:
    """The expected primary, proven as far as this host demands; the stream is the holder's."""

    hello: Hello
    stream: Stream


def admit(
    sock: socket.socket,
    preface: Preface,
    expected: Expected,
    identity: Identity | None,
    timeout_seconds: float = ADMISSION_SECONDS,
) -> Admitted:
    """Shake hands, hear the HELLO, and let in only who is expected; blocks at most so long.

    Takes the socket over. Raises TurnedAway, with words for the log; the socket is closed then.
    """
    deadline = time.monotonic() + timeout_seconds
    stream, name = _begin(sock, preface, identity, timeout_seconds)
    try:
        hello = receive_hello(stream, max(deadline - time.monotonic(), 0.001))
    except (FrameRejected, PeerLost, OSError) as error:
        stream.close()
        raise TurnedAway(f"said no HELLO: {error}") from error
    refusal = judge(preface, hello, name, expected)
    if refusal is not None:
        refuse(stream, hello.generation, refusal)
        stream.close()
        raise TurnedAway(f"{refusal.code}: {refusal.explanation}")
    return Admitted(hello, stream)


def turn_away(
    sock: socket.socket,
    preface: Preface,
    refusal: Refusal,
    identity: Identity | None,
    timeout_seconds: float = ADMISSION_SECONDS,
) -> None:
    """Refuse somebody whom nobody expects, as properly as if it were let in; blocks so long.

    Takes the socket over and closes it. Raises TurnedAway for who is not even a host.
    """
    deadline = time.monotonic() + timeout_seconds
    stream, _ = _begin(sock, preface, identity, timeout_seconds)
    try:
        hello = receive_hello(stream, max(deadline - time.monotonic(), 0.001))
        refuse(stream, hello.generation, refusal)
    except (FrameRejected, PeerLost, OSError) as error:
        raise TurnedAway(f"said no HELLO: {error}") from error
    finally:
        stream.close()


def judge(
    preface: Preface, hello: Hello, certified: HostId | None, expected: Expected
) -> Refusal | None:
    """Return why this primary is not let in, or None. Pure.

    `certified` is the name in its certificate; None where TLS is off.
    """
    if certified is not None and certified != hello.primary:
        return Refusal(
            code="wrong-name",
            explanation=f"HELLO of {hello.primary} with a certificate of {certified}: each host "
            "needs a certificate of its own",
        )
    if (preface.vm, preface.generation) != (hello.vm, hello.generation):
        return Refusal(
            code="wrong-preface",
            explanation=f"HELLO for {hello.vm} in generation {hello.generation} after a preface "
            f"for {preface.vm} in generation {preface.generation}",
        )
    if (hello.vm, hello.generation) != (expected.vm, expected.generation):
        return Refusal(
            code="not-expected",
            explanation=f"expected is {expected.vm} in generation {expected.generation}, not "
            f"{hello.vm} in generation {hello.generation}",
        )
    if hello.primary != expected.primary:
        return Refusal(
            code="wrong-primary",
            explanation=f"the primary of {expected.vm} in generation {expected.generation} is "
            f"{expected.primary}, not {hello.primary}",
        )
    if hello.backup != expected.backup:
        return Refusal(
            code="wrong-backup",
            explanation=f"this is {expected.backup}, not {hello.backup}: two hosts with one "
            "address, or the address of another",
        )
    return None


def _begin(
    sock: socket.socket, preface: Preface, identity: Identity | None, timeout_seconds: float
) -> tuple[Stream, HostId | None]:
    """Return the stream and the name in the peer's certificate. Raises TurnedAway."""
    if preface.tls != (identity is not None):
        _answer_in_the_clear(sock, preface)
    if identity is None:
        return _stream_over(sock), None
    try:
        context = identity.context(is_server=True)
    except IdentityUnusable as error:
        sock.close()
        raise TurnedAway(f"this host can not prove who it is: {error}") from error
    try:
        tls = shake_hands(sock, context, is_server=True, timeout_seconds=timeout_seconds)
    except PeerLost as error:
        raise TurnedAway(error.explanation) from error
    name = host_of(tls.getpeercert())
    if name is None:
        tls.close()
        raise TurnedAway("its certificate names no host: `holdfast pki issue HOST` makes one")
    return _stream_over(tls), name


def _stream_over(sock: socket.socket) -> Stream:
    """Raises TurnedAway for a peer that has gone meanwhile."""
    try:
        return TlsStream(sock) if isinstance(sock, ssl.SSLSocket) else TcpStream(sock)
    except OSError as error:
        sock.close()
        raise TurnedAway(f"it has gone: {error}") from error


def _answer_in_the_clear(sock: socket.socket, preface: Preface) -> None:
    """Tell a peer of the other conviction, in the only way it may understand. Raises TurnedAway."""
    if preface.tls:
        code, words = "tls-off", "it demands TLS, which is off here"
    else:
        code, words = "tls-required", "it speaks without TLS, which is required here"
    explanation = f"{words}: `tls` must be the same on every host"
    stream = _stream_over(sock)
    refuse(stream, preface.generation, Refusal(code=code, explanation=explanation))
    linger(sock, ALERT_SECONDS)
    stream.close()
    raise TurnedAway(f"{code}: {explanation}")


class Reception:
    """Greets who connects until the expected primary is there. One thread uses it."""

    def __init__(self, expected: Expected, identity: Identity | None) -> None:
        """Expect one primary; `close` ends the waiting."""
        self._expected = expected
        self._identity = identity
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._closed = False
        self._greeted = 0
        self._results: queue.SimpleQueue[Admitted | str] = queue.SimpleQueue()

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when there are results."""
        return self._event

    def greet(self, sock: socket.socket, preface: Preface, address: str) -> None:
        """Take over the socket of somebody at `address` and begin to greet it."""
        with self._lock:
            is_full = self._greeted >= GREETED_MAX
            self._greeted += not is_full
        if is_full:
            sock.close()
            self._put(f"{address}: too many connect at once")
            return
        threading.Thread(
            target=self._greet, args=(sock, preface, address), name="greeting", daemon=True
        ).start()

    def results(self) -> list[Admitted | str]:
        """Return who was let in, and in words who was not, since the last call."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._event)
        return self._unseen()

    def close(self) -> None:
        """Let nobody else in. Who is being greeted is let go when its deadline ends that."""
        with self._lock:
            self._closed = True
            os.close(self._event)
        for result in self._unseen():
            if isinstance(result, Admitted):
                result.stream.close()

    def _unseen(self) -> list[Admitted | str]:
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._results.get_nowait())
        return found

    def _greet(self, sock: socket.socket, preface: Preface, address: str) -> None:
        try:
            result: Admitted | str = admit(sock, preface, self._expected, self._identity)
        except TurnedAway as error:
            result = f"{address}: {error}"
        finally:
            with self._lock:
                self._greeted -= 1
        self._put(result)

    def _put(self, result: Admitted | str) -> None:
        with self._lock:
            if not self._closed:
                self._results.put(result)
                os.eventfd_write(self._event, 1)
                return
        if isinstance(result, Admitted):
            result.stream.close()
