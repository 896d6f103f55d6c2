"""Keep Python's collector of cycles from stopping a controller for long. Touches `gc`.

A full collection looks at every object: with a thousand hosts known, it stops the process for a
quarter of a second every few seconds, and claims wait. Nearly all of those objects are the world in
memory, which has no cycles and is freed without the collector. So what has survived is set aside
(`gc.freeze`), where no collection looks at it, whenever enough has gathered.

What was set aside and becomes a cycle later stays as garbage until all is looked at once more. That
happens when twice as much is set aside as was there after the last time: seldom, in proportion to
what leaked, so memory stays bounded. To count it takes a walk over all of it: that is seldom, too.
"""

import asyncio
import gc
import time
from collections.abc import Callable

THRESHOLDS = (5_000, 20, 1_000_000)
"""Young objects are collected in larger portions than usual; a full collection is up to us."""
LOOK_SECONDS = 1.0
LOOSE_MAX = 5_000
"""Objects that are not set aside: a collection takes some 5 ms for so many."""
AGAIN_SECONDS = 300.0
AGAIN_MIN = 200_000
"""With fewer set aside, all is never looked at again: there is too little to gain."""


class Collecting:
    """Sets aside what has survived. One for each process."""

    def __init__(self, now_seconds: Callable[[], float] = time.monotonic) -> None:
        """Nothing was set aside yet."""
        self._now_seconds = now_seconds
        self._again_at_seconds = now_seconds() + AGAIN_SECONDS
        self._after_last = 0

    async def run(self) -> None:
        """Keep doing it until cancelled; the collector's own settings stay as they then are."""
        gc.set_threshold(*THRESHOLDS)
        while True:
            self.look()
            await asyncio.sleep(LOOK_SECONDS)

    def look(self) -> None:
        """Collect and set aside what survives, if enough has gathered."""
        if len(gc.get_objects()) < LOOSE_MAX:
            return
        is_again = self._now_seconds() >= self._again_at_seconds and self._has_doubled()
        if is_again:
            gc.unfreeze()
        gc.collect()
        gc.freeze()
        if is_again:
            self._after_last = gc.get_freeze_count()

    def _has_doubled(self) -> bool:
        self._again_at_seconds = self._now_seconds() + AGAIN_SECONDS
        return gc.get_freeze_count() > max(AGAIN_MIN, 2 * self._after_last)
