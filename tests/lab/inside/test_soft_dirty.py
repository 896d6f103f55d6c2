"""Tracking by soft-dirty marks, on a kernel that has them and no page table scans (Debian's 6.1).

The tests of all trackers run here as they are; those below are about what only this one does.
"""

import mmap
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.memory.conftest import start_target, target_module
from tests.integration.memory.test_every_tracker import (
    test_a_second_tracker_is_refused_and_the_first_goes_on,
    test_no_write_is_lost_while_the_target_writes_all_the_time,
    test_nothing_is_reported_when_nothing_is_written,
    test_pages_given_back_are_reported_even_if_only_read_again,
    test_the_end_of_the_target_is_not_mistaken_for_silence,
    test_tracked_memory_that_is_unmapped_is_not_mistaken_for_silence,
)
from tests.integration.memory.tracking import make_tracker, open_memory, until
from tests.property.memory.test_tracking import SIZES, check_history

from holdfast_agent.core.memory_map import MemoryMap
from holdfast_agent.memory import BlockLocation, TrackingFailed, choose_tracker, unavailable

__all__ = [
    "start_target",
    "test_a_second_tracker_is_refused_and_the_first_goes_on",
    "test_no_write_is_lost_while_the_target_writes_all_the_time",
    "test_nothing_is_reported_when_nothing_is_written",
    "test_pages_given_back_are_reported_even_if_only_read_again",
    "test_the_end_of_the_target_is_not_mistaken_for_silence",
    "test_tracked_memory_that_is_unmapped_is_not_mistaken_for_silence",
]

