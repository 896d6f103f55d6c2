"""Authorities and certificates, made once for all tests, and TLS between two sockets."""

import functools
import socket
import ssl
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from tests.integration.transport.threads import both

from holdfast_agent.transport.identity import Identity
from holdfast_agent.transport.tls import shake_hands
from holdfast_api import pki

HANDSHAKE_SECONDS = 20.0
_MAKING = threading.RLock()


@dataclass(frozen=True)
class Authority:
    """An authority in a folder."""

    folder: Path

    def identity(self, host: str, days: int = 1) -> Identity:
        """Return the identity of a host, issued by this authority unless it has one."""
        made = self.folder / "hosts" / host
        with _MAKING:
            if not made.exists():
                pki.issue(self.folder, host, days)
        return identity_in(made, host)


def identity_in(made: Path, host: str) -> Identity:
    """Return the identity whose files are in the folder `made`."""
    return Identity(host, made / "ca.pem", made / "host.pem", made / "host.key")


def authority_in(folder: Path) -> Authority:
    """Make an authority in `folder`."""
    pki.make_authority(folder)
    return Authority(folder)


def cluster() -> Authority:
    """The authority of most tests. Its folder goes with the process."""
    with _MAKING:
        return _cluster()


@functools.cache
def _cluster() -> Authority:
    folder = tempfile.TemporaryDirectory(prefix="holdfast-pki-")
    authority = authority_in(Path(folder.name) / "pki")
    _KEPT.append(folder)
    return authority


_KEPT: list["tempfile.TemporaryDirectory[str]"] = []


def secured(
    primary: socket.socket,
    backup: socket.socket,
    ours: Identity | None = None,
    theirs: Identity | None = None,
) -> tuple[ssl.SSLSocket, ssl.SSLSocket]:
    """Put TLS on a connected pair: h1's as the client, h2's as the server."""
    client = (ours or cluster().identity("h1")).context(is_server=False)
    server = (theirs or cluster().identity("h2")).context(is_server=True)
    made: list[ssl.SSLSocket] = []

    def shake(sock: socket.socket, context: ssl.SSLContext, *, is_server: bool) -> ssl.SSLSocket:
        tls = shake_hands(sock, context, is_server=is_server, timeout_seconds=HANDSHAKE_SECONDS)
        made.append(tls)
        return tls

    try:
        return both(
            lambda: shake(primary, client, is_server=False),
            lambda: shake(backup, server, is_server=True),
        )
    except BaseException:
        for tls in made:  # one side may be content where the other is not
            tls.close()
        raise
