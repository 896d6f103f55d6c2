"""Guest memory from outside: who wrote which page, and copying pages. Start with `selection.py`."""

from holdfast_agent.core.memory_map import zero_pages
from holdfast_agent.memory.compare import CompareTracker
from holdfast_agent.memory.copier import GuestMemory
from holdfast_agent.memory.errors import InjectionFailed, MemoryAccessFailed, TrackingFailed
from holdfast_agent.memory.location import BlockLocation
from holdfast_agent.memory.pagemap_scan import PagemapScanTracker
from holdfast_agent.memory.selection import (
    TRACKERS,
    TrackerChoice,
    choose_tracker,
    unavailable,
)
from holdfast_agent.memory.soft_dirty import SoftDirtyTracker

__all__ = [
    "TRACKERS",
    "BlockLocation",
    "CompareTracker",
    "GuestMemory",
    "InjectionFailed",
    "MemoryAccessFailed",
    "PagemapScanTracker",
    "SoftDirtyTracker",
    "TrackerChoice",
    "TrackingFailed",
    "choose_tracker",
    "unavailable",
    "zero_pages",
]
