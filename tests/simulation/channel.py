"""Both ends of the socket between an agent and its worker, without the socket.

The worker's end outlives agents; the agent's end is made anew by each. What is repeated until it is
answered may be lost when there is no agent, what happened once waits for the next one; this is what
`host/agent_channel` and `host/worker_link` do over AF_UNIX.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path

from tests.simulation.kernel import Kernel, SimulatedProcess

from holdfast_agent.checkpoint.worker_messages import (
    Finished,
    Happened,
    Introduced,
    ToAgent,
    ToWorker,
    WantClaim,
)
from holdfast_agent.host.worker_link import WorkerUnreachable

CONNECT_SECONDS = 0.001


class SimulatedChannel:
    """Port `AgentPort`: the worker's end."""

    def __init__(self, kernel: Kernel, path: Path, introduction: Introduced) -> None:
        self.path = path
        self.introduction = introduction
        self.is_closed = False
        self.process: SimulatedProcess | None = None
        self.link: SimulatedLink | None = None
        self.on_claim: Callable[[], None] = lambda: None
        self._kernel = kernel
        self._inbox: deque[tuple[ToWorker, int | None]] = deque()
        self._queue: deque[ToAgent] = deque(maxlen=256)
        self._descriptor = kernel.descriptor(lambda: bool(self._inbox))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    @property
    def is_listening(self) -> bool:
        return not self.is_closed and self.process is not None and not self.process.has_ended

    @property
    def is_drained(self) -> bool:
        return not self._queue

    def filenos(self) -> list[int]:
        return [self._descriptor]

    def introduce(self, introduction: Introduced) -> None:
        self.introduction = introduction
        self.send(introduction)

    def send(self, message: ToAgent) -> None:
        if isinstance(message, WantClaim):
            self.on_claim()
        if isinstance(message, (Happened, Finished)):
            self._queue.append(message)
            self.flush()
        elif self.link is not None:
            self.link.hear(message)

    def flush(self) -> None:
        while self._queue and self.link is not None:
            self.link.hear(self._queue.popleft())

    def receive(self) -> list[tuple[ToWorker, int | None]]:
        messages = list(self._inbox)
        self._inbox.clear()
        return messages

    def close(self) -> None:
        """Hang up, and take the socket's file away."""
        if not self.is_closed:
            self.hang_up()
            self.path.unlink(missing_ok=True)

    def hang_up(self) -> None:
        """The process is gone; its file stays."""
        self.is_closed = True
        if self.link is not None:
            self.link.lose_worker()
            self.link = None

    # --- the agent's side -------------------------------------------------------------------------

    def accept(self, link: "SimulatedLink") -> None:
        if self.link is not None:
            self.link.lose_worker()
        self.link = link
        link.hear(self.introduction)
        self.flush()

    def deliver(self, message: ToWorker, descriptor: int | None) -> None:
        self._inbox.append((message, descriptor))


class SimulatedLink:
    """What `supervisor` uses of `WorkerLink`: the agent's end."""

    def __init__(self, channel: SimulatedChannel) -> None:
        self.introduction = channel.introduction
        self.path = channel.path
        self._channel = channel
        self._heard: deque[ToAgent] = deque()
        self._news = asyncio.Event()
        self._is_over = False

    @classmethod
    async def open(cls, channel: SimulatedChannel | None, path: Path) -> "SimulatedLink":
        """Connect and wait for the introduction. Raises WorkerUnreachable."""
        await asyncio.sleep(CONNECT_SECONDS)
        if channel is None or not channel.is_listening:
            raise WorkerUnreachable(path, ConnectionRefusedError())
        assert channel.process is not None
        if channel._kernel.now_ns < channel.process.frozen_until_ns:
            raise WorkerUnreachable(path, TimeoutError())
        link = cls(channel)
        channel.accept(link)
        return link

    def hear(self, message: ToAgent) -> None:
        self._heard.append(message)
        self._news.set()

    def lose_worker(self) -> None:
        self._is_over = True
        self._news.set()

    async def read(self, handle: Callable[["SimulatedLink", ToAgent], Awaitable[None]]) -> None:
        while self._heard or not self._is_over:
            if not self._heard:
                self._news.clear()
                await self._news.wait()
                continue
            message = self._heard.popleft()
            if isinstance(message, Introduced):
                self.introduction = message
            await handle(self, message)

    async def send(self, message: ToWorker, descriptor: int | None = None) -> bool:
        if self._is_over:
            return False
        self._channel.deliver(message, descriptor)
        return True

    def close(self) -> None:
        self._is_over = True
        if self._channel.link is self:
            self._channel.link = None
