"""What the API answers from a view; most of it is asked over HTTP in `tests/integration`."""

import pytest
from tests.unit.controller.worlds import heartbeat, host, record, view, vm_facts

from holdfast_api.words import Phase, Role
from holdfast_controller.core.view import Held, View
from holdfast_controller.http.answers import preflight_answer


def codes(seen: View) -> set[str]:
    preflight = preflight_answer(seen, "vm")
    assert preflight is not None
    return {issue.code for issue in preflight.issues}


@pytest.mark.parametrize("phase", [Phase.ENDED, Phase.RETIRED])
def test_a_copy_that_lost_to_another_host_can_not_be_protected(phase: Phase) -> None:
    old = Held("vm", 1, Role.PRIMARY)
    loser = host("h2", heartbeat(vm_facts(), held=(old,)))
    seen = view([host("h1", heartbeat()), loser], [record(phase)])
    assert "older-copy" in codes(seen)


@pytest.mark.parametrize("phase", [Phase.ENDED, Phase.RETIRED])
def test_what_the_records_own_primary_holds_is_no_older_copy(phase: Phase) -> None:
    mine = Held("vm", 3, Role.PRIMARY)
    primary = host("h1", heartbeat(vm_facts(), held=(mine,)))
    assert "older-copy" not in codes(view([primary, host("h2", heartbeat())], [record(phase)]))


def test_a_vm_that_was_started_anew_elsewhere_is_no_older_copy() -> None:
    fresh = host("h2", heartbeat(vm_facts()))
    seen = view([host("h1", heartbeat()), fresh], [record(Phase.RETIRED)])
    assert "older-copy" not in codes(seen)
