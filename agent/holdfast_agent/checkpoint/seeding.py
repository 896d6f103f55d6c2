"""Filling a new backup while the guest runs and its output flows. Over ports only.

The tracker runs already; every populated page is sent once (round 1), then what was written
meanwhile (round 2, 3, ...), until what is left is small. Each `step` sends at most one slab and
returns, so that the worker keeps tending everything else. A guest that writes as fast as we send is
slowed: every other step of such a round happens while it stands (`core/rounds.py`).

A page may be copied while the guest writes to it. That is harmless: the write came after the
harvest that named the page, so the next harvest names it again (INV-8). A device of QEMU is
another matter: it may have pinned a page before the harvest and write to it after, unseen. `stop`
drains all such requests, so each round ends with a harvest while the guest stands. What a round has
to name is harvested beforehand, while the guest runs; the stand is for the little that it wrote
since, and for what was pinned: those pages are copied only after it, so with what was written to
them unseen. So the guest stands for two monitor commands and a scan: less than for any checkpoint.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from holdfast_agent.checkpoint.ports import DirtyTracker, MemoryCopier, Peer, VirtualMachine
from holdfast_agent.core.memory_map import NO_PAGES, PAGE_SIZE_BYTES, PageIndexes, PageRows, union
from holdfast_agent.core.rounds import STANDING_PAGES, Rounds

LOGGER = logging.getLogger(__name__)
ZeroPages = Callable[[PageRows], np.ndarray[tuple[int], np.dtype[np.bool_]]]
"""Tells which rows are zero throughout: `bool[page_count]`."""


@dataclass
class SeedingFigures:
    """What seeding has done so far."""

    round: int = 0
    sent_bytes: int = 0
    total_bytes: int = 0
    began_ns: int = 0
    ended_ns: int = 0
    pause_ns_max: int = 0
    """Longest stand of the guest, for a harvest or because it is braked."""
    brakes: int = 0
    """Times that the guest was slowed to half of what it was before."""


class Seeding:
    """One seeding of one backup; `step` until it says that it is done."""

    def __init__(
        self,
        *,
        vm: VirtualMachine,
        tracker: DirtyTracker,
        memory: MemoryCopier,
        peer: Peer,
        slab: PageRows,
        zero_pages: ZeroPages,
        now_ns: Callable[[], int],
        bytes_per_second: int = 0,
    ) -> None:
        """Send through `peer`, with `slab` as the only staging memory; 0 means no rate limit."""
        self._vm = vm
        self._tracker = tracker
        self._memory = memory
        self._peer = peer
        self._slab = slab
        self._zero_pages = zero_pages
        self._now_ns = now_ns
        self._bytes_per_second = bytes_per_second
        self._pending: PageIndexes = NO_PAGES
        self._position = 0
        self._rounds = Rounds(0)
        self._was_standing = False
        self.figures = SeedingFigures()

    def start(self) -> None:
        """Take stock of what must be sent; the tracker has begun before."""
        self.figures.began_ns = self._now_ns()
        self._pending = self._memory.populated()
        self._rounds = Rounds(len(self._pending))
        self.figures.round = self._rounds.number
        self.figures.total_bytes = len(self._pending) * PAGE_SIZE_BYTES

    def not_before_ns(self) -> int:
        """Return the time before which the rate limit allows no further step."""
        if not self._bytes_per_second:
            return 0
        return self.figures.began_ns + (
            self.figures.sent_bytes * 1_000_000_000 // self._bytes_per_second
        )

    def step(self) -> PageIndexes | None:
        """Send one slab. Return None, or at the end the pages that are still to be sent.

        Those are harvested already: whoever gets them owes them. Raises PeerLost and
        VirtualMachineFailed.
        """
        if self._position == len(self._pending):
            left = self._harvest()
            if self._rounds.end(len(left)):
                self.figures.ended_ns = self._now_ns()
                return left
            self._begin_round(left)
        if not self._rounds.brakes:
            self._send(len(self._slab))
        elif self._was_standing:
            self._was_standing = False
            self._send(self._rounds.running_pages)
        else:
            self._was_standing = True
            with self._guest_standing():
                self._send(STANDING_PAGES)
        return None

    def _send(self, page_count_max: int) -> None:
        count = min(page_count_max, len(self._slab))
        part = self._pending[self._position : self._position + count]
        rows = self._slab[: len(part)]
        self._memory.copy_out(part, rows)
        self._tracker.copied(part, rows)
        empty = self._zero_pages(rows)
        if empty.any():
            full = ~empty
            self._peer.send_pages(0, part[full], rows[full], part[empty])
        else:
            self._peer.send_pages(0, part, rows, NO_PAGES)
        self._position += len(part)
        self.figures.sent_bytes += len(part) * PAGE_SIZE_BYTES

    def _harvest(self) -> PageIndexes:
        # A tracker that can not is one whose harvest costs the same however little was written.
        most = self._tracker.harvest() if self._tracker.can_harvest_running else NO_PAGES
        with self._guest_standing():
            rest = self._tracker.harvest()
        return union([most, rest])

    @contextlib.contextmanager
    def _guest_standing(self) -> Iterator[None]:
        began = self._now_ns()
        ran = self._vm.stop()
        try:
            yield
        finally:
            if ran:
                self._vm.resume()
            self.figures.pause_ns_max = max(self.figures.pause_ns_max, self._now_ns() - began)

    def _begin_round(self, pages: PageIndexes) -> None:
        if self._rounds.brakes > self.figures.brakes:
            self.figures.brakes = self._rounds.brakes
            LOGGER.info("the guest writes as fast as we send: brake %d", self._rounds.brakes)
        self.figures.round = self._rounds.number
        self._pending = pages
        self._position = 0
