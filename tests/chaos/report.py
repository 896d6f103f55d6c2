"""What a campaign saw, in numbers and in words. Pure, but for the file that `write` makes."""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from holdfast_api.records import Event
from holdfast_api.words import EventKind

Say = Callable[[str], None]

UNPROTECTED_BY = frozenset(
    {EventKind.FAILED_OVER, EventKind.CLAIM_WON, EventKind.BACKUP_DROPPED, EventKind.PROMOTED}
)
TIMELINES_WRITTEN = 5
"""Of the last episodes; all of them stand in the JSON file."""


@dataclass
class Episode:
    """Some faults, and what came of them."""

    number: int
    faults: list[str] = field(default_factory=list)
    timeline: list[str] = field(default_factory=list)
    """What was done, with the seconds since the episode began."""
    failovers: int = 0
    lost: list[str] = field(default_factory=list)
    """VMs whose both hosts were hurt and that nobody has any more."""
    stalls: list[float] = field(default_factory=list)
    """Seconds that clients of each VM that failed over waited for an answer."""
    settled_seconds: float = 0.0
    """Until all was well again, after all was mended."""

    def __str__(self) -> str:
        """Say it in a line."""
        lost = f", lost {', '.join(self.lost)}" if self.lost else ""
        return (
            f"{self.number:4} {', '.join(self.faults) or 'nothing to break'}: "
            f"{self.failovers} failovers{lost}, well after {self.settled_seconds:.1f} s"
        )


@dataclass
class Report:
    """One campaign."""

    seed: int
    episodes: list[Episode] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    vms: int = 0
    operations: int = 0
    seconds: float = 0.0
    wire: dict[str, int] = field(default_factory=dict)
    """What the witness counted."""
    stalls_alone: list[float] = field(default_factory=list)
    """Seconds without any answer around each failover, where only one thing failed."""
    stalls_among_others: list[float] = field(default_factory=list)
    unprotected: list[float] = field(default_factory=list)
    """Seconds from each loss of protection to the next one."""
    _since: dict[str, float] = field(default_factory=dict)

    @property
    def failovers(self) -> int:
        """How many VMs were promoted."""
        return sum(episode.failovers for episode in self.episodes)

    def note_stall(self, seconds: float, *, alone: bool) -> None:
        """Note how long clients waited around a failover."""
        (self.stalls_alone if alone else self.stalls_among_others).append(seconds)

    def note_windows(self, events: Iterable[Event]) -> None:
        """Note how long VMs were unprotected, by the times of these events."""
        for event in events:
            if event.vm is None:
                continue
            if event.kind is EventKind.PROTECTED:
                since = self._since.pop(event.vm, None)
                if since is not None:
                    self.unprotected.append(max(0.0, event.at - since))
            elif event.kind is EventKind.VM_LOST:
                self._since.pop(event.vm, None)
            elif event.kind in UNPROTECTED_BY:
                self._since.setdefault(event.vm, event.at)

    def text(self) -> str:
        """Return the report for people."""
        faults = Counter(name for episode in self.episodes for name in episode.faults)
        lost = sum(len(episode.lost) for episode in self.episodes)
        settled = [episode.settled_seconds for episode in self.episodes]
        lines = [
            f"seed {self.seed}, {self.seconds / 60:.1f} minutes, {len(self.episodes)} episodes",
            f"violations: {len(self.violations)}",
            *(f"  {violation}" for violation in self.violations),
            f"failovers: {self.failovers}; VMs started {self.vms}, lost (both hosts hurt) {lost}",
            f"answers to clients: {self.operations}, each history held against a counter",
            f"clients waited at a failover, one fault: {_spread(self.stalls_alone)}",
            f"clients waited at a failover, several:  {_spread(self.stalls_among_others)}",
            f"unprotected after a loss:               {_spread(self.unprotected)}",
            f"well again after all was mended:        {_spread(settled)}",
            "on the wire: " + ", ".join(f"{key} {count}" for key, count in self.wire.items()),
            "faults: " + ", ".join(f"{name} {count}" for name, count in faults.most_common()),
        ]
        if self.violations:
            for episode in self.episodes[-TIMELINES_WRITTEN:]:
                lines += [str(episode), *(f"       {what}" for what in episode.timeline)]
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """Write the text, and beside it all there is as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.text() + "\n")
        everything = {key: value for key, value in vars(self).items() if not key.startswith("_")}
        everything["episodes"] = [vars(episode) for episode in self.episodes]
        path.with_suffix(".json").write_text(json.dumps(everything, indent=1) + "\n")


def _spread(seconds: list[float]) -> str:
    if not seconds:
        return "none"
    ordered = sorted(seconds)
    high = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    return (
        f"p50 {statistics.median(ordered):.2f} s, p99 {high:.2f} s, max {ordered[-1]:.2f} s "
        f"({len(ordered)})"
    )
