"""Figures of the last few hundred checkpoints, and counts that only rise. Pure.

Percentiles are by nearest rank over the window: the value that `p` percent of the window do not
exceed; no interpolation, so every figure shown was really measured.
"""

from collections import deque
from collections.abc import Iterable

from holdfast_api.records import Percentiles

WINDOW_SIZE = 512


class Window:
    """The last `size` measurements of one thing."""

    def __init__(self, size: int = WINDOW_SIZE) -> None:
        """Start empty."""
        assert size > 0, size
        self._values: deque[float] = deque(maxlen=size)

    def add(self, value: float) -> None:
        """Take a measurement; the oldest falls out when the window is full."""
        self._values.append(value)

    def percentiles(self) -> Percentiles:
        """Return p50, p99 and max of the window; zeros while it is empty."""
        ordered = sorted(self._values)
        if not ordered:
            return Percentiles()
        return Percentiles(
            p50=_nearest_rank(ordered, 50), p99=_nearest_rank(ordered, 99), max=ordered[-1]
        )


class Counters:
    """Named sums that never fall; the names are fixed from the start."""

    def __init__(self, names: Iterable[str]) -> None:
        """Start every name at zero."""
        self._values = dict.fromkeys(names, 0.0)

    def add(self, name: str, amount: float = 1) -> None:
        """Raise a counter."""
        assert amount >= 0, (name, amount)
        assert name in self._values, name
        self._values[name] += amount

    def values(self) -> dict[str, float]:
        """Return a copy of all counters."""
        return dict(self._values)


def _nearest_rank(ordered: list[float], percent: int) -> float:
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(rank, 1) - 1]
