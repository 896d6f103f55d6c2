"""Slab pools as a state machine: bounds, and the strike rule as the docs state it."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from holdfast_agent.core.slabs import SlabLimitReached, SlabPool

PAGES_PER_SLAB = 2
SLAB_BYTES = PAGES_PER_SLAB * 4096
LIMIT_SLABS = 9
HEADROOM_PAGES = 5
STRIKES = 3


class SlabMachine(RuleBasedStateMachine):
    """Takes and gives back, with a model of strikes beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = SlabPool(
            SLAB_BYTES,
            LIMIT_SLABS * SLAB_BYTES,
            headroom_bytes_max=HEADROOM_PAGES * 4096,
            strikes_to_halve=STRIKES,
        )
        self.slabs = 1
        self.wanted = 1
        self.struck: list[int] = []
        self.taken = False

    @precondition(lambda self: not self.taken)
    @rule(pages=st.integers(0, LIMIT_SLABS * PAGES_PER_SLAB))
    def take(self, pages: int) -> None:
        needed = (pages + PAGES_PER_SLAB - 1) // PAGES_PER_SLAB
        self.slabs = max(self.slabs, needed)
        room = pages + min(pages, HEADROOM_PAGES)
        self.wanted = min(max(1, (room + PAGES_PER_SLAB - 1) // PAGES_PER_SLAB), LIMIT_SLABS)
        self.struck = [*self.struck, self.wanted] if self.wanted < self.slabs else []
        rows = self.pool.take(pages)
        assert sum(map(len, rows)) == pages
        assert len(rows) == needed
        for number, part in enumerate(rows):
            part[:] = number
        assert all((part == number).all() for number, part in enumerate(rows))
        self.taken = True

    @precondition(lambda self: not self.taken)
    @rule(pages=st.integers(LIMIT_SLABS * PAGES_PER_SLAB + 1, 1000))
    def take_too_much(self, pages: int) -> None:
        with pytest.raises(SlabLimitReached):
            self.pool.take(pages)

    @rule()
    def grow(self) -> None:
        assert self.pool.is_short == (self.slabs < self.wanted)
        self.pool.grow_by_one()
        self.slabs = max(self.slabs, min(self.slabs + 1, self.wanted))

    @precondition(lambda self: self.taken)
    @rule()
    def give_back(self) -> None:
        self.pool.give_back()
        self.taken = False
        if len(self.struck) >= STRIKES:
            self.slabs = max(self.slabs // 2, *self.struck, 1)
            self.struck = []

    @invariant()
    def figures_agree(self) -> None:
        assert 1 <= self.pool.slab_count <= LIMIT_SLABS
        assert self.pool.slab_count == self.slabs
        assert self.pool.strikes == len(self.struck)
        assert self.pool.allocated_bytes == self.slabs * SLAB_BYTES


TestSlabs = SlabMachine.TestCase
