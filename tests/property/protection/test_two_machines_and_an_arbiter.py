"""Both cores of a protection, the arbiter's table and a bad network: everything, in any order."""

from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from tests.property.protection.world import Protection


def test_whatever_happens_at_most_one_side_goes_on_and_knows_all_that_left() -> None:
    run_state_machine_as_test(
        Protection, settings=settings(max_examples=1500, stateful_step_count=40, deadline=None)
    )
