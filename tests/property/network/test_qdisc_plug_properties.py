"""The kernel's plug under any course of epochs, failures and deaths, over a model of sch_plug."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.property.network.course import Course
from tests.property.network.plug_kernel import Packet, Queue

from holdfast_agent.core.failures import VirtualMachineFailed
from holdfast_agent.network.qdisc_netlink import PlugAction

COUNTS = st.tuples(st.integers(0, 4), st.integers(0, 4))


@dataclass(frozen=True)
class Failure:
    """A capture that comes to nothing: QEMU could not save, or the kernel refused."""

    obeys: int
    refuses: bool
    after: tuple[int, int]


@dataclass(frozen=True)
class Round:
    """One epoch until its acknowledgement."""

    before: tuple[int, int]
    failures: tuple[Failure, ...]
    unacknowledged: tuple[int, int]
    served: int
    refused_at: int
    loses: bool
    stalls: bool
    settles: bool


FAILURES = st.builds(Failure, st.sampled_from([-1, -1, 0, 1]), st.booleans(), COUNTS)
ROUNDS = st.builds(
    Round,
    before=COUNTS,
    failures=st.lists(FAILURES, max_size=2).map(tuple),
    unacknowledged=COUNTS,
    served=st.integers(0, 3),
    refused_at=st.sampled_from([-1, -1, -1, 0, 1, 2, 3]),
    loses=st.booleans(),
    stalls=st.booleans(),
    settles=st.booleans(),
)


def play(course: Course, turn: Round, *, is_kind: bool) -> None:
    """Let a round happen; a kind one has no refusal after the capture is whole."""
    course.send(turn.before)
    for failure in turn.failures:
        course.capture(saves=False, obeys=failure.obeys, refuses=failure.refuses)
        course.send(failure.after)
    assert course.capture()
    course.send(turn.unacknowledged)
    course.serve(turn.served)
    if is_kind:
        course.acknowledge(loses=turn.loses)
    else:
        course.acknowledge(obeys=turn.refused_at, loses=turn.loses, stalls=turn.stalls)
    course.send(turn.before)


@given(st.lists(ROUNDS, min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_an_epoch_leaves_whole_with_its_acknowledgement_and_nothing_of_a_later_one(
    rounds: list[Round],
) -> None:
    course = Course()
    course.send((2, 1))
    course.hold()
    for turn in rounds:
        play(course, turn, is_kind=True)
        if turn.settles:
            course.settle()
    course.settle()
    failures = sum(len(turn.failures) for turn in rounds)
    assert course.kernel.made_count <= 2 + 2 * failures, "a successor that was not needed"
    course.release_all()
    course.take_out()


@given(st.lists(ROUNDS, min_size=1, max_size=5), ROUNDS, COUNTS)
@settings(max_examples=150, deadline=None)
def test_what_could_not_be_released_leaves_with_the_next_epoch(
    rounds: list[Round], last: Round, counts: tuple[int, int]
) -> None:
    course = Course()
    course.hold()
    for turn in rounds:
        play(course, turn, is_kind=False)
    play(course, last, is_kind=True)
    course.settle()
    course.send(counts)
    course.release_all(loses=last.loses)
    course.take_out()


@given(
    st.lists(ROUNDS, max_size=3),
    COUNTS,
    st.sampled_from(["running", "closed", "reopened", "acknowledged"]),
    st.booleans(),
    st.lists(ROUNDS, min_size=1, max_size=3),
)
@settings(max_examples=150, deadline=None)
def test_an_heir_holds_what_it_finds_until_its_first_acknowledgement(
    rounds: list[Round],
    counts: tuple[int, int],
    stands: str,
    dies_twice: bool,
    after: list[Round],
) -> None:
    course = Course()
    course.hold()
    for turn in rounds:
        play(course, turn, is_kind=True)
    course.send(counts)
    if stands != "running":
        course.capture(saves=stands != "reopened")
        course.send(counts)
    if stands == "acknowledged":
        course.acknowledge()
    course.replace_holder()
    course.send(counts)
    course.inherit()
    if dies_twice:
        course.replace_holder()
        course.inherit()
    for turn in after:
        course.send(counts)
        play(course, turn, is_kind=True)
    course.settle()
    course.release_all()
    course.take_out()


@given(st.lists(ROUNDS, max_size=3), COUNTS, st.booleans(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_an_heir_that_lets_all_go_keeps_the_order_and_leaves_nothing_behind(
    rounds: list[Round], counts: tuple[int, int], loses: bool, holds_again: bool
) -> None:
    course = Course()
    course.hold()
    for turn in rounds:
        play(course, turn, is_kind=False)
    course.send(counts)
    course.replace_holder()
    course.send(counts)
    course.release_all(loses=loses)
    course.send(counts)
    course.settle()
    if holds_again:
        course.hold()
        course.send(counts)
        course.capture()
        course.send(counts)
        course.acknowledge()
        course.settle()
        course.release_all()
    course.take_out()
    course.replace_holder()


@given(st.lists(ROUNDS, max_size=2), COUNTS)
@settings(deadline=None)
def test_what_is_held_for_a_vm_that_is_gone_never_leaves(
    rounds: list[Round], counts: tuple[int, int]
) -> None:
    course = Course()
    course.hold()
    for turn in rounds:
        play(course, turn, is_kind=True)
    course.settle()
    course.send(counts)
    left = {tap: list(packets) for tap, packets in course.outside.items()}
    course.plug.discard()
    course.serve(100)
    assert course.outside == left
    assert course.kernel.is_bare()


@given(COUNTS, st.booleans())
@settings(deadline=None)
def test_a_holder_that_dies_before_it_holds_leaves_nothing_to_its_heir(
    counts: tuple[int, int], holds: bool
) -> None:
    course = Course()
    course.send(counts)
    course.replace_holder()
    course.send(counts)
    course.settle()
    if holds:
        course.hold()
        course.send(counts)
        course.release_all()
    course.take_out()


@given(ROUNDS, COUNTS)
@settings(deadline=None)
def test_removing_while_output_is_held_lets_nothing_go(
    turn: Round, counts: tuple[int, int]
) -> None:
    course = Course()
    course.hold()
    play(course, turn, is_kind=True)
    course.settle()
    left = {tap: list(packets) for tap, packets in course.outside.items()}
    course.plug.remove()
    course.send(counts)
    course.serve(100)
    assert course.outside == left
    heir = course.new_plug()
    heir.install()
    heir.remove()
    course.send(counts)
    assert course.outside == left
    course.replace_holder()
    course.inherit()
    course.capture()
    course.acknowledge()
    course.settle()


def test_an_heir_holds_although_its_forerunner_died_while_it_let_all_go() -> None:
    course = Course()
    course.hold()
    course.send((2, 2))
    course.acknowledged = 1
    course.kernel.refuses_links = True
    with pytest.raises(VirtualMachineFailed):
        course.plug.release_all()
    course.replace_holder()
    course.inherit()
    course.send((3, 3))
    course.serve(100)
    assert [len(packets) for packets in course.outside.values()] == [2, 0]


def test_the_model_forgets_an_epoch_whose_buffer_was_followed_by_another() -> None:
    """As the real qdisc was seen to do: 10 packets, BUFFER, 3, BUFFER, RELEASE_ONE lets 3 go."""
    queue = Queue(limit_bytes=1 << 20)
    for number in range(13):
        queue.enqueue(Packet("tap0", number, 1))
        if number in (9, 12):
            queue.change(PlugAction.BUFFER, 0, loses=False)
    queue.change(PlugAction.RELEASE_ONE, 0, loses=False)
    left = []
    while (packet := queue.dequeue()) is not None:
        left.append(packet.number)
    assert left == [0, 1, 2]
