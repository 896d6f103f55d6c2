"""The life of a protection over real HTTP and a real etcd; the agents are played by the test."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tests.integration.controller.conftest import Scene, eventually, ok, problem

pytestmark = pytest.mark.etcd


def test_a_vm_is_protected_fails_over_and_gets_a_third_host(scene: Any) -> None:
    one, two, three = scene.host("h1"), scene.host("h2"), scene.host("h3")
    one.run(scene.vm)
    assert scene.protect()["phase"] in ("unprotected", "seeding")
    seeding = scene.wait_for_phase("seeding")
    assert (seeding["backup"], seeding["generation"]) == (two.name, 2)
    orders = one.beat()[scene.vm]
    assert (orders["role"], orders["peer"]) == ("primary", two.name)
    assert orders["peer_address"] == f"{two.name}:7001"
    assert two.beat()[scene.vm]["role"] == "backup"

    two.hold(scene.vm, 2, "backup")
    ok(one.say("seeded", scene.vm, 2))
    assert scene.wait_for_phase("protected")["reason"] is None

    del scene.agents["h1"]  # it is dead from here on
    verdict = ok(two.claim(scene.vm, 2))
    assert verdict["won"] is True
    assert verdict["record"]["primary"] == two.name
    two.run(scene.vm)
    again = scene.wait_for_phase("seeding")
    assert (again["primary"], again["backup"], again["generation"]) == (two.name, three.name, 4)
    assert again["unprotected_seconds"] >= 0
    (failed_over,) = scene.controller.events(scene.vm, "FailedOver")
    assert failed_over["evidence"]["from_primary"] == one.name
    assert failed_over["generation"] == 3


def test_of_two_claims_at_once_exactly_one_wins(scene: Scene) -> None:
    one, two = scene.host("h1"), scene.host("h2")
    generation = scene.become_protected(one)["generation"]
    with ThreadPoolExecutor(2) as pool:
        claims = [
            pool.submit(one.claim, scene.vm, generation, "stream-broken", "claim-of-one"),
            pool.submit(two.claim, scene.vm, generation, "peer-silent", "claim-of-two"),
        ]
        verdicts = [ok(claim.result()) for claim in claims]
    assert sorted(verdict["won"] for verdict in verdicts) == [False, True]
    winner = one.name if verdicts[0]["won"] else two.name
    assert {verdict["record"]["primary"] for verdict in verdicts} == {winner}
    (lost,) = scene.controller.events(scene.vm, "ClaimLost")
    assert lost["host"] != winner


def test_a_won_claim_asked_again_is_told_that_it_won_also_when_the_planner_moved_on(
    scene: Scene,
) -> None:
    one, two = scene.host("h1"), scene.host("h2")
    scene.host("h3")
    generation = scene.become_protected(one)["generation"]
    assert ok(two.claim(scene.vm, generation))["won"] is True
    assert ok(two.claim(scene.vm, generation))["record"]["generation"] == generation + 1
    two.run(scene.vm)
    scene.wait_for_phase("seeding")
    late = ok(two.claim(scene.vm, generation))
    assert late["won"] is True
    assert late["record"]["generation"] == generation + 2
    assert ok(one.claim(scene.vm, generation, claim="claim-of-one"))["won"] is False
    assert len(scene.controller.events(scene.vm, "FailedOver")) == 1


def test_a_lost_claim_is_told_of_once_however_often_it_is_retried(scene: Scene) -> None:
    one, two = scene.host("h1"), scene.host("h2")
    generation = scene.become_protected(one)["generation"]
    ok(two.claim(scene.vm, generation))
    for _ in range(3):
        lost = ok(one.claim(scene.vm, generation, "stream-broken", "claim-of-one"))
        assert lost["won"] is False
        assert lost["record"]["primary"] == two.name
    assert len(scene.controller.events(scene.vm, "ClaimLost")) == 1


def test_the_loser_is_told_to_let_go_and_the_winner_that_it_is_primary(scene: Scene) -> None:
    one, two = scene.host("h1"), scene.host("h2")
    generation = scene.become_protected(one)["generation"]
    ok(two.claim(scene.vm, generation))
    order = one.beat()[scene.vm]
    assert (order["role"], order["generation"]) == ("none", generation + 1)
    assert two.beat()[scene.vm]["role"] == "primary"
    one.holdings, one.vms = [], []
    assert scene.vm not in one.beat()
    two.run(scene.vm)
    assert scene.wait_for_phase("seeding")["backup"] == one.name


def test_a_backup_that_is_not_filled_gets_no_verdict_and_changes_nothing(scene: Scene) -> None:
    one, two = scene.host("h1"), scene.host("h2")
    one.run(scene.vm)
    scene.protect()
    seeding = scene.wait_for_phase("seeding")
    problem(two.claim(scene.vm, seeding["generation"]), 409, "wrong-phase")
    problem(one.claim(scene.vm, seeding["generation"], "handover"), 403, "not-your-role")
    problem(one.claim(scene.vm, seeding["generation"] + 5), 409, "stale-generation")
    assert scene.controller.protection(scene.vm)["generation"] == seeding["generation"]
    assert scene.controller.events(scene.vm, "ClaimLost") == []


def test_a_claim_for_a_vm_that_nobody_protects_is_lost(scene: Scene) -> None:
    verdict = ok(scene.host("h1").claim(scene.vm, 1))
    assert (verdict["won"], verdict["record"]) == (False, None)


def test_without_a_host_the_reasons_are_shown_and_seeding_begins_when_one_appears(
    scene: Scene,
) -> None:
    one = scene.host("h1")
    one.run(scene.vm)
    scene.protect()

    def reason() -> Any:
        scene.beat_all()
        found = scene.controller.protection(scene.vm)
        return found if "no host can back it up" in (found["reason"] or "") else None

    found = eventually("the reasons are shown", reason)
    rejections = {r["host"]: r["reason"] for r in found["placement"]["rejections"]}
    assert rejections[one.name] == "is the primary"
    assert len(scene.controller.events(scene.vm, "NoBackupFound")) >= 1
    assert found["unprotected_seconds"] > 0
    two = scene.host("h2")
    assert scene.wait_for_phase("seeding")["backup"] == two.name


def test_a_host_that_could_not_be_filled_is_passed_over_for_another(scene: Scene) -> None:
    one, two, three = scene.host("h1"), scene.host("h2"), scene.host("h3")
    one.run(scene.vm)
    scene.protect()
    first = scene.wait_for_phase("seeding")
    assert first["backup"] == two.name
    answer = ok(one.say("seeding-failed", scene.vm, first["generation"], reason="disk full"))
    assert answer["record"]["phase"] == "unprotected"
    stale = one.say("seeding-failed", scene.vm, first["generation"], reason="disk full")
    problem(stale, 409, "stale-generation")
    second = scene.wait_for_phase("seeding")
    assert second["backup"] == three.name
    rejections = {r["host"]: r["reason"] for r in second["placement"]["rejections"]}
    assert rejections[two.name] == "could not be filled (disk full); it is tried again later"


def test_a_backup_that_falls_silent_while_it_is_filled_is_dropped(scene: Scene) -> None:
    one, two, three = scene.host("h1"), scene.host("h2"), scene.host("h3")
    one.run(scene.vm)
    scene.protect()
    assert scene.wait_for_phase("seeding")["backup"] == two.name
    del scene.agents["h2"]

    def moved() -> bool:
        scene.beat_all()
        return bool(scene.controller.protection(scene.vm)["backup"] == three.name)

    eventually("the third host is chosen", moved)
    (dropped,) = scene.controller.events(scene.vm, "BackupDropped")
    assert dropped["host"] == two.name


def test_a_vm_whose_primary_comes_back_empty_handed_is_lost(scene: Scene) -> None:
    one = scene.host("h1")
    one.run(scene.vm)
    scene.protect()
    one.vms = []
    ended = scene.wait_for_phase("ended")
    assert "lost" in ended["reason"]
    assert len(scene.controller.events(scene.vm, "VmLost")) == 1


def test_under_manual_reprotection_only_the_operator_brings_a_second_backup(scene: Scene) -> None:
    one, two = scene.host("h1"), scene.host("h2")
    scene.host("h3")
    one.run(scene.vm)
    scene.protect(reprotect="manual")
    generation = scene.wait_for_phase("seeding")["generation"]
    ok(one.say("seeded", scene.vm, generation))
    ok(one.claim(scene.vm, generation, "stream-broken"))
    for _ in range(3):
        scene.beat_all()
    waiting = scene.controller.protection(scene.vm)
    assert waiting["phase"] == "unprotected"
    assert "protect it again" in waiting["reason"]
    scene.protect(reprotect="manual")
    assert scene.wait_for_phase("seeding")["backup"] == two.name


def test_a_guest_that_ended_stays_ended_until_it_is_unprotected(scene: Scene) -> None:
    one, two = scene.host("h1"), scene.host("h2")
    generation = scene.become_protected(one)["generation"]
    problem(two.claim(scene.vm, generation, "guest-ended"), 403, "not-your-role")
    assert ok(one.claim(scene.vm, generation, "guest-ended"))["won"] is True
    assert scene.controller.protection(scene.vm)["reason"] == "the guest ended"
    assert two.beat()[scene.vm]["role"] == "none"
    order = one.beat()[scene.vm]
    assert (order["role"], order["phase"]) == ("primary", "ended")
    assert len(scene.controller.events(scene.vm, "GuestEnded")) == 1
    assert ok(scene.controller.delete(path(scene)))["phase"] == "retired"
    problem(scene.controller.get(path(scene)), 404, "not-protected")


def test_unprotecting_keeps_the_vm_and_its_generations(scene: Scene) -> None:
    one, two = scene.host("h1"), scene.host("h2")
    generation = scene.become_protected(one)["generation"]
    for _ in range(2):
        assert ok(scene.controller.delete(path(scene)))["phase"] == "releasing"
    problem(scene.controller.put(path(scene)), 409, "wrong-phase")
    problem(one.claim(scene.vm, generation + 1), 409, "wrong-phase")
    order = one.beat()[scene.vm]
    assert (order["role"], order["phase"], order["peer"]) == ("primary", "releasing", None)
    assert two.beat()[scene.vm]["role"] == "none"
    problem(two.say("released", scene.vm, generation + 1), 403, "not-your-role")
    for _ in range(2):
        ok(one.say("released", scene.vm, generation + 1))
    assert one.beat()[scene.vm]["phase"] == "retired"
    problem(scene.controller.delete(path(scene)), 404, "not-protected")
    assert len(scene.controller.events(scene.vm, "ProtectionReleased")) == 1
    one.holdings = []
    assert scene.vm not in one.beat()
    assert scene.protect()["generation"] == generation + 2


def test_a_switchover_is_ordered_and_its_claim_is_no_failover(scene: Scene) -> None:
    one, two = scene.host("h1"), scene.host("h2")
    where = f"/v1/vms/{scene.vm}/switchover"
    one.run(scene.vm)
    problem(scene.controller.post(where), 404, "not-protected")
    scene.protect()
    generation = scene.wait_for_phase("seeding")["generation"]
    problem(scene.controller.post(where), 409, "wrong-phase")
    ok(one.say("seeded", scene.vm, generation))
    problem(scene.controller.post(where, {"to": one.name}), 409, "not-the-backup")
    ok(scene.controller.patch(f"/v1/hosts/{two.name}", {"maintenance": True}))
    problem(scene.controller.post(where), 409, "host-in-maintenance")
    ok(scene.controller.patch(f"/v1/hosts/{two.name}", {"maintenance": False}))
    for _ in range(2):
        assert ok(scene.controller.post(where, {"to": two.name}))["handover"] is True
    assert one.beat()[scene.vm]["handover"] is True
    record = ok(two.claim(scene.vm, generation, "handover"))["record"]
    assert (record["primary"], record["handover"]) == (two.name, False)
    assert scene.controller.events(scene.vm, "FailedOver") == []
    assert len(scene.controller.events(scene.vm, "ClaimWon")) == 1


def test_a_silent_target_is_no_switchover(scene: Scene) -> None:
    one, two = scene.host("h1"), scene.host("h2")
    scene.become_protected(one)
    del scene.agents["h2"]

    def refused() -> bool:
        scene.beat_all()
        hosts = ok(scene.controller.get("/v1/hosts"))["hosts"]
        return not next(h for h in hosts if h["host"] == two.name)["alive"]

    eventually("the backup is silent", refused)
    problem(scene.controller.post(f"/v1/vms/{scene.vm}/switchover"), 409, "host-not-alive")


def test_figures_of_the_current_generation_are_merged_and_older_ones_are_not(
    scene: Scene,
) -> None:
    one = scene.host("h1")
    scene.host("h2")
    generation = scene.become_protected(one)["generation"]
    report = {
        "vm": scene.vm,
        "generation": generation,
        "role": "primary",
        "phase": "protecting",
        "epoch": 8,
        "acknowledged_epoch": 7,
        "pause_ms": {"p50": 1.5, "p99": 3.0, "max": 4.0},
        "held_bytes": 100,
    }
    one.workers = [report]
    one.beat()
    found = scene.controller.protection(scene.vm)
    assert (found["acknowledged_epoch"], found["held_bytes"]) == (7, 100)
    assert found["pause_ms"]["p50"] == 1.5
    one.workers = [report | {"generation": generation - 1}]
    one.beat()
    found = scene.controller.protection(scene.vm)
    assert (found["acknowledged_epoch"], found["held_bytes"]) == (0, 0)
    assert found["primary_report"]["epoch"] == 8


def path(scene: Scene) -> str:
    return f"/v1/vms/{scene.vm}/protection"
