"""Trackers and copiers on a real process: while it writes, when it ends, when we end."""

import errno
import functools
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.integration.memory.tracking import (
    BLOCKS,
    actual_memory,
    make_tracker,
    open_memory,
    until,
)

from holdfast_agent.core.memory_map import PAGE_SIZE_BYTES, MemoryMap, empty_rows, indexes_of
from holdfast_agent.memory import (
    BlockLocation,
    GuestMemory,
    MemoryAccessFailed,
    TrackingFailed,
    choose_tracker,
    pagemap_scan,
)
from holdfast_agent.memory.pagemap import PageTable


def userfaultfds(pid: int) -> list[str]:
    links = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            links.append(str(entry.readlink()))
        except FileNotFoundError:
            continue
    return [link for link in links if "userfaultfd" in link]


def is_tracked(pid: int) -> bool:
    """Whether any mapping is registered for write protection (flag `uw`)."""
    lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    return any(line.startswith("VmFlags:") and " uw" in line for line in lines)


def test_a_closed_tracker_leaves_nothing_behind(start_target: Any) -> None:
    target = start_target(*BLOCKS)
    target.run(do="fill", block="shared")
    before = actual_memory(target).copy()
    tracker = make_tracker("one-step", target, open_memory(target))
    ours = len(list(Path("/proc/self/fd").iterdir()))
    tracker.start()
    assert is_tracked(target.pid)
    assert userfaultfds(target.pid) == []
    tracker.close()
    tracker.close()
    assert not is_tracked(target.pid)
    assert len(list(Path("/proc/self/fd").iterdir())) == ours
    assert np.array_equal(actual_memory(target), before)
    target.run(do="drop", block="shared", first=0, count=600)
    assert not actual_memory(target)[:600].any()
    again = make_tracker("one-step", target, open_memory(target))
    again.start()
    again.close()


