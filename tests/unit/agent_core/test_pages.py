"""Owed pages: single steps; the invariant itself is tested by a state machine."""

import numpy as np
import pytest

from holdfast_agent.core.pages import MAX_PARTS, OwedPages


def page_set(*indexes: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(indexes, dtype=np.int64)


def test_what_is_owed_is_taken_sorted_and_once() -> None:
    owed = OwedPages(1000)
    owed.owe(page_set(5, 9))
    owed.owe(page_set(1, 5, 999))
    assert owed.take().tolist() == [1, 5, 9, 999]
    assert owed.take().tolist() == []
    assert owed.in_flight_count == 4


def test_what_failed_is_owed_again_together_with_what_came_meanwhile() -> None:
    owed = OwedPages(1000)
    owed.owe(page_set(1, 2))
    owed.take()
    owed.owe(page_set(2, 3))
    owed.failed()
    assert owed.in_flight_count == 0
    assert owed.take().tolist() == [1, 2, 3]


def test_what_is_acknowledged_is_not_owed_any_more() -> None:
    owed = OwedPages(1000)
    owed.owe(page_set(1, 2))
    owed.take()
    owed.owe(page_set(2))
    owed.acknowledged()
    owed.failed()
    assert owed.take().tolist() == [2]


@pytest.mark.parametrize("bad", [(-1, 3), (3, 1000), (3, 3), (5, 4)])
def test_pages_out_of_order_or_out_of_the_map_are_a_programmers_error(bad: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError):
        OwedPages(1000).owe(page_set(*bad))


def test_a_debt_does_not_change_with_the_array_it_came_in() -> None:
    owed = OwedPages(1000)
    indexes = page_set(1, 2)
    owed.owe(indexes)
    indexes[:] = 7
    taken = owed.take()
    assert taken.tolist() == [1, 2]
    with pytest.raises(ValueError, match="read-only"):
        taken[0] = 3


def test_forgotten_harvests_do_not_pile_up() -> None:
    owed = OwedPages(1000)
    for _ in range(10 * MAX_PARTS):
        owed.owe(page_set(1, 2))
        assert len(owed._owed) <= MAX_PARTS
        assert len(owed._in_flight) <= MAX_PARTS
    for _ in range(10 * MAX_PARTS):
        owed.owe(page_set(1, 2))
        owed.take()
        assert len(owed._in_flight) <= MAX_PARTS
    assert owed.in_flight_count == 2
