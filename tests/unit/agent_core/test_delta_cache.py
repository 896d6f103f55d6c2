"""The cache of what the backup has: what is known, what is forgotten, who may stay."""

from pathlib import Path

import numpy as np

from holdfast_agent.core.delta_cache import HOLD_MAX, DeltaCache
from holdfast_agent.core.memory_map import PAGE_SIZE_BYTES, PageIndexes, PageRows


def pages(*numbers: int) -> PageIndexes:
    return np.array(numbers, dtype=np.int64)


def rows(*values: int) -> PageRows:
    return np.repeat(np.array(values, np.uint8)[:, None], PAGE_SIZE_BYTES, axis=1)


def cache_of(place_count: int, page_count: int = 100) -> DeltaCache:
    return DeltaCache(page_count, place_count * PAGE_SIZE_BYTES + 4095)


def knows(cache: DeltaCache, *numbers: int) -> list[bool]:
    known, _ = cache.exchange(pages(*numbers), rows(*[0] * len(numbers)))
    return [bool(flag) for flag in known]


def test_a_page_is_known_as_it_was_sent_last() -> None:
    cache = cache_of(8)
    known, difference = cache.exchange(pages(1, 3), rows(10, 30))
    assert (known.tolist(), len(difference)) == ([False, False], 0)
    known, difference = cache.exchange(pages(1, 2, 3), rows(11, 20, 30))
    assert known.tolist() == [True, False, True]
    assert difference[:, 0].tolist() == [10 ^ 11, 0]
    known, difference = cache.exchange(pages(1, 2), rows(12, 20))
    assert difference[:, 4095].tolist() == [11 ^ 12, 0]
    assert cache.page_count == 3


def test_what_is_remembered_is_a_copy() -> None:
    cache, sent = cache_of(8), rows(1)
    cache.exchange(pages(5), sent)
    sent[:] = 9
    _, difference = cache.exchange(pages(5), rows(1))
    assert not difference.any()
    difference[:] = 7
    _, again = cache.exchange(pages(5), rows(1))
    assert not again.any()


def test_a_page_that_went_another_way_is_not_known() -> None:
    cache = cache_of(8)
    cache.forget(pages(1, 2))
    cache.exchange(pages(1, 2), rows(1, 2))
    cache.forget(pages(2, 3, 9))  # 9 has the place of 1, but it is not 1
    assert cache.page_count == 1
    assert knows(cache, 1, 2, 3) == [True, False, False]


def test_a_cleared_cache_knows_nothing_and_begins_again() -> None:
    cache = cache_of(8)
    cache.exchange(pages(1), rows(1))
    cache.clear()
    assert cache.page_count == 0
    assert knows(cache, 1) == [False]
    assert knows(cache, 1) == [True]


def test_without_room_for_a_page_nothing_is_known() -> None:
    cache = DeltaCache(100, PAGE_SIZE_BYTES - 1)
    assert knows(cache, 1, 2) == [False, False]
    assert knows(cache, 1, 2) == [False, False]


def test_a_guest_smaller_than_the_cache_is_known_whole() -> None:
    cache = DeltaCache(16, 1 << 30)
    everything = np.arange(16)
    cache.exchange(everything, rows(*range(16)))
    assert cache.page_count == 16
    assert knows(cache, *range(16)) == [True] * 16


def test_a_page_keeps_its_place_as_often_as_it_was_sent_more_than_once() -> None:
    cache = cache_of(4)
    for _ in range(HOLD_MAX + 5):  # however often: it holds on for so long and no longer
        cache.exchange(pages(1), rows(1))
    for _ in range(HOLD_MAX):
        assert knows(cache, 5) == [False]
    assert cache.page_count == 1
    assert knows(cache, 5) == [False]
    assert knows(cache, 1) == [False]
    assert cache.page_count == 1


def test_of_two_new_pages_with_one_place_one_is_known() -> None:
    cache = cache_of(4)
    cache.exchange(pages(1, 5), rows(10, 50))
    assert cache.page_count == 1
    known, difference = cache.exchange(pages(1, 5), rows(10, 50))
    assert known.sum() == 1
    assert not difference.any()


def test_a_page_that_loses_its_place_in_the_batch_that_sends_it_is_not_mixed_up() -> None:
    cache = cache_of(4)
    for numbers in ((1, 2), (5, 6), (1, 2, 5, 6), (5, 6), (1, 5), (2, 6), (1, 2, 5, 6)) * 3:
        _, difference = cache.exchange(pages(*numbers), rows(*numbers))
        assert not difference.any()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_SIZE_BYTES


def test_pages_that_lie_far_apart_take_no_more_memory_than_they_are() -> None:
    cache = DeltaCache(32_768, 32_768 * PAGE_SIZE_BYTES)
    scattered = np.arange(0, 32_768, 512, dtype=np.int64)
    content = rows(*[1] * len(scattered))
    before = resident_bytes()
    cache.exchange(scattered, content)
    taken = resident_bytes() - before
    assert taken < 16 << 20, "64 pages; as huge pages they would be 128 MiB, all cleared at once"


def test_nothing_sent_is_nothing_known() -> None:
    cache = cache_of(4)
    known, difference = cache.exchange(pages(), rows())
    assert (len(known), len(difference)) == (0, 0)


def test_a_page_that_is_forgotten_leaves_its_place_to_the_next() -> None:
    cache = cache_of(4)
    for _ in range(3):
        cache.exchange(pages(1), rows(1))
    cache.forget(pages(1))
    assert knows(cache, 5) == [False]
    assert knows(cache, 5) == [True]


def test_a_page_that_was_sent_once_is_not_displaced_at_once() -> None:
    cache = cache_of(4)
    cache.exchange(pages(1), rows(1))
    assert knows(cache, 5) == [False]
    assert knows(cache, 1) == [True]
