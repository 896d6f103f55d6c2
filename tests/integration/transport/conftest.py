"""Connected pairs of loopback sockets, closed again after each test."""

import contextlib
import select
import socket
from collections.abc import Callable, Iterator

import pytest
from tests.integration.transport.certificates import secured
from tests.integration.transport.loopback import DEADLINE_SECONDS, Sockets

from holdfast_agent.transport.opening import accept, connect, listen


@pytest.fixture(params=["tcp", "tls"])
def sockets(
    request: pytest.FixtureRequest, tcp_sockets: Callable[..., Sockets]
) -> Iterator[Callable[..., Sockets]]:
    """Make pairs of connected sockets, with and without TLS: (primary's, backup's)."""
    with contextlib.ExitStack() as stack:

        def make(buffer_bytes: int = 0) -> Sockets:
            primary, backup = secured(*tcp_sockets(buffer_bytes))
            for sock in (primary, backup):
                sock.setblocking(True)
                stack.enter_context(sock)
            return primary, backup

        yield make if request.param == "tls" else tcp_sockets


@pytest.fixture
def tcp_sockets() -> Iterator[Callable[..., Sockets]]:
    """Make pairs of connected sockets: (primary's, backup's)."""
    with contextlib.ExitStack() as stack:

        def make(buffer_bytes: int = 0) -> Sockets:
            listener = stack.enter_context(contextlib.closing(listen("127.0.0.1:0")))
            if buffer_bytes:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
            host, port = listener.getsockname()
            primary = stack.enter_context(connect(f"{host}:{port}", 5))
            if buffer_bytes:
                primary.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
            select.select([listener], [], [], DEADLINE_SECONDS)
            backup = accept(listener)
            assert backup is not None
            return primary, stack.enter_context(backup)

        yield make
