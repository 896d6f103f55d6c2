"""The events that the store keeps, in order, for listing and following. Pure.

They are few enough to hold (the store prunes them to a limit), and a follower that reads by
position needs no queue of its own: a slow one costs nothing.
"""

from bisect import bisect_right
from collections.abc import Sequence

from holdfast_api.records import Event


class EventLog:
    """Events by rising position."""

    def __init__(self) -> None:
        """Start empty."""
        self._positions: list[int] = []
        self._events: list[Event] = []
        self._names: list[str] = []

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._events)

    def clear(self) -> None:
        """Forget all."""
        self._positions, self._events, self._names = [], [], []

    def add(self, name: str, event: Event) -> None:
        """Take in an event under its name in the store."""
        at = bisect_right(self._positions, event.position)
        self._positions.insert(at, event.position)
        self._events.insert(at, event)
        self._names.insert(at, name)

    def remove(self, name: str) -> None:
        """Forget an event; one that is not here is no fault. The oldest go first, so it is near."""
        try:
            at = self._names.index(name)
        except ValueError:
            return
        del self._positions[at], self._events[at], self._names[at]

    def after(self, position: int, limit: int) -> Sequence[Event]:
        """Return at most `limit` events later than `position`, the oldest first."""
        start = bisect_right(self._positions, position)
        return self._events[start : start + limit]

    def reaches(self, position: int) -> bool:
        """Whether there is an event later than `position`."""
        return bool(self._positions) and self._positions[-1] > position

    def surplus(self, kept: int) -> list[str]:
        """Return the names of the oldest events beyond the `kept` newest."""
        return self._names[: max(0, len(self._names) - kept)]
