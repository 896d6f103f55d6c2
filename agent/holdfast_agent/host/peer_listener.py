"""Where primaries of other hosts connect: reads the HELLO, hands the socket to the right worker.

Talks TCP, through `transport.opening`; each HELLO is read in a thread with a deadline, at most
`HELLO_LIMIT` at a time, so that nobody who connects and says nothing keeps others out for long.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable

from holdfast_agent.checkpoint.worker_messages import PeerConnected
from holdfast_agent.core.failures import PeerLost
from holdfast_agent.core.frames import FrameRejected
from holdfast_agent.core.payloads import Hello, Refusal
from holdfast_agent.host.worker_link import WorkerLink
from holdfast_agent.transport.opening import listen, receive_hello, refuse
from holdfast_api.words import Generation, VmId

LOGGER = logging.getLogger(__name__)
HELLO_SECONDS = 5.0
HELLO_LIMIT = 16


class PeerListener:
    """The host's one port for peers."""

    def __init__(
        self, address: str, link_of: Callable[[VmId, Generation], WorkerLink | None]
    ) -> None:
        """Listen at `address` from now on; `serve` accepts."""
        self._listener = listen(address)
        self._link_of = link_of
        self._tasks: set[asyncio.Task[None]] = set()
        self._limit = asyncio.Semaphore(HELLO_LIMIT)
        self.refused = 0

    async def serve(self) -> None:
        """Accept connections for ever."""
        loop = asyncio.get_running_loop()
        while True:
            connection, address = await loop.sock_accept(self._listener)
            task = asyncio.create_task(self._greet(connection, str(address)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Stop listening; connections already handed over go on."""
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _greet(self, connection: socket.socket, address: str) -> None:
        async with self._limit:
            with contextlib.closing(connection):
                try:
                    hello = await asyncio.to_thread(receive_hello, connection, HELLO_SECONDS)
                except (FrameRejected, PeerLost, OSError) as error:
                    self.refused += 1
                    LOGGER.warning("%s said no HELLO: %s", address, error)
                    return
                await self._hand_over(connection, hello)

    async def _hand_over(self, connection: socket.socket, hello: Hello) -> None:
        link = self._link_of(hello.vm, hello.generation)
        if link is None:
            refuse(
                connection,
                hello.generation,
                Refusal(
                    code="not-expected",
                    explanation=f"this host is not the backup of {hello.vm} in generation "
                    f"{hello.generation}, or not yet",
                ),
            )
            return
        connection.setblocking(False)  # noqa: FBT003 - the standard library's signature
        await link.send(PeerConnected(hello=hello.model_dump_json()), connection.fileno())
