"""The quick check of a counter's history says what a search through all orders says."""

import math
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.chaos.history import Kind, Operation, contradictions

MOMENTS = st.integers(0, 12).map(float)


def can_be_explained(history: list[Operation]) -> bool:
    """Search: any order of the answered ones and of any of the others that fits all moments."""
    answered = [o for o in history if not o.is_pending]
    # A GET without an answer changes nothing and was told nothing: it can always be left out.
    pending = [o for o in history if o.is_pending and o.kind is Kind.INCREMENT]
    return any(
        fits(order)
        for chosen in range(2 ** len(pending))
        for order in permutations(
            answered + [o for number, o in enumerate(pending) if chosen >> number & 1]
        )
    )


def fits(order: tuple[Operation, ...]) -> bool:
    count, latest_sent = 0, -math.inf
    for operation in order:
        count += operation.kind is Kind.INCREMENT
        if operation.value not in (None, count):
            return False
        latest_sent = max(latest_sent, operation.sent)
        if operation.answered < latest_sent:
            return False
    return True


@st.composite
def histories(draw: st.DrawFn) -> list[Operation]:
    """Histories of a real counter, mostly; then one or two answers or moments are changed."""
    count, moment = 0, 0.0
    operations = []
    for client in range(draw(st.integers(0, 5))):
        kind = draw(st.sampled_from(Kind))
        happens = draw(st.booleans()) or draw(st.booleans())
        moment += draw(st.sampled_from([0.0, 1.0, 2.0]))
        sent = moment - draw(st.sampled_from([0.0, 1.0, 3.0]))
        answered = moment + draw(st.sampled_from([0.0, 1.0, 3.0]))
        if happens:
            count += kind is Kind.INCREMENT
        if happens and draw(st.integers(0, 3)):
            operations.append(Operation(client, kind, sent, answered, count))
        else:
            operations.append(Operation(client, kind, sent))
    for _ in range(draw(st.integers(0, 2))):
        if operations:
            number = draw(st.integers(0, len(operations) - 1))
            old = operations[number]
            value = None if old.value is None else old.value + draw(st.integers(-1, 1))
            sent = old.sent + draw(st.sampled_from([-2.0, 0.0, 2.0]))
            answered = max(sent, old.answered + draw(st.sampled_from([-2.0, 0.0, 2.0])))
            operations[number] = Operation(old.client, old.kind, sent, answered, value)
    return draw(st.permutations(operations))


@settings(max_examples=2000, deadline=None)
@given(histories())
def test_the_sort_finds_a_contradiction_exactly_when_the_search_finds_no_order(
    history: list[Operation],
) -> None:
    assert (contradictions(history) == []) == can_be_explained(history), contradictions(history)


def incremented(client: int, sent: float, answered: float, value: int) -> Operation:
    return Operation(client, Kind.INCREMENT, sent, answered, value)


def read(client: int, sent: float, answered: float, value: int) -> Operation:
    return Operation(client, Kind.READ, sent, answered, value)


CRIMES = {
    "told 2": [incremented(1, 0, 1, 1), incremented(1, 2, 3, 2), incremented(2, 2, 3, 2)],
    "counted for nobody": [incremented(1, 0, 1, 1), incremented(1, 2, 3, 3)],
    "though it was sent after": [incremented(1, 0, 1, 2), incremented(2, 2, 3, 1)],
    "GET at": [incremented(1, 0, 1, 1), read(2, 2, 3, 0)],
    "left was sent at": [
        incremented(1, 0, 1, 1),
        incremented(1, 2, 3, 3),
        Operation(2, Kind.INCREMENT, 4),
    ],
    "nothing counts to that": [incremented(1, 0, 1, 0)],
}


@pytest.mark.parametrize("words", CRIMES)
def test_a_lost_repeated_or_forgotten_answer_is_told_in_words(words: str) -> None:
    assert any(words in told for told in contradictions(CRIMES[words]))


def test_an_operation_without_an_answer_may_have_counted_or_not() -> None:
    lost = Operation(2, Kind.INCREMENT, 0.5)
    assert contradictions([incremented(1, 0, 1, 1), lost, incremented(1, 2, 3, 3)]) == []
    assert contradictions([incremented(1, 0, 1, 1), lost, incremented(1, 2, 3, 2)]) == []
    assert contradictions([]) == []


def test_the_answer_that_came_first_counts_not_the_nearest() -> None:
    first, late, between = incremented(1, 2, 6, 1), incremented(3, 0, 1, 3), incremented(2, 0, 5, 2)
    assert contradictions([first, between, late]) != []
    assert contradictions([first, between, incremented(3, 0, 3, 3)]) == []


def test_each_value_that_nobody_was_told_has_a_deadline_of_its_own() -> None:
    early, late = Operation(3, Kind.INCREMENT, 0), Operation(4, Kind.INCREMENT, 3)
    told = [incremented(1, 0, 1, 2), incremented(2, 0, 5, 4)]
    assert contradictions([*told, early, late]) == []
    assert contradictions([*told, late, late]) != []
