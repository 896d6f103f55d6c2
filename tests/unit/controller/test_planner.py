"""What the planner does next, and what it leaves alone."""

from typing import Any

import pytest
from tests.unit.controller.worlds import (
    LATER,
    MEBIBYTE,
    RECORD_REVISION,
    heartbeat,
    host,
    policy,
    reasons,
    record,
    standby,
    view,
    vm_facts,
)

from holdfast_api.records import PlacementNote, Policy, Rejection
from holdfast_api.words import EventKind, Phase
from holdfast_controller.core.planner import (
    ChangeProtection,
    NoteHost,
    Plan,
    effective_policy,
    plan,
    why_nobody,
)
from holdfast_controller.core.view import HostView, View


def changes(planned: Plan) -> list[ChangeProtection]:
    return [step for step in planned.steps if isinstance(step, ChangeProtection)]


def the_change(seen: View) -> ChangeProtection:
    (step,) = changes(plan(seen))
    assert step.expected_revision == RECORD_REVISION
    return step


def healthy(*vms: Any) -> list[HostView]:
    return [host("h1", heartbeat(*(vms or (vm_facts(),)))), host("h2", heartbeat())]


def test_an_unprotected_vm_gets_a_backup() -> None:
    step = the_change(view(healthy(), [record()]))
    assert (step.kind, step.host) == (EventKind.BACKUP_ASSIGNED, "h2")
    assert (step.successor.phase, step.successor.backup) == (Phase.SEEDING, "h2")
    assert step.successor.generation == 4
    assert reasons(step.successor.placement) == {"h1": "is the primary"}


def test_two_vms_planned_at_once_know_of_each_other() -> None:
    room = 256 * MEBIBYTE + 300 * MEBIBYTE
    hosts = [
        host("h1", heartbeat(vm_facts("a"), vm_facts("b"))),
        host("h2", heartbeat(memory_available_bytes=room)),
    ]
    first, second = changes(plan(view(hosts, [record(vm="a"), record(vm="b")])))
    assert first.successor.backup == "h2"
    assert second.kind is EventKind.NO_BACKUP_FOUND
    apart = [record(vm="a", policy=policy(anti_affinity=["b"])), record(vm="b")]
    three = [*healthy(vm_facts("a"), vm_facts("b")), host("h3", heartbeat())]
    # Both run on h1, so each keeps the other only from where its backup goes.
    chosen = [step.successor.backup for step in changes(plan(view(three, apart)))]
    assert chosen == ["h2", "h3"]


def test_a_search_without_result_is_noted_once() -> None:
    hosts = [host("h1", heartbeat(vm_facts()))]
    step = the_change(view(hosts, [record()]))
    assert step.kind is EventKind.NO_BACKUP_FOUND
    assert (step.successor.phase, step.successor.generation) == (Phase.UNPROTECTED, 3)
    assert step.message.endswith("h1 is the primary")
    assert plan(view(hosts, [step.successor])).steps == ()


def test_a_note_does_not_change_with_the_memory_that_is_free() -> None:
    def seen(free: int) -> list[HostView]:
        beat = heartbeat(memory_available_bytes=free)
        return [host("h1", heartbeat(vm_facts())), host("h2", beat)]

    step = the_change(view(seen(10 * MEBIBYTE), [record()]))
    assert plan(view(seen(20 * MEBIBYTE), [step.successor])).steps == ()


def test_no_backup_is_looked_for_when_none_is_wanted() -> None:
    assert plan(view(healthy(), [record(backup_wanted=False)])).steps == ()


def test_nothing_is_planned_while_the_primary_is_silent() -> None:
    hosts = [host("h1", None), host("h2", heartbeat()), host("h3", heartbeat())]
    assert plan(view(hosts, [record()])).steps == ()
    assert plan(view(hosts, [record(Phase.SEEDING)])).steps == ()


def test_nothing_is_planned_until_the_new_primary_reports_its_vm() -> None:
    holder = heartbeat(held=(standby(),))
    assert plan(view([host("h1", holder), host("h2", heartbeat())], [record()])).steps == ()


@pytest.mark.parametrize("phase", [Phase.UNPROTECTED, Phase.SEEDING])
def test_a_primary_that_lives_and_has_nothing_has_lost_the_vm(phase: Phase) -> None:
    hosts = [host("h1", heartbeat()), host("h2", heartbeat())]
    step = the_change(view(hosts, [record(phase)]))
    assert (step.kind, step.host) == (EventKind.VM_LOST, "h1")
    assert (step.successor.phase, step.successor.generation) == (Phase.ENDED, 4)


@pytest.mark.parametrize("phase", [Phase.UNPROTECTED, Phase.SEEDING])
def test_a_heartbeat_from_before_the_record_is_no_evidence_of_loss(phase: Phase) -> None:
    for revision in (RECORD_REVISION - 1, RECORD_REVISION):
        hosts = [host("h1", heartbeat(revision=revision)), host("h2", heartbeat())]
        assert plan(view(hosts, [record(phase)])).steps == ()


@pytest.mark.parametrize("phase", [Phase.UNPROTECTED, Phase.SEEDING])
def test_a_winner_that_has_not_yet_reported_its_vm_is_not_empty_handed(phase: Phase) -> None:
    hosts = [host("h1", heartbeat(held=(standby(generation=2),))), host("h2", heartbeat())]
    assert plan(view(hosts, [record(phase)])).steps == ()


