"""The agent's end of the socket to one worker. Talks AF_UNIX SEQPACKET within asyncio.

The worker owns the socket's file; this end connects, reads messages until the worker hangs up, and
sends orders, verdicts and peers' sockets.
"""

import array
import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

from pydantic import ValidationError

from holdfast_agent.checkpoint.worker_messages import (
    MESSAGE_LIMIT_BYTES,
    TO_AGENT,
    Introduced,
    ToAgent,
    ToWorker,
)

LOGGER = logging.getLogger(__name__)
SEND_TIMEOUT_SECONDS = 2.0


class WorkerUnreachable(Exception):  # noqa: N818 - reads as a sentence where it is raised
    """Nobody listens at the socket, or the worker does not introduce itself."""

    def __init__(self, path: Path, cause: Exception) -> None:
        """Keep whether somebody may live there all the same."""
        super().__init__(f"{path}: {cause}")
        self.is_dead = isinstance(cause, ConnectionRefusedError | FileNotFoundError)


class WorkerLink:
    """A connection to a living worker."""

    def __init__(self, connection: socket.socket, introduction: Introduced, path: Path) -> None:
        """Use `connect` instead."""
        self._connection = connection
        self.introduction = introduction
        self.path = path

    @classmethod
    async def connect(cls, path: Path, timeout_seconds: float) -> "WorkerLink":
        """Connect to the worker at `path` and wait for its introduction.

        Raises WorkerUnreachable, leaving nothing open.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        connection.settimeout(0)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_seconds):
                connection.connect(str(path))
                data = await loop.sock_recv(connection, MESSAGE_LIMIT_BYTES)
                message = TO_AGENT.validate_json(data)
        except (OSError, TimeoutError, ValidationError) as error:
            connection.close()
            raise WorkerUnreachable(path, error) from error
        if not isinstance(message, Introduced):
            connection.close()
            raise WorkerUnreachable(path, ValueError(f"{message.type} before an introduction"))
        return cls(connection, message, path)

    async def read(self, handle: Callable[["WorkerLink", ToAgent], Awaitable[None]]) -> None:
        """Hand every message to `handle` until the worker hangs up."""
        while data := await self._receive():
            try:
                message = TO_AGENT.validate_json(data)
            except ValidationError as error:
                LOGGER.warning("worker of %s: %s", self.introduction.vm, error)
                continue
            if isinstance(message, Introduced):
                self.introduction = message
            await handle(self, message)

    async def _receive(self) -> bytes:
        """Return the next message; nothing when the worker has hung up and all was read.

        A worker that left without reading our last message is a reset connection, which the kernel
        says once and before the worker's own last words.
        """
        loop = asyncio.get_running_loop()
        try:
            return await loop.sock_recv(self._connection, MESSAGE_LIMIT_BYTES)
        except ConnectionResetError:
            with contextlib.suppress(ConnectionError):
                return await loop.sock_recv(self._connection, MESSAGE_LIMIT_BYTES)
        except ConnectionError:
            pass
        return b""

    async def send(self, message: ToWorker, descriptor: int | None = None) -> bool:
        """Send a message, with a copy of `descriptor` if given; return whether it went out."""
        data = message.model_dump_json().encode()
        deadline = asyncio.get_running_loop().time() + SEND_TIMEOUT_SECONDS
        ancillary = []
        if descriptor is not None:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
        while asyncio.get_running_loop().time() < deadline:
            try:
                self._connection.sendmsg([data], ancillary)
            except BlockingIOError:
                await asyncio.sleep(0.01)
            except OSError:
                return False
            else:
                return True
        return False

    def close(self) -> None:
        """Hang up; the worker goes on."""
        self._connection.close()
