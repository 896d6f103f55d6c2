"""Wake whoever waits for a topic: long polls, event followers, the planner. Needs an event loop.

A waiter gives a predicate; it is asked at once, and again after each `fire` of its topic. Waiters
of a topic that nobody fires cost nothing, so a thousand long polls do not wake for each other.
"""

import asyncio
from collections.abc import Callable


class Signals:
    """Waiting rooms by topic."""

    def __init__(self) -> None:
        """Start with nobody waiting."""
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}
        self._closed = False

    @property
    def closed(self) -> bool:
        """The process is ending: nobody waits any more."""
        return self._closed

    def fire(self, topic: str) -> None:
        """Wake everybody who waits for `topic`."""
        for future in self._waiting.pop(topic, ()):
            if not future.done():
                future.set_result(None)

    def close(self) -> None:
        """Wake everybody, for good."""
        self._closed = True
        for topic in list(self._waiting):
            self.fire(topic)

    async def wait(self, topic: str, predicate: Callable[[], bool], timeout_seconds: float) -> bool:
        """Return True once `predicate` holds, False at the timeout or when the process ends."""
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        while not predicate():
            remaining = deadline - asyncio.get_running_loop().time()
            if remaining <= 0 or self._closed:
                return False
            await self._next(topic, remaining)
        return True

    async def _next(self, topic: str, timeout_seconds: float) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(topic, set()).add(future)
        try:
            await asyncio.wait((future,), timeout=timeout_seconds)
        finally:
            waiting = self._waiting.get(topic)
            if waiting is not None:
                waiting.discard(future)
                if not waiting:
                    del self._waiting[topic]
