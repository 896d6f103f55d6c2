"""TLS 1.3 over TCP as a stream. Talks TCP through the `ssl` module; owns the socket it is given.

Theory of operation. One record carries at most 16 KiB, so `send` cuts what it is given into records
of exactly that size (small pieces are joined: the head of a frame travels with its first pages) and
`receive_into` decrypts record after record until its target is full or nothing more is there. The
cut depends on nothing but the position, so a record that found no room is offered again with the
same bytes, which is what OpenSSL asks for.

One lock stands around every call into OpenSSL: the interpreter's lock is released in there, a
session bears one call at a time, and keep-alives are sent by a thread of their own. It is never
held while waiting.

The end of the stream is TCP's own. A close_notify would say nothing that matters: every end of a
stream is a lost peer, and an end that is *meant* is told by a FAREWELL, which is encrypted and
authentic like all that was said before it. So direction by direction can be shut down, as over TCP.

What it does not do: new keys within a connection. `ssl` has no call for it. RFC 8446, section 5.5,
asks for them after 2^24.5 full records of AES-GCM, which are 388 GB, to keep its margin of 2^-57;
the margin is 2^-45 after 25 TB. ChaCha20-Poly1305 knows no such bound.

Source: RFC 8446; ssl and OpenSSL 3 manuals: SSL_write (partial writes, moving buffers), SSL_read.
"""

import contextlib
import errno
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence

from holdfast_agent.core.failures import PeerLost
from holdfast_agent.transport.stream import Readiness
from holdfast_agent.transport.tcp import limit_unconfirmed, poll_socket
from holdfast_api.words import ClaimReason

RECORD_BYTES = 16 * 1024
"""The most that a record of TLS carries (RFC 8446, section 5.1)."""
ALERT_SECONDS = 1.0
"""So long a connection that failed is kept, so that the peer can read the reason."""

NO_TLS = "what came is no TLS: is `tls` off there? It must be the same on every host"
REASONS = {
    "WRONG_VERSION_NUMBER": NO_TLS,
    "RECORD_LAYER_FAILURE": NO_TLS,
    "UNSUPPORTED_PROTOCOL": "it speaks an older TLS than 1.3",
    "TLSV1_ALERT_PROTOCOL_VERSION": "it speaks an older TLS than 1.3",
    "TLSV1_ALERT_UNKNOWN_CA": "it does not know the authority of our certificate: give both hosts "
    "the same ca.pem",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it saw no certificate of ours",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it has no certificate: `holdfast pki issue` makes one",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "our certificate has expired: "
    "`holdfast pki issue HOST --renew` makes a new one, which is used at once",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it does not accept our certificate",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "it does not accept our certificate for this use",
    "TLSV1_ALERT_DECRYPT_ERROR": "what we sent was damaged on its way",
    "SSLV3_ALERT_BAD_RECORD_MAC": "what we sent was damaged on its way",
    "DECRYPTION_FAILED_OR_BAD_RECORD_MAC": "what it sent was damaged on its way",
}
"""What an operator should know of OpenSSL's reasons."""


class TlsStream:
    """Port `Stream` over a TLS session whose handshake is done."""

    def __init__(self, tls: ssl.SSLSocket) -> None:
        """Take over the socket, which never blocks from now on."""
        tls.setblocking(False)  # noqa: FBT003 - the standard library's signature
        tls.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._tls = tls
        self._lock = threading.Lock()
        self._failure: OSError | None = None

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._tls.fileno()

    def send(self, views: Sequence[memoryview]) -> int:
        """Encrypt and write record after record while the kernel has room."""
        sent = 0
        for record in records_of(views):
            try:
                with self._lock:
                    sent += self._tls.send(record)
            except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                if sent:
                    return sent
                raise BlockingIOError(errno.EAGAIN, "no room") from None
            except ssl.SSLError as error:
                raise _broken(error) from error
        return sent

    def receive_into(self, target: memoryview) -> int:
        """Read and decrypt what is there."""
        if self._failure is not None:
            raise self._failure
        filled = 0
        while filled < len(target):
            try:
                with self._lock:
                    count = self._tls.recv_into(target[filled:])
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                if filled:
                    return filled
                raise BlockingIOError(errno.EAGAIN, "nothing there") from None
            except OSError as error:
                self._failure = _broken(error) if isinstance(error, ssl.SSLError) else error
                if filled:  # what came whole before it is handed out first
                    return filled
                raise self._failure from error
            if count == 0:
                return filled
            filled += count
        return filled

    def wait(self, *, readable: bool, writable: bool, timeout_ms: float) -> Readiness:
        """Poll the socket; what was decrypted and not handed out yet counts as readable."""
        with self._lock:
            is_pending = readable and self._tls.pending() > 0
        ready = poll_socket(
            self._tls,
            readable=readable,
            writable=writable,
            timeout_ms=0 if is_pending or self._failure is not None else timeout_ms,
        )
        return Readiness(ready.readable or is_pending or self._failure is not None, ready.writable)

    def limit_silence(self, silence_limit_seconds: float) -> None:
        """Let the kernel give up when the peer's confirms nothing for so long."""
        limit_unconfirmed(self._tls, silence_limit_seconds)

    def end_sending(self) -> None:
        """Shut our direction down, if it still stands."""
        _shut_down_sending(self._tls)

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self._tls.close()


