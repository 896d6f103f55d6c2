"""When seeding ends, and when the guest is slowed for it."""

import pytest

from holdfast_agent.core.rounds import Rounds


def test_a_round_that_leaves_little_is_the_last() -> None:
    assert Rounds(1_000_000).end(256)
    assert not Rounds(1_000_000).end(257)


def test_a_shrinking_round_is_followed_by_another_and_brakes_nothing() -> None:
    rounds = Rounds(100_000)
    assert not rounds.end(70_000)
    assert (rounds.number, rounds.brakes) == (2, 0)
    assert not rounds.end(49_000)
    assert (rounds.number, rounds.brakes) == (3, 0)


def test_each_round_that_does_not_shrink_brakes_the_guest_once_more() -> None:
    rounds = Rounds(100_000)
    shares = []
    for _ in range(3):
        assert not rounds.end(70_001 if rounds.number == 1 else 100_000)
        shares.append(rounds.running_pages)
    assert shares == [512, 170, 73]
    assert rounds.brakes == 3


def test_a_brake_stays_on_when_the_rounds_shrink_again() -> None:
    rounds = Rounds(100_000)
    rounds.end(100_000)
    rounds.end(10_000)
    assert rounds.brakes == 1


def test_a_guest_that_outruns_every_brake_ends_seeding() -> None:
    rounds = Rounds(100_000)
    assert [rounds.end(100_000) for _ in range(4)] == [False, False, False, True]
    assert rounds.number == 4


def test_there_are_never_more_than_thirty_rounds() -> None:
    left = 1_000_000_000
    rounds = Rounds(left)
    ended = False
    while not ended:
        left = left * 69 // 100
        ended = rounds.end(left)
    assert rounds.number == 30


def test_a_guest_without_brakes_has_no_share() -> None:
    with pytest.raises(AssertionError):
        _ = Rounds(1).running_pages
