"""What every tracker promises, on a real process.

The kinds come from the folder that runs these tests: here those of this machine, in
`tests/lab/inside/memory` those that need a kernel of their own.
"""

from typing import Any

import numpy as np
import pytest
from tests.integration.memory.tracking import (
    actual_memory,
    blocks_for,
    make_tracker,
    open_memory,
    standing,
    until,
)

from holdfast_agent.core.memory_map import PAGE_SIZE_BYTES, empty_rows
from holdfast_agent.memory import TrackingFailed


def test_no_write_is_lost_while_the_target_writes_all_the_time(
    start_target: Any, any_kind: str
) -> None:
    target = start_target(*blocks_for(any_kind))
    names = [block.name for block in target.memory_map.blocks[:2]]
    for name in names:
        target.run(do="fill", block=name)
    memory = open_memory(target)
    tracker = make_tracker(any_kind, target, memory)
    rebuilt = np.zeros((target.memory_map.page_count, PAGE_SIZE_BYTES), dtype=np.uint8)
    rows = empty_rows(len(rebuilt))

    def copy(indexes: np.ndarray) -> int:
        memory.copy_out(indexes, rows)
        rebuilt[indexes] = rows[: len(indexes)]
        tracker.copied(indexes, rows)
        return len(indexes)

    def harvest() -> np.ndarray:
        with standing(target, tracker):
            found: np.ndarray = tracker.harvest()
        return found

    try:
        for seed, name in enumerate(names):
            target.begin(do="storm", block=name, seed=seed)
            if seed == 0:
                with standing(target, tracker):
                    tracker.start()
                copy(memory.populated())
            rounds_with_writes = 0

            def one_more_round() -> bool:
                nonlocal rounds_with_writes
                # Copied while it writes again: what is torn is harvested the next time.
                rounds_with_writes += copy(harvest()) > 0
                return rounds_with_writes >= 25

            until(one_more_round)
            target.begin(do="signals")
            assert target.finish() > 0
            target.finish()
            copy(harvest())
            assert np.array_equal(rebuilt, actual_memory(target))
    finally:
        tracker.close()
        memory.close()


def test_nothing_is_reported_when_nothing_is_written(start_target: Any, marking_kind: str) -> None:
    target = start_target(*blocks_for(marking_kind))
    first, second, _ = (block.name for block in target.memory_map.blocks)
    target.run(do="fill", block=first)
    target.run(do="write", block=second, pages=[0, 7, 1000], value=3)
    tracker = make_tracker(marking_kind, target, open_memory(target))
    tracker.start()
    try:
        assert tracker.harvest().tolist() == []
        target.run(do="write", block=first, pages=[5, 1299], value=9)
        assert tracker.harvest().tolist() == [5, 1299]
        assert tracker.harvest().tolist() == []
    finally:
        tracker.close()


@pytest.mark.parametrize("reads", [True, False])
def test_pages_given_back_are_reported_even_if_only_read_again(
    start_target: Any, marking_kind: str, *, reads: bool
) -> None:
    target = start_target(*blocks_for(marking_kind))
    tracker = make_tracker(marking_kind, target, open_memory(target))
    blocks = target.memory_map.blocks[:2]
    for block in blocks:
        target.run(do="fill", block=block.name)
    tracker.start()
    try:
        tracker.harvest()
        for block in blocks:
            target.run(do="drop", block=block.name, first=20, count=600)
            if reads:
                target.run(do="read", block=block.name, pages=[20, 300, 619])
            dropped = set(range(block.first_page + 20, block.first_page + 620))
            assert dropped <= set(tracker.harvest().tolist())
    finally:
        tracker.close()


def test_the_end_of_the_target_is_not_mistaken_for_silence(
    start_target: Any, marking_kind: str
) -> None:
    target = start_target(*blocks_for(marking_kind))
    tracker = make_tracker(marking_kind, target, open_memory(target))
    tracker.start()
    try:
        target.end()
        with pytest.raises(TrackingFailed, match="ended"):
            tracker.harvest()
    finally:
        tracker.close()


def test_tracked_memory_that_is_unmapped_is_not_mistaken_for_silence(
    start_target: Any, marking_kind: str
) -> None:
    target = start_target(*blocks_for(marking_kind))
    tracker = make_tracker(marking_kind, target, open_memory(target))
    tracker.start()
    try:
        assert target.run(do="unmap", block=target.memory_map.blocks[1].name) == 0
        with pytest.raises(TrackingFailed, match="unmapped"):
            tracker.harvest()
    finally:
        tracker.close()


def test_a_second_tracker_is_refused_and_the_first_goes_on(
    start_target: Any, marking_kind: str
) -> None:
    target = start_target(*blocks_for(marking_kind))
    first = make_tracker(marking_kind, target, open_memory(target))
    second = make_tracker(marking_kind, target, open_memory(target))
    first.start()
    try:
        with pytest.raises(TrackingFailed, match="busy"):
            second.start()
        target.run(do="write", block="tiny", pages=[1], value=1)
        first_page = target.memory_map.blocks[2].first_page
        assert first_page + 1 in first.harvest().tolist()
    finally:
        first.close()
    second = make_tracker(marking_kind, target, open_memory(target))
    second.start()
    second.close()
