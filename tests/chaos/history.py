"""Whether one counter that never loses anything can explain what its clients saw. Pure.

A history is what several clients did to one counter that starts at 0: INCR, whose answer is the
new value, and GET. Each operation has the moment it was sent and the moment its answer came; one
without an answer may have happened at any later moment, or not at all. The history is
*linearizable* when every operation can be given one moment between its two, so that a counter that
is used at these moments, one at a time, gives these very answers (Herlihy and Wing, 1990).

Theory of operation: in general that is a search; for a counter it is a sort. The answers say the
only possible order: INCR v stands just before every GET that read v, and these before INCR v + 1.
That order is right exactly when nobody in it was sent after somebody behind it had its answer.
A value that nobody got was counted by an operation without an answer; that one must have been sent
before anybody had the answer to an operation behind it. These deadlines rise with the value, so the
values that are missing are given, the lowest first, to the operations sent first: if that fails,
everything does. `tests/property/chaos` holds it against the search.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

TOLD_MAX = 20
"""Contradictions of one history that are told; one is enough."""


class Kind(StrEnum):
    """What a client asked for."""

    INCREMENT = "INCR"
    READ = "GET"


@dataclass(frozen=True, slots=True)
class Operation:
    """One request of one client. Moments are seconds of one monotonic clock."""

    client: int
    kind: Kind
    sent: float
    answered: float = math.inf
    """Infinity: no answer ever came."""
    value: int | None = None
    """What was answered."""

    @property
    def is_pending(self) -> bool:
        """Whether nobody knows if it happened."""
        return self.value is None

    @property
    def place(self) -> tuple[int, int]:
        """Where the answer puts it among all others."""
        assert self.value is not None
        return self.value, int(self.kind is Kind.READ)

    def __str__(self) -> str:
        """Say it, for a report."""
        answer = "no answer" if self.is_pending else f"{self.value} at {self.answered:.4f}"
        return f"client {self.client}: {self.kind} at {self.sent:.4f}: {answer}"


def contradictions(history: Iterable[Operation]) -> list[str]:
    """Return why no counter could have answered like this; empty if one could."""
    operations = list(history)
    answered = sorted((o for o in operations if not o.is_pending), key=lambda o: (o.place, o.sent))
    pending = sorted(o.sent for o in operations if o.is_pending and o.kind is Kind.INCREMENT)
    found = [
        *_counted_twice(answered),
        *_out_of_order(answered),
        *_unexplained(answered, pending),
    ]
    return found[:TOLD_MAX]


def _counted_twice(answered: list[Operation]) -> list[str]:
    values = Counter(o.value for o in answered if o.kind is Kind.INCREMENT)
    found = [f"{count} clients were told {value}" for value, count in values.items() if count > 1]
    impossible = [o for o in answered if o.place < (0, 1)]
    return found + [f"{o}: nothing counts to that" for o in impossible]


def _out_of_order(answered: list[Operation]) -> list[str]:
    """Find operations sent after the answer to one that their answers put behind them."""
    found = []
    earliest: Operation | None = None
    for _, group in itertools.groupby(reversed(answered), key=lambda o: o.place):
        same = list(group)
        found += [
            f"{o}, though it was sent after this had its answer: {earliest}"
            for o in same
            if earliest is not None and o.sent > earliest.answered
        ]
        first = min(same, key=lambda o: o.answered)
        if earliest is None or first.answered < earliest.answered:
            earliest = first
    return found


def _unexplained(answered: list[Operation], pending: list[float]) -> list[str]:
    """Find values that nobody was told and nobody can have counted, `pending` sorted."""
    highest = max((o.place[0] for o in answered), default=0)
    told = {o.value for o in answered if o.kind is Kind.INCREMENT}
    missing = [value for value in range(1, highest + 1) if value not in told]
    if len(missing) > len(pending):
        return [
            (
                f"{len(missing)} values were counted for nobody, the first {missing[0]}, and only "
                f"{len(pending)} operations have no answer"
            )
        ]
    deadlines = _deadlines(answered, missing)
    return [
        f"{value} was counted for nobody before {deadline:.4f}, and the operation without an "
        f"answer that is left was sent at {sent:.4f}"
        for value, deadline, sent in zip(missing, deadlines, pending, strict=False)
        if sent > deadline
    ]


def _deadlines(answered: list[Operation], missing: list[int]) -> list[float]:
    """Return for each missing value (rising) when the first operation behind it had its answer."""
    deadlines: list[float] = []
    earliest, position = math.inf, len(answered)
    for value in reversed(missing):
        while position and answered[position - 1].place > (value, 0):
            position -= 1
            earliest = min(earliest, answered[position].answered)
        deadlines.append(earliest)
    return deadlines[::-1]
