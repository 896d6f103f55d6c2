"""The worker's end of the socket to its agent. Talks AF_UNIX SEQPACKET; owns the socket's file.

The worker listens and the agent connects, so that a worker outlives its agent: when the agent dies
the connection ends and the worker goes on; when an agent returns it finds the socket's file in the
run folder and connects again. Only the newest connection counts.

Sending never waits. A report that does not fit is dropped (the next one replaces it); wants are
repeated by their owner; events and the last word are kept in a bounded queue until they fit.
"""

import array
import contextlib
import errno
import socket
from collections import deque
from pathlib import Path

from pydantic import ValidationError

from holdfast_agent.checkpoint.worker_messages import (
    MESSAGE_LIMIT_BYTES,
    TO_WORKER,
    Finished,
    Happened,
    Introduced,
    ToAgent,
    ToWorker,
)

QUEUE_LIMIT = 256
BUFFER_SIZE_BYTES = 1 << 20


class AgentChannel:
    """A listening socket and at most one agent behind it."""

    def __init__(self, path: Path, introduction: Introduced) -> None:
        """Listen at `path`, replacing what an earlier worker left there."""
        self._path = path
        self._introduction = introduction
        self._agent: socket.socket | None = None
        self._queue: deque[bytes] = deque(maxlen=QUEUE_LIMIT)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._listener.settimeout(0)
        self._listener.bind(str(path))
        self._listener.listen(4)

    @property
    def is_connected(self) -> bool:
        """An agent listens right now."""
        return self._agent is not None

    @property
    def is_drained(self) -> bool:
        """Nothing waits to be sent."""
        return not self._queue

    def filenos(self) -> list[int]:
        """Return the descriptors whose readability means: call `receive`."""
        filenos = [self._listener.fileno()]
        if self._agent is not None:
            filenos.append(self._agent.fileno())
        return filenos

    def introduce(self, introduction: Introduced) -> None:
        """Replace the introduction (the QEMU is known now) and send it."""
        self._introduction = introduction
        self.send(introduction)

    def send(self, message: ToAgent) -> None:
        """Send without waiting; see the module for what happens if it does not fit."""
        data = message.model_dump_json().encode()
        assert len(data) <= MESSAGE_LIMIT_BYTES, (message.type, len(data))
        if isinstance(message, (Happened, Finished)):
            self._queue.append(data)
            self.flush()
        elif self._agent is not None and not self._queue:
            self._send_now(data)

    def flush(self) -> None:
        """Send what is queued, as far as it fits."""
        while self._queue and self._agent is not None and self._send_now(self._queue[0]):
            self._queue.popleft()

    def receive(self, *, takes_descriptors: bool = False) -> list[tuple[ToWorker, int | None]]:
        """Return all messages that are there, each with the descriptor it carried (now ours).

        Without `takes_descriptors` they are closed: a worker that has its primary wants no other.
        """
        self._accept()
        messages: list[tuple[ToWorker, int | None]] = []
        while self._agent is not None:
            try:
                data, ancillary, _, _ = self._agent.recvmsg(MESSAGE_LIMIT_BYTES, 64)
            except BlockingIOError:
                break
            except ConnectionError:
                data, ancillary = b"", []
            descriptor = _descriptor_of(ancillary)
            if descriptor is not None and not takes_descriptors:
                socket.close(descriptor)
                descriptor = None
            if not data:
                self._hang_up()
                break
            try:
                messages.append((TO_WORKER.validate_json(data), descriptor))
            except ValidationError:  # an agent of another version; its next message may be known
                if descriptor is not None:
                    socket.close(descriptor)
        return messages

    def close(self) -> None:
        """Hang up and remove the socket's file. Idempotent."""
        self._hang_up()
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        while True:
            try:
                agent, _ = self._listener.accept()
            except BlockingIOError:
                return
            self._hang_up()
            agent.settimeout(0)
            agent.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_SIZE_BYTES)
            self._agent = agent
            self._send_now(self._introduction.model_dump_json().encode())
            self.flush()

    def _send_now(self, data: bytes) -> bool:
        """Return whether it was sent."""
        assert self._agent is not None
        try:
            self._agent.send(data)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN):
                raise
            self._hang_up()
            return False
        return True

    def _hang_up(self) -> None:
        if self._agent is not None:
            with contextlib.suppress(OSError):
                self._agent.close()
            self._agent = None


def _descriptor_of(ancillary: list[tuple[int, int, bytes]]) -> int | None:
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors = array.array("i")
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
            for extra in descriptors[1:]:
                socket.close(extra)
            return descriptors[0] if descriptors else None
    return None