def test_a_protected_vm_is_lost_only_when_both_its_hosts_live_and_have_nothing() -> None:
    empty, holding = heartbeat(), heartbeat(held=(standby(generation=2),))
    lost = the_change(view([host("h1", empty), host("h2", empty)], [record(Phase.PROTECTED)]))
    assert lost.kind is EventKind.VM_LOST
    assert lost.successor.phase is Phase.ENDED
    for h1, h2 in ((empty, holding), (empty, None), (holding, empty), (None, empty)):
        hosts = [host("h1", h1), host("h2", h2)]
        steps = plan(view(hosts, [record(Phase.PROTECTED)])).steps
        assert not [step for step in steps if getattr(step, "vm", None)]


def test_a_seeding_backup_that_is_silent_is_dropped() -> None:
    hosts = [host("h1", heartbeat(vm_facts())), host("h2", None)]
    step = the_change(view(hosts, [record(Phase.SEEDING)]))
    assert (step.kind, step.host) == (EventKind.BACKUP_DROPPED, "h2")
    assert (step.successor.phase, step.successor.generation) == (Phase.UNPROTECTED, 4)
    assert step.successor.setbacks == ()


def test_a_seeding_backup_that_answers_is_left_alone() -> None:
    assert plan(view(healthy(), [record(Phase.SEEDING)])).steps == ()


@pytest.mark.parametrize("first", [None, heartbeat(), heartbeat(vm_facts())])
@pytest.mark.parametrize("second", [None, heartbeat(held=(standby(generation=3),))])
def test_a_protected_vm_is_left_to_its_own_two_sides(first: Any, second: Any) -> None:
    hosts = [host("h1", first), host("h2", second), host("h3", heartbeat())]
    assert plan(view(hosts, [record(Phase.PROTECTED)])).steps == ()


@pytest.mark.parametrize("phase", [Phase.ENDED, Phase.RETIRED])
def test_what_is_over_is_left_alone(phase: Phase) -> None:
    hosts = [host("h1", heartbeat()), host("h2", heartbeat())]
    assert (
        plan(
            view(hosts, [record(phase, policy_name="default", policy=Policy(interval_ms=9))])
        ).steps
        == ()
    )


def test_a_release_by_a_host_that_has_nothing_left_is_completed() -> None:
    step = the_change(view([host("h1", heartbeat())], [record(Phase.RELEASING)]))
    assert (step.kind, step.successor.phase) == (EventKind.PROTECTION_RELEASED, Phase.RETIRED)
    for beat in (heartbeat(vm_facts()), heartbeat(revision=1), None):
        assert plan(view([host("h1", beat)], [record(Phase.RELEASING)])).steps == ()


@pytest.mark.parametrize("phase", [Phase.UNPROTECTED, Phase.SEEDING, Phase.PROTECTED])
def test_a_changed_policy_is_taken_over_by_those_that_name_it(phase: Phase) -> None:
    changed = Policy(interval_ms=33)
    old = record(phase, policy_name="fast")
    step = the_change(view(healthy(), [old], policies={"fast": changed}))
    assert step.kind is EventKind.PROTECTION_CHANGED
    assert step.successor == old.model_copy(update={"policy": changed})


def test_a_policy_that_is_gone_or_inline_changes_nothing() -> None:
    own = record(Phase.PROTECTED, policy=Policy(interval_ms=33))
    gone = record(Phase.PROTECTED, vm="other", policy_name="gone", policy=Policy(interval_ms=33))
    hosts = [host("h1", heartbeat(vm_facts(), vm_facts(vm="other"))), host("h2", None)]
    steps = plan(view(hosts, [own, gone])).steps
    assert not [step for step in steps if isinstance(step, ChangeProtection)]


def test_the_default_policy_is_there_without_being_stored_and_may_be_replaced() -> None:
    assert effective_policy(view([], []), "default") == Policy()
    assert effective_policy(view([], []), "other") is None
    changed = Policy(interval_ms=33)
    assert effective_policy(view([], [], policies={"default": changed}), "default") == changed
    named = record(Phase.PROTECTED, policy_name="default", policy=changed)
    assert the_change(view(healthy(), [named])).successor.policy == Policy()


def test_hosts_that_appear_fall_silent_and_return_are_noted_once() -> None:
    fresh = HostView("new", heartbeat=heartbeat())
    silent = host("silent", None, present=True, rack="a")
    back = host("back", heartbeat(), present=False)
    same = [host("here", heartbeat()), host("gone", None)]
    steps = plan(view([fresh, silent, back, *same], [])).steps
    found = {s.host: s for s in steps if isinstance(s, NoteHost)}
    assert {name: step.kind for name, step in found.items()} == {
        "new": EventKind.HOST_APPEARED,
        "silent": EventKind.HOST_WENT_SILENT,
        "back": EventKind.HOST_RETURNED,
    }
    assert {name: step.expected_revision for name, step in found.items()} == {
        "new": 0,
        "silent": 5,
        "back": 5,
    }
    assert found["silent"].settings.labels == {"rack": "a"}
    assert (found["silent"].present, found["back"].present) == (False, True)


def test_the_plan_says_from_which_revision_it_was_made() -> None:
    assert plan(view([], [])) == Plan(revision=LATER, steps=())


def test_a_long_list_of_reasons_is_cut_in_the_sentence() -> None:
    assert why_nobody(PlacementNote(chosen=None)) == "there is no other host"
    many = tuple(Rejection(host=f"h{n}", reason="is full") for n in range(10))
    sentence = why_nobody(PlacementNote(chosen=None, rejections=many))
    assert sentence.startswith("h0 is full; h1 is full")
    assert sentence.endswith("; and 2 more hosts")
