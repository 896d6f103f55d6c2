"""Waiting for several descriptors with one deadline. Touches select(2).

select and not poll: its timeout has microseconds, and a checkpoint that waits a whole millisecond
too long is a tenth of a round trip. A worker has a dozen descriptors, far below select's limit.
"""

import select
from collections.abc import Callable, Iterable
from typing import TypeAlias

WaitReadable: TypeAlias = Callable[[Iterable[int], int], frozenset[int]]
"""`wait_readable`, or what takes its place where time is simulated."""

FOREVER_NS = 1 << 62
LONGEST_WAIT_SECONDS = 1.0


def wait_readable(descriptors: Iterable[int], timeout_ns: int) -> frozenset[int]:
    """Return the descriptors that are readable, hung up or broken; none when the time is over."""
    timeout_seconds = min(max(0, timeout_ns) / 1e9, LONGEST_WAIT_SECONDS)
    readable, _, _ = select.select(tuple(descriptors), (), (), timeout_seconds)
    return frozenset(readable)