def test_the_target_runs_on_when_the_tracker_is_killed(start_target: Any) -> None:
    target = start_target(*BLOCKS)
    target.run(do="fill", block="private")
    script = (
        "import sys\n"
        "from holdfast_agent.core.memory_map import MemoryMap\n"
        "from holdfast_agent.memory import BlockLocation, PagemapScanTracker\n"
        f"locations = [BlockLocation(**block) for block in {target.blocks!r}]\n"
        "sizes = ((it.name, it.size_bytes) for it in locations)\n"
        f"tracker = PagemapScanTracker({target.pid}, locations, MemoryMap.of_sizes(sizes))\n"
        "tracker.start()\n"
        "print('tracking', flush=True)\n"
        "sys.stdin.read()\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"tracking\n"
        assert is_tracked(target.pid)
        owner.send_signal(signal.SIGSTOP)
        # It waits to have its dropped pages noted; the owner's death lets it go on.
        target.begin(do="drop", block="private", first=0, count=600)
        owner.kill()
    assert target.finish() == 600
    pages = list(range(1100))
    assert target.run(do="write", block="private", pages=pages, value=1) == 1100
    until(lambda: not is_tracked(target.pid))


def test_what_is_copied_in_is_what_the_target_reads(start_target: Any) -> None:
    target = start_target(*BLOCKS)
    memory = open_memory(target)
    chance = np.random.default_rng(1)
    page_count = target.memory_map.page_count
    indexes = np.sort(chance.choice(page_count, 1500, replace=False)).astype(np.int64)
    rows = chance.integers(0, 255, (1500, PAGE_SIZE_BYTES), dtype=np.uint8)
    memory.copy_in(indexes, rows)
    expected = np.zeros((page_count, PAGE_SIZE_BYTES), dtype=np.uint8)
    expected[indexes] = rows
    assert np.array_equal(actual_memory(target), expected)
    out = empty_rows(page_count)
    memory.copy_out(np.arange(page_count, dtype=np.int64), out)
    assert np.array_equal(out, expected)
    memory.copy_out(indexes, out)
    assert np.array_equal(out[:1500], rows)
    memory.close()
    memory.close()


@pytest.mark.parametrize("way", ["file", "in-pieces", "mapping-only"])
def test_long_runs_written_for_the_first_time_and_again_are_what_the_target_reads(
    start_target: Any, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    target = start_target(("shared", 900, "shared"))
    pwrite, written = os.pwrite, []

    def write(descriptor: int, data: memoryview, position: int) -> int:
        if way == "mapping-only":  # as a file of huge pages answers
            raise OSError(errno.EINVAL, "Invalid argument")
        written.append(len(data))
        return pwrite(descriptor, data[:5000] if way == "in-pieces" else data, position)

    monkeypatch.setattr(os, "pwrite", write)
    memory = open_memory(target)
    chance = np.random.default_rng(2)
    expected = np.zeros((900, PAGE_SIZE_BYTES), dtype=np.uint8)
    for pages in (range(100, 400), [1, 5, *range(600, 900)], range(90, 410), range(100, 400)):
        indexes = np.array(pages, dtype=np.int64)
        expected[indexes] = chance.integers(0, 255, (len(indexes), 4096), dtype=np.uint8)
        memory.copy_in(indexes, np.ascontiguousarray(expected[indexes]))
    assert np.array_equal(actual_memory(target), expected)
    if way == "file":
        assert written == [300 * 4096, 4096, 4096, 300 * 4096], "only what was fresh throughout"
    memory.close()


def test_a_first_write_that_finds_no_room_is_an_error_that_names_the_page(
    start_target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = start_target(("shared", 100, "shared"))

    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", refuse)
    memory = open_memory(target)
    with pytest.raises(MemoryAccessFailed, match=r"page 40\b.*No space left"):
        memory.copy_in(np.arange(40, 60, dtype=np.int64), empty_rows(20))
    memory.close()


def test_populated_names_every_page_that_is_not_zero_and_touches_nothing(
    start_target: Any,
) -> None:
    target = start_target(*BLOCKS)
    target.run(do="write", block="shared", pages=[3, 4, 900], value=1)
    target.run(do="write", block="private", pages=[1099], value=1)
    target.run(do="read", block="private", pages=[10])
    memory = open_memory(target)
    location = target.locations[0]
    assert location.map_path is not None
    allocated = Path(location.map_path).stat().st_blocks
    populated = set(memory.populated().tolist())
    assert Path(location.map_path).stat().st_blocks == allocated
    assert {3, 4, 900, 1300 + 1099} <= populated
    assert {page for page in populated if page < 1300} == {3, 4, 900}
    memory.close()


def test_data_of_a_privately_mapped_file_is_populated_before_anyone_read_it(
    start_target: Any,
) -> None:
    target = start_target(("anonymous", 40, "private"), ("file", 64, "private_file"))
    target.run(do="write", block="file", pages=[5], value=1)
    memory = open_memory(target)
    populated = memory.populated()
    assert {40 + page for page in (0, 5, 16, 32, 48)} <= set(populated.tolist())
    rows = empty_rows(len(populated))
    memory.copy_out(populated, rows)
    rebuilt = np.zeros((target.memory_map.page_count, PAGE_SIZE_BYTES), dtype=np.uint8)
    rebuilt[populated] = rows
    assert np.array_equal(rebuilt, actual_memory(target))
    memory.close()


@pytest.mark.parametrize("regions_max", [1, 3, 64])
@pytest.mark.parametrize(
    ("kind", "calls_max"), [("one-step", 0), ("two-step", 2), ("two-step", 99)]
)
def test_a_scan_that_returns_early_is_carried_on(
    start_target: Any, monkeypatch: pytest.MonkeyPatch, kind: str, calls_max: int, regions_max: int
) -> None:
    target = start_target(*BLOCKS)
    for name in ("shared", "private"):
        target.run(do="fill", block=name)
    small = functools.partial(PageTable, regions_max=regions_max)
    monkeypatch.setattr(pagemap_scan, "PageTable", small)
    monkeypatch.setattr(pagemap_scan, "PROTECT_CALLS_MAX", calls_max)
    tracker = make_tracker(kind, target, open_memory(target))
    tracker.start()
    chance = np.random.default_rng(3)
    try:
        for _ in range(5):
            written = np.sort(chance.choice(1100, 90, replace=False))
            for name in ("shared", "private"):
                target.run(do="write", block=name, pages=written.tolist(), value=5)
            expected = [*written.tolist(), *(1300 + written).tolist()]
            assert tracker.harvest().tolist() == expected
        assert tracker.harvest().tolist() == []
    finally:
        tracker.close()


def test_reading_what_was_given_back_does_not_take_it_again(start_target: Any) -> None:
    target = start_target(*BLOCKS)
    target.run(do="fill", block="shared")
    target.run(do="drop", block="shared", first=64, count=1024)
    location = target.locations[0]
    assert location.map_path is not None
    allocated = Path(location.map_path).stat().st_blocks
    memory = open_memory(target)
    for indexes in (np.arange(1300), np.arange(32, 1216), np.r_[0:3, 64:1088, 1200:1204]):
        out = empty_rows(len(indexes))
        memory.copy_out(indexes.astype(np.int64), out)
        assert not out[(indexes >= 64) & (indexes < 1088)].any()
    assert Path(location.map_path).stat().st_blocks == allocated
    memory.close()


def test_the_older_kernels_way_finds_the_same_pages(start_target: Any) -> None:
    target = start_target(*BLOCKS)
    target.run(do="write", block="private", pages=[0, 5, 6, 1099], value=1)
    location = target.locations[1]
    table = PageTable(target.pid)

    def pages(runs: np.ndarray) -> list[int]:
        local = ((runs - np.uint64(location.host_address)) // np.uint64(PAGE_SIZE_BYTES)).astype(
            np.int64
        )
        found = indexes_of(np.stack((local[:, 0], local[:, 1] - local[:, 0]), axis=1))
        return [int(page) for page in found]

    by_scan = pages(table.populated(location.host_address, location.end_address))
    by_entry = pages(table.populated_by_entries(location.host_address, location.end_address))
    assert by_scan == by_entry
    assert {0, 5, 6, 1099} <= set(by_scan)
    table.close()


def test_a_page_that_cannot_be_read_is_named(start_target: Any) -> None:
    target = start_target(("private", 64, "private"))
    found = target.locations[0]
    # As if the block were longer than what is mapped; nothing lies behind the top of user space.
    beyond = BlockLocation("private", 64 * PAGE_SIZE_BYTES, (1 << 47) - 64 * 4096, False, None, 0)
    memory = GuestMemory(target.pid, [beyond], target.memory_map)
    with pytest.raises(MemoryAccessFailed, match="block private, page 7") as caught:
        memory.copy_out(np.array([7, 9], dtype=np.int64), empty_rows(2))
    assert caught.value.page == 7
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EFAULT
    memory.close()
    assert found.host_address != beyond.host_address


@pytest.mark.parametrize("write", [False, True])
def test_a_page_behind_readable_ones_is_named_when_it_fails(
    start_target: Any, *, write: bool
) -> None:
    target = start_target(("private", 64, "private"))
    start = target.locations[0].host_address
    lines = Path(f"/proc/{target.pid}/maps").read_text().splitlines()
    ranges = [tuple(int(part, 16) for part in line.split()[0].split("-")) for line in lines]
    # The last mapping before a hole of the address space, seen from its last two pages on.
    end = next(
        this[1]
        for this, following in itertools.pairwise(ranges)
        if this[1] > start and following[0] - this[1] >= 62 * PAGE_SIZE_BYTES
    )
    location = BlockLocation(
        "private", 64 * PAGE_SIZE_BYTES, end - 2 * PAGE_SIZE_BYTES, False, None, 0
    )
    memory = GuestMemory(target.pid, [location], target.memory_map)
    rows = empty_rows(4)
    if write:
        memory.copy_out(np.array([0, 1], dtype=np.int64), rows)
    with pytest.raises(MemoryAccessFailed, match="page 2"):
        (memory.copy_in if write else memory.copy_out)(np.array([0, 1, 2, 5], dtype=np.int64), rows)
    memory.close()


def test_memory_of_a_dead_process_is_an_error_not_zeros(start_target: Any) -> None:
    target = start_target(("private", 64, "private"))
    target.run(do="fill", block="private")
    memory = open_memory(target)
    target.end()
    with pytest.raises(MemoryAccessFailed, match="ended"):
        memory.copy_out(np.arange(3, dtype=np.int64), empty_rows(3))
    with pytest.raises(MemoryAccessFailed, match="ended"):
        memory.populated()
    memory.close()


def test_an_index_outside_the_map_is_a_bug_and_says_so(start_target: Any) -> None:
    target = start_target(*BLOCKS)
    memory = open_memory(target)
    for index in (-1, target.memory_map.page_count):
        with pytest.raises(AssertionError):
            memory.copy_out(np.array([index], dtype=np.int64), empty_rows(1))
    memory.close()


def test_the_best_tracker_is_chosen_and_the_others_only_on_request(start_target: Any) -> None:
    target = start_target(*BLOCKS)
    memory = open_memory(target)
    best = choose_tracker(target.pid, target.locations, memory)
    assert (best.tracker.name, best.passed_over) == ("pagemap-scan", ())
    # The first one holds the memory: the next says why it had to be passed over.
    second = choose_tracker(target.pid, target.locations, memory)
    assert second.tracker.name == "compare"
    reasons = dict(second.passed_over)
    assert list(reasons) == ["pagemap-scan", "soft-dirty"]
    assert "busy" in reasons["pagemap-scan"]
    second.tracker.close()
    with pytest.raises(TrackingFailed, match="busy"):
        choose_tracker(target.pid, target.locations, memory, preference=["pagemap-scan"])
    best.tracker.close()
    with pytest.raises(ValueError, match="there are pagemap-scan, soft-dirty, compare"):
        choose_tracker(target.pid, target.locations, memory, preference=["soft"])
    memory.close()


def test_blocks_that_are_not_those_of_the_map_are_refused(start_target: Any) -> None:
    target = start_target(*BLOCKS)
    other = MemoryMap.of_sizes([("ram", PAGE_SIZE_BYTES)])
    with pytest.raises(ValueError, match="not those of the map"):
        GuestMemory(target.pid, target.locations, other)
