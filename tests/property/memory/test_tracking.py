"""Whatever a guest does to its memory, harvest and copy rebuild it exactly."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.integration.memory.tracking import make_tracker

from holdfast_agent.core.memory_map import PAGE_SIZE_BYTES, MemoryMap, empty_rows
from holdfast_agent.memory import GuestMemory

HUGE_PAGES = 512  # pages of a page table; the first touch of one makes all of it count

SIZES = {"shared": 1283, "private": 700, "huge": 1537, "small": 3}


def _ranges(block: str) -> st.SearchStrategy[tuple[int, int]]:
    size = SIZES[block]
    return st.tuples(st.integers(0, size - 1), st.sampled_from([1, 2, 40, 512, 1024, 4096])).map(
        lambda pair: (pair[0], min(pair[1], size - pair[0]))
    )


def _actions() -> st.SearchStrategy[tuple[Any, ...]]:
    def of_block(block: str) -> st.SearchStrategy[tuple[Any, ...]]:
        pages = st.lists(st.integers(0, SIZES[block] - 1), min_size=1, max_size=6)
        return st.one_of(
            st.tuples(st.just("write"), st.just(block), pages, st.integers(0, 255)),
            st.tuples(st.just("read"), st.just(block), pages),
            st.tuples(st.just("drop"), st.just(block), _ranges(block)),
            st.tuples(st.just("write_run"), st.just(block), _ranges(block), st.integers(1, 255)),
        )

    return st.sampled_from(sorted(SIZES)).flatmap(of_block)


histories = st.lists(st.lists(_actions(), max_size=5), min_size=1, max_size=5)


@dataclass
class Expected:
    """What the target's memory holds by what it was told to do."""

    memory_map: MemoryMap
    pages: np.ndarray
    changed: set[int] = field(default_factory=set)
    touched: set[tuple[str, int]] = field(default_factory=set)

    def apply(self, target: Any, action: tuple[Any, ...]) -> None:
        kind, name = action[0], action[1]
        block = next(block for block in self.memory_map.blocks if block.name == name)
        if kind in ("write", "write_run"):
            where, value = action[2], action[3]
            local = where if kind == "write" else list(range(where[0], where[0] + where[1]))
            target.run(do="write", block=name, pages=local, value=value)
            for page in local:
                if self.pages[block.first_page + page, page % PAGE_SIZE_BYTES] != value:
                    self.changed.add(block.first_page + page)
                self.pages[block.first_page + page, page % PAGE_SIZE_BYTES] = value
        elif kind == "read":
            local = action[2]
            target.run(do="read", block=name, pages=local)
        else:
            first, count = action[2]
            local = list(range(first, first + count))
            target.run(do="drop", block=name, first=first, count=count)
            for page in local:
                if self.pages[block.first_page + page].any():
                    self.changed.add(block.first_page + page)
            self.pages[block.first_page + first : block.first_page + first + count] = 0
        self.touched |= {(name, page) for page in local}


def allowed(target: Any, touched: set[tuple[str, int]]) -> set[int]:
    """All pages of the page tables that were touched: a harvest may name them."""
    found: set[int] = set()
    for location, block in zip(target.locations, target.memory_map.blocks, strict=True):
        base = location.host_address // PAGE_SIZE_BYTES
        tables = {(base + page) // HUGE_PAGES for name, page in touched if name == block.name}
        found |= {
            block.first_page + page
            for page in range(block.page_count)
            if (base + page) // HUGE_PAGES in tables
        }
    return found


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(history=histories)
def test_harvest_and_copy_rebuild_the_memory_exactly(
    target: Any, any_kind: str, history: list[list[tuple[Any, ...]]]
) -> None:
    check_history(target, any_kind, history)


def check_history(target: Any, kind: str, history: list[list[tuple[Any, ...]]]) -> None:
    """Let the target do all that, harvest after each epoch, and compare."""
    memory_map = target.memory_map
    memory = GuestMemory(target.pid, target.locations, memory_map)
    tracker = make_tracker(kind, target, memory)
    rebuilt = np.zeros((memory_map.page_count, PAGE_SIZE_BYTES), dtype=np.uint8)
    rows = empty_rows(memory_map.page_count)

    def copy(indexes: np.ndarray) -> None:
        memory.copy_out(indexes, rows)
        rebuilt[indexes] = rows[: len(indexes)]
        tracker.copied(indexes, rows)

    try:
        tracker.start()
        copy(memory.populated())
        expected = Expected(memory_map, rebuilt.copy())
        before: set[tuple[str, int]] = set()
        for epoch in history:
            for action in epoch:
                expected.apply(target, action)
            harvested = tracker.harvest()
            assert (np.diff(harvested) > 0).all(), "sorted, none twice"
            found = set(harvested.tolist())
            differing = set(np.flatnonzero((rebuilt != expected.pages).any(axis=1)))
            if kind == "compare":
                # It cannot see what was written and written back, and need not.
                assert found == differing
            else:
                # Nor can soft-dirty see what was zero, written and given back within one epoch.
                assert (differing if kind == "soft-dirty" else expected.changed) <= found
                # What was given back is named once more in the harvest after.
                assert found <= allowed(target, expected.touched | before)
            copy(harvested)
            assert np.array_equal(rebuilt, expected.pages)
            before, expected.touched, expected.changed = expected.touched, set(), set()
        actual = b"".join(target.dump(block.name) for block in memory_map.blocks)
        assert rebuilt.tobytes() == actual
    finally:
        tracker.close()
        memory.close()
