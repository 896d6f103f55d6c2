"""What a page table entry says about a page, and which huge pages were written throughout."""

import numpy as np
import pytest

from holdfast_agent.core.memory_map import NO_PAGES, MemoryBlock, MemoryMap
from holdfast_agent.memory import BlockLocation, SoftDirtyTracker, TrackingFailed, soft_dirty
from holdfast_agent.memory.soft_dirty import whole_regions, written_positions

PRESENT, SWAPPED, FILE, ALONE, MARKED = 1 << 63, 1 << 62, 1 << 61, 1 << 56, 1 << 55
ZERO = PRESENT | 0x3310
OURS = PRESENT | ALONE | 0x9267
HUGE_ZERO = PRESENT | FILE | 0x9267
"""Of the very frame that OURS had."""


@pytest.mark.parametrize(
    ("before", "now", "written"),
    [
        pytest.param(OURS, OURS, False, id="untouched"),
        pytest.param(OURS, OURS | MARKED, True, id="written"),
        pytest.param(0, OURS | MARKED, True, id="written for the first time"),
        pytest.param(OURS, 0, True, id="given back"),
        pytest.param(OURS, ZERO, True, id="given back and read"),
        pytest.param(OURS, HUGE_ZERO, True, id="given back and read as a huge zero page"),
        pytest.param(SWAPPED | 5, 0, True, id="swapped out and given back"),
        pytest.param(SWAPPED | 5, ZERO, True, id="swapped out, given back and read"),
        pytest.param(OURS, PRESENT | ALONE | 0x777, True, id="moved"),
        pytest.param(OURS, PRESENT | 0x777, True, id="merged"),
        pytest.param(OURS, SWAPPED | 5, True, id="swapped out"),
        pytest.param(0, 0, False, id="never touched"),
        pytest.param(0, ZERO, False, id="read for the first time"),
        pytest.param(ZERO, 0, False, id="zero and given back"),
        pytest.param(ZERO, ZERO, False, id="still zero"),
        pytest.param(0, MARKED, True, id="mapped anew"),
        pytest.param(0, ZERO | MARKED, True, id="mapped anew and read"),
        pytest.param(ZERO, OURS, True, id="zero and then not"),
    ],
)
def test_a_page_is_reported_when_its_content_may_have_changed(
    before: int, now: int, *, written: bool
) -> None:
    # Among others, so that positions count.
    remembered = np.array([OURS, before, 0], dtype=np.uint64)
    entries = np.array([OURS, now, 0], dtype=np.uint64)
    found = written_positions(entries, remembered, np.uint64(ZERO))
    assert found.tolist() == ([1] if written else [])
    assert remembered.tolist() == [OURS, now & ~MARKED, 0], "remembered without its mark"
    unmarked = np.array([OURS, now & ~MARKED, 0], dtype=np.uint64)
    assert written_positions(unmarked, remembered, np.uint64(ZERO)).tolist() == []


BLOCK = MemoryBlock("ram", 100, 3000)


@pytest.mark.parametrize("skew", [0, 1, 300, 511])
@pytest.mark.parametrize(("holed", "hole"), [(0, 511), (2, 0), (3, 511), (4, 200), (9, 0)])
def test_regions_count_as_whole_only_when_no_page_of_them_is_missing(
    skew: int, holed: int, hole: int
) -> None:
    wanted = [n for n in (0, 2, 3, 4) if n * 512 >= skew and (n + 1) * 512 - skew <= 3000]
    pages = np.concatenate([100 + n * 512 - skew + np.arange(512) for n in wanted])
    missing = 100 + holed * 512 - skew + hole
    # Pages of the blocks before and behind are none of this one's.
    parts = [np.arange(100), pages[pages != missing], np.arange(3100, 3700)]
    assert whole_regions(parts, BLOCK, skew).tolist() == [n for n in wanted if n != holed]


def test_nothing_written_is_no_region() -> None:
    assert whole_regions([NO_PAGES], BLOCK, 0).tolist() == []
    assert whole_regions([], BLOCK, 0).tolist() == []


def test_a_block_is_read_in_pieces_and_its_pages_keep_their_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(soft_dirty, "_ENTRIES_PER_READ", 64)
    location = BlockLocation("ram", 200 * 4096, 0x10000, False, None, 0)
    tracker = SoftDirtyTracker(1, [location], MemoryMap.of_sizes([("ram", 200 * 4096)]))
    table = np.zeros(200, dtype=np.uint64)
    table[[5, 64, 130, 199]] = OURS | MARKED

    class Table:
        def read_entries(self, start: int, out: np.ndarray) -> None:
            first = (start - location.host_address) // 4096
            out[:] = table[first : first + len(out)]

    tracker._table = Table()  # type: ignore[assignment]
    parts = tracker._written(location, np.zeros(200, dtype=np.uint64))
    assert np.concatenate(parts).tolist() == [5, 64, 130, 199]


LOCATION = BlockLocation("ram", 0x4000, 0x10000, False, None, 0)
ELSEWHERE = ["8000-10000 r--p 00000000 08:01 7 /bin/x", "14000-15000 rw-s 00000000 00:01 9 /dev"]


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        (["10000-14000 rw-p 00000000 00:00 0"], None),
        (["f000-15000 rw-p 00000000 00:00 0"], None),
        (["10000-12000 rw-p 00000000 00:00 0", "12000-14000 rw-p 00000000 00:00 0 [anon:x]"], None),
        ([], "at 0x10000 is unmapped"),
        (["11000-14000 rw-p 00000000 00:00 0"], "at 0x10000 is unmapped"),
        (["10000-13000 rw-p 00000000 00:00 0"], "at 0x13000 is unmapped"),
        (
            ["10000-11000 rw-p 00000000 00:00 0", "12000-14000 rw-p 00000000 00:00 0"],
            "at 0x11000 is unmapped",
        ),
        (["10000-14000 rw-s 00000000 00:00 0"], "is shared or maps a file"),
        (["10000-14000 rw-p 00000000 00:01 5 /memfd:x"], "is shared or maps a file"),
        (
            ["10000-12000 rw-p 00000000 00:00 0", "12000-14000 rw-p 00000000 00:01 5 /memfd:x"],
            "is shared or maps a file",
        ),
    ],
)
def test_a_block_is_private_memory_throughout_or_refused(
    lines: list[str], fault: str | None
) -> None:
    tracker = SoftDirtyTracker(1, [LOCATION], MemoryMap.of_sizes([("ram", 0x4000)]))
    maps = [line.encode() for line in (ELSEWHERE[0], *lines, ELSEWHERE[1])]
    if fault is None:
        assert tracker._mappings_of(LOCATION, maps) == [line.encode() for line in lines]
    else:
        with pytest.raises(TrackingFailed, match=fault):
            tracker._mappings_of(LOCATION, maps)
