"""When seeding is over, and how much the guest is slowed for it. Pure.

Round 1 sends everything, each later one what was written during the one before. A round that leaves
little is the last. One that leaves hardly less than it began with will not get there by itself: the
guest writes about as fast as we send. Then it is braked: of what is sent from now on, a part goes
out while the guest stands, in stands of `STANDING_PAGES`, shorter than such a guest's checkpoints.

    brakes               0    1    2    3
    sent while it stands 0   1/2  3/4  7/8

A guest that outruns even that gets its first checkpoint with the rest in it, a long one.

Source: QEMU's auto-converge, which slows vCPUs in the same way for the same reason.
"""

ROUND_LIMIT = 30
SMALL_ENOUGH_PAGES = 256
SHRINKING = 0.7
"""A round that leaves more than this share of the one before no longer shrinks."""
BRAKES_MAX = 3
STANDING_PAGES = 512
"""Sent in one stand of a braked guest: 2 MiB, at 500 MB/s four milliseconds."""


class Rounds:
    """The rounds of one seeding."""

    def __init__(self, page_count: int) -> None:
        """Begin round 1 with so many pages."""
        self.number = 1
        self.brakes = 0
        self._page_count = page_count

    def end(self, left: int) -> bool:
        """End a round that left so many pages; say whether seeding is over.

        If not, the next round has begun with them, perhaps with one brake more.
        """
        if left <= SMALL_ENOUGH_PAGES or self.number == ROUND_LIMIT:
            return True
        if left > SHRINKING * self._page_count:
            if self.brakes == BRAKES_MAX:
                return True
            self.brakes += 1
        self.number += 1
        self._page_count = left
        return False

    @property
    def running_pages(self) -> int:
        """Pages to send between two stands of a braked guest."""
        assert self.brakes, "a guest without brakes does not stand"
        return STANDING_PAGES // ((1 << self.brakes) - 1)
