"""Pacing: when the next checkpoint is due, case by case."""

import pytest

from holdfast_agent.core.pacing import Pacing

MS = 1_000_000


def pacing(*, output_triggered: bool = True) -> Pacing:
    return Pacing(interval_ms=50, min_interval_ms=5, output_triggered=output_triggered)


def after_first(*, output_triggered: bool = True) -> Pacing:
    made = pacing(output_triggered=output_triggered)
    made.captured(1000 * MS)
    made.acknowledged(1001 * MS)
    return made


def test_the_first_checkpoint_is_due_at_once() -> None:
    assert pacing().due_at_ns() == 0


def test_none_is_due_while_one_is_unacknowledged() -> None:
    subject = pacing()
    subject.captured(1000 * MS)
    subject.output_waits(1001 * MS)
    assert subject.due_at_ns() is None


def test_without_output_the_next_is_due_after_the_interval() -> None:
    assert after_first().due_at_ns() == 1050 * MS


def test_waiting_output_makes_it_due_at_once() -> None:
    subject = after_first()
    subject.output_waits(1020 * MS)
    subject.output_waits(1030 * MS)
    assert subject.due_at_ns() == 1020 * MS


def test_waiting_output_does_not_bring_it_nearer_than_the_minimum() -> None:
    subject = after_first()
    subject.output_waits(1002 * MS)
    assert subject.due_at_ns() == 1005 * MS


def test_output_that_came_while_one_was_unacknowledged_is_not_forgotten() -> None:
    subject = pacing()
    subject.captured(1000 * MS)
    subject.output_waits(1001 * MS)
    subject.acknowledged(1008 * MS)
    assert subject.due_at_ns() == 1008 * MS


def test_a_capture_takes_the_output_along() -> None:
    subject = after_first()
    subject.output_waits(1020 * MS)
    subject.captured(1020 * MS)
    subject.acknowledged(1021 * MS)
    assert subject.due_at_ns() == 1070 * MS


def test_a_policy_without_output_trigger_keeps_its_interval() -> None:
    subject = after_first(output_triggered=False)
    subject.output_waits(1020 * MS)
    assert subject.due_at_ns() == 1050 * MS


def test_a_late_acknowledgement_makes_the_next_due_then() -> None:
    subject = pacing()
    subject.captured(1000 * MS)
    subject.acknowledged(1200 * MS)
    assert subject.due_at_ns() == 1200 * MS


def test_a_changed_policy_counts_at_once() -> None:
    subject = after_first()
    subject.change_policy(interval_ms=20, min_interval_ms=10, output_triggered=True)
    assert subject.due_at_ns() == 1020 * MS
    subject.output_waits(1001 * MS)
    assert subject.due_at_ns() == 1010 * MS


@pytest.mark.parametrize(("interval_ms", "min_interval_ms"), [(5, 6), (5, 0)])
def test_intervals_that_do_not_fit_are_a_programmers_error(
    interval_ms: int, min_interval_ms: int
) -> None:
    with pytest.raises(AssertionError):
        Pacing(interval_ms=interval_ms, min_interval_ms=min_interval_ms, output_triggered=True)


def test_events_out_of_order_are_a_programmers_error() -> None:
    subject = pacing()
    with pytest.raises(AssertionError):
        subject.acknowledged(0)
    subject.captured(0)
    with pytest.raises(AssertionError):
        subject.captured(1)


@pytest.mark.parametrize("output_triggered", [True, False])
def test_output_that_soon_does_not_fit_is_not_waited_for(*, output_triggered: bool) -> None:
    subject = after_first(output_triggered=output_triggered)
    subject.output_presses(1002 * MS)
    subject.output_presses(1003 * MS)
    assert subject.due_at_ns() == 1002 * MS
    subject.captured(1003 * MS)
    subject.output_presses(1004 * MS)
    assert subject.due_at_ns() is None
    subject.acknowledged(1005 * MS)
    assert subject.due_at_ns() == 1005 * MS
    subject.captured(1006 * MS)
    subject.acknowledged(1007 * MS)
    assert subject.due_at_ns() == 1056 * MS