def records_of(views: Sequence[memoryview]) -> Iterator[memoryview]:
    """Cut the bytes of `views` into records: all of RECORD_BYTES, but for the last."""
    joined = bytearray()
    for view in views:
        at = 0
        if joined:
            at = min(RECORD_BYTES - len(joined), len(view))
            joined += view[:at]
            if len(joined) == RECORD_BYTES:
                yield memoryview(joined)
                joined = bytearray()
        while len(view) - at >= RECORD_BYTES:
            yield view[at : at + RECORD_BYTES]
            at += RECORD_BYTES
        joined += view[at:]
    if joined:
        yield memoryview(joined)


def shake_hands(
    sock: socket.socket, context: ssl.SSLContext, *, is_server: bool, timeout_seconds: float
) -> ssl.SSLSocket:
    """Begin TLS on a connected socket; blocks till then, at most so long.

    Takes the socket over: on errors it is closed, after the peer had a moment to read the reason.
    Raises PeerLost, with words for the operator of either host.
    """
    deadline = time.monotonic() + timeout_seconds
    try:
        sock.setblocking(False)  # noqa: FBT003 - the standard library's signature
        tls = context.wrap_socket(
            sock,
            server_side=is_server,
            do_handshake_on_connect=False,
            suppress_ragged_eofs=False,
        )
    except OSError as error:
        sock.close()
        raise PeerLost(ClaimReason.STREAM_BROKEN, f"no TLS: {error}") from error
    try:
        while not _step(tls, deadline):
            pass
    except TimeoutError as error:
        tls.close()
        raise PeerLost(
            ClaimReason.PEER_SILENT, f"no TLS handshake within {timeout_seconds} s"
        ) from error
    except OSError as error:
        linger(tls, ALERT_SECONDS)
        tls.close()
        raise PeerLost(ClaimReason.PEER_FAILED, f"no TLS: {words_of(error)}") from error
    return tls


def _step(tls: ssl.SSLSocket, deadline: float) -> bool:
    """Go on with the handshake; say whether it is done. Raises TimeoutError at the deadline."""
    remaining_ms = (deadline - time.monotonic()) * 1000
    if remaining_ms <= 0:
        raise TimeoutError
    try:
        tls.do_handshake()
    except ssl.SSLWantReadError:
        poll_socket(tls, readable=True, writable=False, timeout_ms=remaining_ms)
    except ssl.SSLWantWriteError:
        poll_socket(tls, readable=False, writable=True, timeout_ms=remaining_ms)
    else:
        return True
    return False


def linger(sock: socket.socket, seconds: float) -> None:
    """Say that nothing more will be sent, and forget what comes until the peer hangs up.

    Closing with unread bytes resets a connection, and what was said last may be lost with it.
    """
    _shut_down_sending(sock)
    deadline = time.monotonic() + seconds
    forgotten = bytearray(RECORD_BYTES)
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    with contextlib.suppress(OSError):
        while (remaining := deadline - time.monotonic()) > 0 and poller.poll(remaining * 1000):
            # Below TLS: the bytes are of no interest any more, only their end is.
            if not os.readv(sock.fileno(), [forgotten]):
                return


def _shut_down_sending(sock: socket.socket) -> None:
    """Shut the direction down below TLS, whose own way ends reading as well."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_WR)


def words_of(error: OSError) -> str:
    """Return what failed, in words that say what to do where that is known."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _of_certificate(error)
    if isinstance(error, ssl.SSLError):
        reason = error.reason or error.strerror or str(error)
        return REASONS.get(reason, f"{reason}")
    return error.strerror or str(error)


def _of_certificate(error: ssl.SSLCertVerificationError) -> str:
    said = error.verify_message
    if "expired" in said:
        return f"its {said}: `holdfast pki issue HOST --renew` makes a new one for that host"
    if "issuer" in said or "self-signed" in said:
        return f"its certificate is not of our authority ({said}): give both hosts the same ca.pem"
    return f"its certificate is not accepted: {said}"


def _broken(error: ssl.SSLError) -> OSError:
    """Return the error of a session that broke, as an error of the carrier."""
    return ConnectionAbortedError(errno.ECONNABORTED, words_of(error))
