"""The parts of guest memory that need no process."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast_agent.core.memory_map import MemoryMap, PageIndexes, PageRows, empty_rows
from holdfast_agent.memory import BlockLocation, CompareTracker, zero_pages
from holdfast_agent.memory.pagemap_scan import merge_runs

PAGE = 4096


@given(
    st.lists(st.sampled_from(["zero", "first", "last", "middle", "full"]), max_size=12),
    st.integers(1, 4095),
)
def test_zero_pages_are_those_without_a_single_bit(kinds: list[str], where: int) -> None:
    rows = empty_rows(len(kinds))
    rows[:] = 0
    for row, kind in zip(rows, kinds, strict=True):
        if kind == "full":
            row[:] = 1
        elif kind != "zero":
            row[{"first": 0, "last": PAGE - 1, "middle": where}[kind]] = 1
    assert zero_pages(rows).tolist() == [kind == "zero" for kind in kinds]


def runs_from(gaps_and_lengths: list[tuple[int, int]]) -> Any:
    position, runs = 0x7F0000000000, []
    for gap, length in gaps_and_lengths:
        runs.append((position + gap * PAGE, position + (gap + length) * PAGE))
        position = runs[-1][1]
    return np.array(runs, dtype=np.uint64).reshape(-1, 2)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), max_size=60),
    st.integers(1, 20),
    st.integers(0, 10),
)
def test_merged_runs_cover_the_runs_within_the_limits(
    shape: list[tuple[int, int]], calls_max: int, gap_pages: int
) -> None:
    runs = runs_from(shape)
    merged = merge_runs(runs, calls_max, gap_pages)
    assert len(merged) <= max(calls_max, 0) or len(runs) == 0
    for start, end in runs.tolist():
        assert any(low <= start and end <= high for low, high in merged.tolist())
    # They begin and end where runs do, stay in order and swallow every gap that is small.
    assert set(merged[:, 0].tolist()) <= set(runs[:, 0].tolist())
    assert set(merged[:, 1].tolist()) <= set(runs[:, 1].tolist())
    gaps = merged[1:, 0] - merged[:-1, 1]
    assert (gaps > gap_pages * PAGE).all()
    if len(merged) < calls_max and len(runs):
        wide = int(((runs[1:, 0] - runs[:-1, 1]) > np.uint64(gap_pages * PAGE)).sum())
        assert len(merged) == wide + 1, "no more was merged than the limits ask for"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"size_bytes": 4097}, "size"),
        ({"size_bytes": 0}, "out of range"),
        ({"host_address": 4097}, "host address"),
        ({"file_offset": 1}, "file offset"),
        ({"file_offset": -4096}, "out of range"),
        ({"map_path": None}, "no path to map it by"),
    ],
)
def test_a_location_that_cannot_be_used_says_why(change: dict[str, Any], complaint: str) -> None:
    good: dict[str, Any] = {
        "name": "ram",
        "size_bytes": 8192,
        "host_address": 4096,
        "shared": True,
        "map_path": "/proc/1/map_files/1000-3000",
        "file_offset": 0,
    }
    assert BlockLocation(**good).end_address == 12288
    with pytest.raises(ValueError, match=complaint):
        BlockLocation(**(good | change))


class Pages:
    """Memory that a test changes between the steps of a loop."""

    def __init__(self, page_count: int) -> None:
        self.memory_map = MemoryMap.of_sizes([("ram", page_count * PAGE)])
        self.content = np.zeros((page_count, PAGE), dtype=np.uint8)

    def copy_out(self, indexes: PageIndexes, out: PageRows) -> None:
        out[: len(indexes)] = self.content[indexes]

    def populated(self) -> PageIndexes:
        return np.flatnonzero(self.content.any(axis=1))


def test_a_page_that_returns_to_what_harvest_saw_is_still_reported() -> None:
    pages = Pages(4)
    pages.content[2] = ord("A")
    tracker = CompareTracker(pages)
    tracker.start()
    pages.content[2] = ord("B")
    assert tracker.harvest().tolist() == [2]
    pages.content[2] = ord("C")  # the guest runs on before the loop copies
    rows = pages.content[[2]].copy()
    tracker.copied(np.array([2]), rows)  # C is what the backup gets
    pages.content[2] = ord("B")
    assert tracker.harvest().tolist() == [2]


def test_a_harvested_page_that_was_not_copied_is_reported_again() -> None:
    pages = Pages(4)
    tracker = CompareTracker(pages)
    tracker.start()
    pages.content[1] = 1
    assert tracker.harvest().tolist() == [1]
    assert tracker.harvest().tolist() == [1]


def test_a_page_given_back_is_reported_as_changed_to_zero() -> None:
    pages = Pages(4)
    pages.content[3] = 1
    tracker = CompareTracker(pages)
    tracker.start()
    pages.content[3] = 0
    assert tracker.harvest().tolist() == [3]
    tracker.copied(np.array([3]), np.zeros((1, PAGE), dtype=np.uint8))
    assert tracker.harvest().tolist() == []
