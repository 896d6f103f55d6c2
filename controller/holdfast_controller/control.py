"""What every request handler needs, in one place. Holds; does nothing itself."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from holdfast_api.errors import Unavailable
from holdfast_controller.adapters.heartbeats import Heartbeats
from holdfast_controller.adapters.store import Store
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


@dataclass
class Control:
    """The parts of one controller process."""

    store: Store
    heartbeats: Heartbeats
    world: World
    metrics: Metrics
    leads: Callable[[], bool] = lambda: False
    """Whether this controller is the one that plans, at this moment."""
    store_fault: str = ""
    """Why the store takes no writes although it answers, for an operator; empty: it takes them."""
    polls: Places = field(default_factory=lambda: Places(4096))
    """Long polls for assignments: one per host."""
    followers: Places = field(default_factory=lambda: Places(256))
    """Followers of the event stream."""
