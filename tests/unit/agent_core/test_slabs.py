"""Slabs: growth, the limit, and the strike rule step by step."""

import numpy as np
import pytest

from holdfast_agent.core.slabs import SlabLimitReached, SlabPool

SLAB = 4 * 4096


def pool(limit_slabs: int = 8, strikes: int = 3, headroom_slabs: int = 0) -> SlabPool:
    return SlabPool(
        SLAB, limit_slabs * SLAB, headroom_bytes_max=headroom_slabs * SLAB, strikes_to_halve=strikes
    )


def use(subject: SlabPool, page_count: int) -> None:
    subject.take(page_count)
    subject.give_back()


def test_a_new_pool_has_its_head_slab_only() -> None:
    subject = pool()
    assert (subject.slab_count, subject.allocated_bytes, subject.pages_per_slab) == (1, SLAB, 4)


def test_rows_for_all_pages_are_given_full_slabs_first() -> None:
    rows = pool().take(9)
    assert [len(part) for part in rows] == [4, 4, 1]
    assert all(part.shape[1] == 4096 and part.dtype == np.uint8 for part in rows)


def test_no_pages_need_no_slab() -> None:
    assert pool().take(0) == []


def test_a_pool_grows_towards_twice_the_last_checkpoint_one_slab_at_a_time() -> None:
    subject = pool(headroom_slabs=8)
    use(subject, 9)
    assert (subject.slab_count, subject.is_short) == (3, True)
    subject.grow_by_one()
    assert (subject.slab_count, subject.is_short) == (4, True)
    subject.grow_by_one()
    assert (subject.slab_count, subject.is_short) == (5, False)
    subject.grow_by_one()
    assert subject.slab_count == 5


@pytest.mark.parametrize(("headroom", "limit", "slabs"), [(2, 9, 6), (9, 9, 8), (9, 7, 7)])
def test_headroom_ends_at_its_own_limit_and_at_that_of_the_pool(
    headroom: int, limit: int, slabs: int
) -> None:
    subject = pool(limit, headroom_slabs=headroom)
    use(subject, 16)
    while subject.is_short:
        subject.grow_by_one()
    assert subject.slab_count == slabs


def test_a_steady_load_with_its_headroom_strikes_nothing() -> None:
    subject = pool(headroom_slabs=8)
    for _ in range(10):
        use(subject, 8)
        subject.grow_by_one()
    assert (subject.strikes, subject.slab_count, subject.halvings) == (0, 4, 0)


def test_slabs_are_reused() -> None:
    subject = pool()
    first = subject.take(4)[0]
    subject.give_back()
    assert np.shares_memory(first, subject.take(4)[0])


def test_the_limit_is_reached_and_not_passed() -> None:
    subject = pool(limit_slabs=2)
    subject.take(8)
    subject.give_back()
    with pytest.raises(SlabLimitReached, match="shorten the interval") as caught:
        subject.take(9)
    assert (caught.value.needed_bytes, caught.value.limit_bytes) == (3 * SLAB, 2 * SLAB)
    assert subject.slab_count == 2
    subject.take(1)  # nothing was taken by the failure


def test_so_many_strikes_in_a_row_halve_the_pool() -> None:
    subject = pool(strikes=3)
    use(subject, 32)
    for strikes in (1, 2):
        use(subject, 1)
        assert (subject.strikes, subject.slab_count) == (strikes, 8)
    use(subject, 1)
    assert (subject.strikes, subject.slab_count, subject.halvings) == (0, 4, 1)


def test_a_checkpoint_that_needs_every_slab_clears_the_strikes() -> None:
    subject = pool(strikes=3)
    use(subject, 32)
    use(subject, 1)
    use(subject, 1)
    use(subject, 29)
    assert subject.strikes == 0
    use(subject, 1)
    use(subject, 1)
    assert subject.slab_count == 8


def test_the_head_slab_stays() -> None:
    subject = pool(strikes=1)
    use(subject, 32)
    for _ in range(20):
        use(subject, 0)
    assert subject.slab_count == 1


def test_halving_keeps_what_the_checkpoints_that_struck_needed() -> None:
    subject = pool(strikes=3)
    use(subject, 32)
    use(subject, 1)
    use(subject, 24)
    use(subject, 1)
    assert subject.slab_count == 6


def test_what_was_needed_before_the_strikes_does_not_keep_slabs() -> None:
    subject = pool(strikes=1)
    use(subject, 32)
    use(subject, 24)
    assert subject.slab_count == 6
    use(subject, 1)
    assert subject.slab_count == 3


def test_taking_twice_and_giving_back_nothing_are_programmers_errors() -> None:
    subject = pool()
    subject.take(1)
    with pytest.raises(AssertionError):
        subject.take(1)
    subject.give_back()
    with pytest.raises(AssertionError):
        subject.give_back()
