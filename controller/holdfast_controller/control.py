"""What every request handler needs, in one place."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from holdfast_api.errors import Unavailable
from holdfast_controller.adapters.heartbeats import Heartbeats
from holdfast_controller.adapters.store import Store
from holdfast_controller.core.rhythm import Rhythm, rhythm_of
from holdfast_controller.metrics import Metrics
from holdfast_controller.world import World


@dataclass
class Places:
    """A limit on how many requests of one kind may wait at the same time."""

    limit: int
    taken: int = 0

    def require_one(self) -> None:
        """Raise Unavailable when no place is free."""
        if self.taken >= self.limit:
            raise Unavailable("busy", f"{self.limit} wait already; ask again or elsewhere")

    @contextmanager
    def occupy(self) -> Iterator[None]:
        """Hold a place."""
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1


class Turns:
    """A limit on how many requests of one kind are worked on at the same time.

    The event loop gives each one that is ready a step a turn. With hundreds of them a claim, which
    takes some ten turns, would wait for all of them ten times.
    """

    def __init__(self, limit: int, *, seconds_max: float) -> None:
        """Let `limit` in at a time; nobody waits for longer than `seconds_max`."""
        self._free = asyncio.Semaphore(limit)
        self._seconds_max = seconds_max

    @asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        """Wait for a turn and hold it. Raises Unavailable."""
        try:
            async with asyncio.timeout(self._seconds_max):
                await self._free.acquire()
        except TimeoutError as error:
            detail = f"no turn within {self._seconds_max} s; ask again or elsewhere"
            raise Unavailable("busy", detail) from error
        try:
            yield
        finally:
            self._free.release()


@dataclass
class Control:
    """The parts of one controller process."""

    store: Store
    heartbeats: Heartbeats
    world: World
    metrics: Metrics
    beats_per_second_max: int
    """Of all hosts together; how often each is asked to beat follows from it."""
    silence_seconds: int
    """A host is silent after so long, or longer where it is asked to beat less often."""
    leads: Callable[[], bool] = lambda: False
    """Whether this controller is the one that plans, at this moment."""
    store_fault: str = ""
    """Why the store takes no writes although it answers, for an operator; empty: it takes them."""
    beats: Turns = field(default_factory=lambda: Turns(16, seconds_max=1.0))
    """Heartbeats that are being heard; an agent waits no longer for one controller of several."""
    polls: Places = field(default_factory=lambda: Places(4096))
    """Long polls for assignments: one per host."""
    followers: Places = field(default_factory=lambda: Places(256))
    """Followers of the event stream."""

    def rhythm(self) -> Rhythm:
        """Return what a host that beats at this moment is granted and asked for."""
        return rhythm_of(self.world.beating_count, self.beats_per_second_max, self.silence_seconds)