HUGE_PAGES = 512
KSM = Path("/sys/kernel/mm/ksm")
MERGEABLE = 12  # MADV_MERGEABLE
PAGES = 2048


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the tests of all trackers with this one."""
    for name in ("any_kind", "marking_kind"):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, ["soft-dirty"])


@pytest.fixture(scope="module")
def target() -> Iterator[Any]:
    """A target with blocks of the names and sizes that histories speak of, all of them private."""
    blocks = [
        target_module.Block("shared", 1283, "private"),
        target_module.Block("private", 700, "private"),
        target_module.Block("huge", 1537, "private", huge=True),
        target_module.Block("small", 3, "private"),
    ]
    with target_module.Target(blocks) as target:
        target.locations = [BlockLocation(**block) for block in target.blocks]
        target.memory_map = MemoryMap.of_sizes(
            (location.name, location.size_bytes) for location in target.locations
        )
        yield target


# Given back and read again; in between single pages, a whole huge one, and its rest.
GIVEN_BACK: list[list[tuple[Any, ...]]] = [
    [("write_run", "private", (0, 600), 5), ("write_run", "huge", (0, 1537), 6)],
    [("drop", "private", (10, 40)), ("read", "private", [10, 30]), ("drop", "huge", (0, 1537))],
    [("read", "huge", [1, 700, 1500]), ("read", "private", [12, 30])],
    [("write", "huge", [700], 3), ("drop", "private", (300, 40))],
    [("read", "private", [300, 301])],
]


def random_history(seed: int) -> list[list[tuple[Any, ...]]]:
    """Return what hypothesis would make up; its own bookkeeping takes minutes in here."""
    chance = random.Random(seed)

    def action() -> tuple[Any, ...]:
        name, size = chance.choice(sorted(SIZES.items()))
        pages = [chance.randrange(size) for _ in range(chance.randint(1, 6))]
        first = chance.randrange(size)
        run = (first, min(chance.choice([1, 2, 40, 512, 1024]), size - first))
        return chance.choice(
            [
                ("write", name, pages, chance.randrange(256)),
                ("read", name, pages),
                ("drop", name, run),
                ("write_run", name, run, chance.randrange(1, 256)),
            ]
        )

    return [[action() for _ in range(5)] for _ in range(5)]


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4, 5])
def test_whatever_the_target_does_harvest_and_copy_rebuild_it_exactly(
    target: Any, seed: int
) -> None:
    check_history(target, "soft-dirty", random_history(seed) if seed else GIVEN_BACK)


def whole_huge_page(target: Any) -> int:
    """Return the first page, within the only block, of a whole aligned 2 MiB."""
    return int(-(target.locations[0].host_address // 4096) % HUGE_PAGES)


def test_a_huge_page_is_reported_whole_once_and_exactly_from_then_on(start_target: Any) -> None:
    target = start_target(("ram", PAGES, "private", True))
    target.run(do="fill", block="ram")
    first = whole_huge_page(target)
    tracker = make_tracker("soft-dirty", target, open_memory(target))
    tracker.start()
    try:
        target.run(do="write", block="ram", pages=[first + 7], value=1)
        whole = list(range(first, first + HUGE_PAGES))
        assert tracker.harvest().tolist() == whole, "it was no huge page: nothing was tried"
        for page in (8, 500):
            target.run(do="write", block="ram", pages=[first + page], value=2)
            assert tracker.harvest().tolist() == [first + page]
    finally:
        tracker.close()


@pytest.mark.parametrize("kind", ["shared", "private_file"])
def test_memory_that_loses_its_marks_is_passed_over_with_the_reason(
    start_target: Any, kind: str
) -> None:
    target = start_target(("plain", 64, "private"), ("lossy", 64, kind))
    memory = open_memory(target)
    choice = choose_tracker(target.pid, target.locations, memory)
    assert choice.tracker.name == "compare"
    reasons = dict(choice.passed_over)
    assert "Linux 6.7" in reasons["pagemap-scan"]
    assert "block lossy is shared or maps a file" in reasons["soft-dirty"]
    choice.tracker.close()
    memory.close()


def test_private_memory_is_tracked_by_marks_where_no_scan_is_offered(start_target: Any) -> None:
    target = start_target(("ram", 64, "private"))
    memory = open_memory(target)
    choice = choose_tracker(target.pid, target.locations, memory)
    assert choice.tracker.name == "soft-dirty"
    assert [name for name, _ in choice.passed_over] == ["pagemap-scan"]
    assert (unavailable("soft-dirty"), unavailable("compare")) == (None, None)
    choice.tracker.close()
    memory.close()


def test_memory_mapped_anew_counts_as_written_throughout(start_target: Any) -> None:
    target = start_target(("ram", 64, "private"))
    target.run(do="fill", block="ram")
    tracker = make_tracker("soft-dirty", target, open_memory(target))
    tracker.start()
    try:
        assert target.run(do="map_anew", block="ram", shared=False) == 1
        assert tracker.harvest().tolist() == list(range(64))
        assert tracker.harvest().tolist() == []
    finally:
        tracker.close()


def test_memory_that_becomes_shared_is_refused(start_target: Any) -> None:
    target = start_target(("ram", 64, "private"))
    tracker = make_tracker("soft-dirty", target, open_memory(target))
    tracker.start()
    try:
        assert target.run(do="map_anew", block="ram", shared=True) == 1
        with pytest.raises(TrackingFailed, match="block ram is shared"):
            tracker.harvest()
    finally:
        tracker.close()


class TestMerging:
    """Kernel samepage merging, which makes entries anew and drops their marks."""

    @pytest.fixture(autouse=True)
    def _merging_ends(self) -> Any:
        (KSM / "pages_to_scan").write_text("5000")
        (KSM / "sleep_millisecs").write_text("0")
        yield
        (KSM / "run").write_text("2")  # stop, and take apart what was merged

    def test_a_tracker_does_not_begin_where_pages_may_be_merged(self, start_target: Any) -> None:
        target = start_target(("ram", 64, "private"))
        target.run(do="advise", block="ram", advice=MERGEABLE)
        (KSM / "run").write_text("1")
        tracker = make_tracker("soft-dirty", target, open_memory(target))
        with pytest.raises(TrackingFailed, match="merges equal pages of ram"):
            tracker.start()

    def test_a_tracker_ends_when_merging_begins(self, start_target: Any) -> None:
        target = start_target(("ram", 64, "private"))
        target.run(do="advise", block="ram", advice=MERGEABLE)
        tracker = make_tracker("soft-dirty", target, open_memory(target))
        tracker.start()
        try:
            assert tracker.harvest().tolist() == []
            (KSM / "run").write_text("1")
            with pytest.raises(TrackingFailed, match="mem-merge=off"):
                tracker.harvest()
        finally:
            tracker.close()

    def test_memory_that_is_not_to_be_merged_is_tracked_beside_it(self, start_target: Any) -> None:
        target = start_target(("ram", 64, "private"))
        (KSM / "run").write_text("1")
        tracker = make_tracker("soft-dirty", target, open_memory(target))
        tracker.start()
        try:
            target.run(do="write", block="ram", pages=[3], value=1)
            assert tracker.harvest().tolist() == [3]
        finally:
            tracker.close()

    def test_the_kernel_does_drop_marks_when_it_merges(self, start_target: Any) -> None:
        """The reason for all this; a kernel that keeps them makes the refusal needless."""
        target = start_target(("ram", 64, "private"))
        target.run(do="advise", block="ram", advice=MERGEABLE)
        tracker = make_tracker("soft-dirty", target, open_memory(target))
        tracker.start()
        try:
            pages = list(range(64))
            target.run(do="write", block="ram", pages=pages, value=0)
            (KSM / "run").write_text("1")
            until(lambda: int((KSM / "pages_sharing").read_text()) >= 60)
            (KSM / "run").write_text("0")
            start = target.locations[0].host_address
            with Path(f"/proc/{target.pid}/pagemap").open("rb") as table:
                table.seek(start // mmap.PAGESIZE * 8)
                entries = [int.from_bytes(table.read(8), "little") for _ in pages]
            assert sum(entry >> 55 & 1 for entry in entries) < 64
            assert tracker.harvest().tolist() == pages, "seen by their frames all the same"
        finally:
            tracker.close()
