"""What the tests of all trackers share: trackers by kind, fitting targets, standing still."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from holdfast_agent.core.memory_map import PAGE_SIZE_BYTES
from holdfast_agent.memory import (
    CompareTracker,
    GuestMemory,
    PagemapScanTracker,
    SoftDirtyTracker,
)

PATIENCE_S = 60.0
HERE = ("one-step", "two-step", "compare")
"""The kinds that run on a machine of ours; soft-dirty runs in booted hosts (`tests/lab/inside`)."""
BLOCKS = (("shared", 1300, "shared"), ("private", 1100, "private", True), ("tiny", 2, "shared"))
PRIVATE_BLOCKS = (
    ("plain", 1300, "private"),
    ("huge", 1100, "private", True),
    ("tiny", 2, "private"),
)


def blocks_for(kind: str) -> tuple[tuple[Any, ...], ...]:
    """Three blocks that a tracker of this kind can track, sized alike for all kinds."""
    return PRIVATE_BLOCKS if kind == "soft-dirty" else BLOCKS


def open_memory(target: Any) -> GuestMemory:
    return GuestMemory(target.pid, target.locations, target.memory_map)


def make_tracker(kind: str, target: Any, memory: GuestMemory) -> Any:
    if kind == "compare":
        return CompareTracker(memory)
    if kind == "soft-dirty":
        return SoftDirtyTracker(target.pid, target.locations, target.memory_map)
    return PagemapScanTracker(
        target.pid, target.locations, target.memory_map, two_step=kind == "two-step"
    )


def actual_memory(target: Any) -> np.ndarray:
    content = b"".join(target.dump(block.name) for block in target.memory_map.blocks)
    return np.frombuffer(content, dtype=np.uint8).reshape(-1, PAGE_SIZE_BYTES)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.001)


@contextlib.contextmanager
def standing(target: Any, tracker: Any) -> Iterator[None]:
    """Let the target stand, as a guest does, for a tracker that can not harvest otherwise."""
    if tracker.can_harvest_running:
        yield
        return
    os.kill(target.pid, signal.SIGSTOP)
    until(lambda: _state(target.pid) == "T")
    try:
        yield
    finally:
        os.kill(target.pid, signal.SIGCONT)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
