"""INV-8 as a state machine: no page debt is lost but by an acknowledgement."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from holdfast_agent.core.pages import OwedPages


class OwedPagesMachine(RuleBasedStateMachine):
    """Compares with two plain sets."""

    @initialize(page_count=st.sampled_from([40, 4000]))
    def begin(self, page_count: int) -> None:
        # Small maps merge through the bitmap, large ones by sorting.
        self.page_count = page_count
        self.pages = OwedPages(page_count)
        self.owed: set[int] = set()
        self.in_flight: set[int] = set()

    @rule(dirty=st.sets(st.integers(0, 39), max_size=12), times=st.sampled_from([1, 1, 40]))
    def harvest(self, dirty: set[int], times: int) -> None:
        stretch = self.page_count // 40
        shifted = {page * stretch + stretch - 1 for page in dirty}
        for _ in range(times):
            self.pages.owe(np.array(sorted(shifted), dtype=np.int64))
        self.owed |= shifted

    @rule()
    def take(self) -> None:
        taken = self.pages.take().tolist()
        assert taken == sorted(self.owed)
        self.in_flight |= self.owed
        self.owed = set()

    @rule()
    def acknowledge(self) -> None:
        self.pages.acknowledged()
        self.in_flight = set()

    @rule()
    def fail(self) -> None:
        self.pages.failed()
        self.owed |= self.in_flight
        self.in_flight = set()

    @invariant()
    def counts_agree(self) -> None:
        # Only read, never merge: the counts must not hide what a merge would lose.
        assert set().union(*(part.tolist() for part in self.pages._owed)) == self.owed
        assert set().union(*(part.tolist() for part in self.pages._in_flight)) == self.in_flight

    @rule()
    def look_at_the_counts(self) -> None:
        assert self.pages.owed_count == len(self.owed)
        assert self.pages.in_flight_count == len(self.in_flight)


TestOwedPages = OwedPagesMachine.TestCase
