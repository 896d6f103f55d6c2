"""Chooses how the writes of a guest are tracked: the best that this host offers. Asks the kernel.

| tracker | needs | cost of a harvest |
|---|---|---|
| `pagemap-scan` | Linux 6.7, ptrace rights | 1 ms per 2 GiB of RAM |
| `soft-dirty` | private memory, CONFIG_MEM_SOFT_DIRTY | some 10 ms per 2 GiB |
| `compare` | memory for a copy of the guest's | 0.3 s per 2 GiB, or more |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from holdfast_agent.memory import pagemap_scan, soft_dirty
from holdfast_agent.memory.compare import CompareTracker
from holdfast_agent.memory.copier import GuestMemory
from holdfast_agent.memory.errors import TrackingFailed
from holdfast_agent.memory.location import BlockLocation
from holdfast_agent.memory.pagemap_scan import PagemapScanTracker
from holdfast_agent.memory.soft_dirty import SoftDirtyTracker

Tracker: TypeAlias = PagemapScanTracker | SoftDirtyTracker | CompareTracker

TRACKERS: Final = (PagemapScanTracker.name, SoftDirtyTracker.name, CompareTracker.name)
"""Names of all trackers, best first."""


@dataclass(frozen=True)
class TrackerChoice:
    """The tracker taken, started, and why each better one was passed over, as (name, reason)."""

    tracker: Tracker
    passed_over: tuple[tuple[str, str], ...]


def choose_tracker(
    pid: int,
    locations: Sequence[BlockLocation],
    memory: GuestMemory,
    *,
    preference: Sequence[str] = TRACKERS,
    accelerator: str = "tcg",
) -> TrackerChoice:
    """Start the first tracker of `preference` that works here; tracking has then begun.

    Call it while the guest stands (see `pagemap_scan`). The caller closes the tracker. Raises
    ValueError for an unknown name, TrackingFailed when none works, with all the reasons.
    """
    unknown = [name for name in preference if name not in TRACKERS]
    if unknown or not preference:
        raise ValueError(f"no tracker is called {unknown}: there are {', '.join(TRACKERS)}")
    passed_over: list[tuple[str, str]] = []
    for name in preference:
        reason = unavailable(name)
        if reason is not None:
            passed_over.append((name, reason))
            continue
        tracker: Tracker
        if name == PagemapScanTracker.name:
            tracker = PagemapScanTracker(
                pid, locations, memory.memory_map, two_step=accelerator == "kvm"
            )
        elif name == SoftDirtyTracker.name:
            tracker = SoftDirtyTracker(pid, locations, memory.memory_map)
        else:
            tracker = CompareTracker(memory)
        try:
            tracker.start()
        except TrackingFailed as error:
            passed_over.append((name, error.reason))
        else:
            return TrackerChoice(tracker, tuple(passed_over))
    raise TrackingFailed(pid, "; ".join(f"{name}: {reason}" for name, reason in passed_over))


def unavailable(name: str) -> str | None:
    """Return why this host cannot offer the tracker, in words; None if it can."""
    if name == PagemapScanTracker.name:
        return pagemap_scan.unavailable()
    if name == SoftDirtyTracker.name:
        return soft_dirty.unavailable()
    return None
