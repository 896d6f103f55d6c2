"""Where primaries of other hosts connect: reads the preface, hands the socket to the right worker.

Talks TCP and TLS, through `transport`. At most `HELLO_LIMIT` who connected are dealt with at a
time, each with a deadline; more wait in the kernel's backlog. So nobody who connects and says
nothing keeps others out for long, and however many do, descriptors and threads have an end. Whom
no worker expects is refused here, by the rules of `transport.admission`, in threads that are kept
for it: those of the heartbeats stay free.
"""

import asyncio
import logging
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from holdfast_agent.checkpoint.worker_messages import PeerConnected
from holdfast_agent.core.frames import FrameRejected
from holdfast_agent.core.payloads import Refusal
from holdfast_agent.core.preface import PREFACE_SIZE_BYTES, Preface, decode_preface
from holdfast_agent.host.worker_link import WorkerLink
from holdfast_agent.transport.admission import TurnedAway, turn_away
from holdfast_agent.transport.identity import Identity
from holdfast_agent.transport.opening import listen
from holdfast_api.words import Generation, VmId

LOGGER = logging.getLogger(__name__)
HELLO_SECONDS = 5.0
HELLO_LIMIT = 16
ACCEPT_AGAIN_SECONDS = 0.1


class PeerListener:
    """The host's one port for peers."""

    def __init__(
        self,
        address: str,
        link_of: Callable[[VmId, Generation], WorkerLink | None],
        identity: Identity | None,
    ) -> None:
        """Listen at `address` from now on; `serve` accepts. Without an identity TLS is off."""
        self._listener = listen(address)
        self._link_of = link_of
        self._identity = identity
        self._tasks: set[asyncio.Task[None]] = set()
        self._limit = asyncio.Semaphore(HELLO_LIMIT)
        self._threads = ThreadPoolExecutor(HELLO_LIMIT, thread_name_prefix="refusal")
        self.refused = 0

    async def serve(self) -> None:
        """Accept connections for ever."""
        loop = asyncio.get_running_loop()
        while True:
            await self._limit.acquire()
            try:
                connection, address = await loop.sock_accept(self._listener)
            except OSError as error:  # it has gone again, or there are no descriptors left
                self._limit.release()
                LOGGER.warning("accepting a peer: %s", error)
                await asyncio.sleep(ACCEPT_AGAIN_SECONDS)
                continue
            except BaseException:
                self._limit.release()
                raise
            task = asyncio.create_task(self._receive(connection, f"{address[0]}:{address[1]}"))
            self._tasks.add(task)
            task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._limit.release()

    async def close(self) -> None:
        """Stop listening; connections already handed over go on."""
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _receive(self, connection: socket.socket, address: str) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + HELLO_SECONDS
        with connection:
            try:
                async with asyncio.timeout_at(deadline):
                    preface = decode_preface(await _read_preface(connection))
            except (FrameRejected, OSError, TimeoutError) as error:
                self._refused(address, f"said no preface: {error!r}")
                return
            link = self._link_of(preface.vm, preface.generation)
            if link is not None:
                await self._hand_over(connection, link, preface, address)
                return
            ours = socket.socket(fileno=connection.detach())
        try:
            await loop.run_in_executor(
                self._threads,
                turn_away,
                ours,
                preface,
                _refusal(preface),
                self._identity,
                max(deadline - loop.time(), 0.001),
            )
        except TurnedAway as error:
            self._refused(address, str(error))

    def _refused(self, address: str, why: str) -> None:
        self.refused += 1
        LOGGER.warning("%s was refused: %s", address, why)

    async def _hand_over(
        self, connection: socket.socket, link: WorkerLink, preface: Preface, address: str
    ) -> None:
        message = PeerConnected(
            vm=preface.vm, generation=preface.generation, tls=preface.tls, address=address
        )
        await link.send(message, connection.fileno())


async def _read_preface(connection: socket.socket) -> bytes:
    """Read exactly the preface: what follows is the worker's. Raises OSError."""
    loop = asyncio.get_running_loop()
    connection.setblocking(False)  # noqa: FBT003 - the standard library's signature
    data = b""
    while len(data) < PREFACE_SIZE_BYTES:
        piece = await loop.sock_recv(connection, PREFACE_SIZE_BYTES - len(data))
        if not piece:
            raise ConnectionAbortedError(f"it hung up after {len(data)} bytes")
        data += piece
    return data


def _refusal(preface: Preface) -> Refusal:
    return Refusal(
        code="not-expected",
        explanation=f"this host is not the backup of {preface.vm} in generation "
        f"{preface.generation}, or not yet",
    )
