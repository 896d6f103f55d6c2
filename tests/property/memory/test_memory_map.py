"""Page sets, their runs and their blocks are three views of the same thing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast_agent.core.memory_map import (
    NO_PAGES,
    PAGE_SIZE_BYTES,
    MemoryMap,
    empty_rows,
    indexes_of,
    runs_of,
    union,
)

page_sets = st.sets(st.integers(0, 300)).map(lambda pages: np.array(sorted(pages), dtype=np.int64))
sizes = st.lists(st.integers(1, 90), min_size=1, max_size=5)


@given(page_sets)
def test_runs_and_indexes_are_inverse(pages: np.ndarray) -> None:
    runs = runs_of(pages)
    back = indexes_of(runs)
    assert back.dtype == np.int64
    assert back.tolist() == pages.tolist()
    assert (runs[:, 1] >= 1).all()
    # Maximal: no two runs touch.
    assert (runs[1:, 0] > runs[:-1, 0] + runs[:-1, 1]).all()


@given(page_sets, sizes)
def test_every_page_falls_into_the_block_it_belongs_to(
    pages: np.ndarray, page_counts: list[int]
) -> None:
    memory_map = MemoryMap.of_sizes(
        (f"block{number}", count * PAGE_SIZE_BYTES) for number, count in enumerate(page_counts)
    )
    pages = pages[pages < memory_map.page_count]
    parts = memory_map.split(pages)
    assert sum(end - start for start, end in parts) == len(pages)
    for block, (start, end) in zip(memory_map.blocks, parts, strict=True):
        inside = [page for page in pages.tolist() if block.first_page <= page < block.end_page]
        assert pages[start:end].tolist() == inside


@given(st.lists(page_sets, max_size=4))
def test_a_union_is_sorted_and_has_no_page_twice(parts: list[np.ndarray]) -> None:
    expected = sorted({page for part in parts for page in part.tolist()})
    assert union(parts).tolist() == expected


@given(st.integers(1, 40))
def test_empty_rows_begin_at_a_page_boundary(page_count: int) -> None:
    rows = empty_rows(page_count)
    assert rows.shape == (page_count, PAGE_SIZE_BYTES)
    assert rows.flags.c_contiguous
    assert rows.ctypes.data % PAGE_SIZE_BYTES == 0
    rows[:] = 1  # all of it is there


def test_a_map_of_no_blocks_has_no_pages() -> None:
    assert MemoryMap.of_sizes([]).page_count == 0
    assert len(runs_of(NO_PAGES)) == 0


@pytest.mark.parametrize("size_bytes", [0, -PAGE_SIZE_BYTES, PAGE_SIZE_BYTES + 1])
def test_a_block_that_is_not_whole_pages_is_refused(size_bytes: int) -> None:
    with pytest.raises(ValueError, match="not whole pages"):
        MemoryMap.of_sizes([("ram", size_bytes)])


def test_two_blocks_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="share a name"):
        MemoryMap.of_sizes([("ram", PAGE_SIZE_BYTES), ("ram", PAGE_SIZE_BYTES)])
