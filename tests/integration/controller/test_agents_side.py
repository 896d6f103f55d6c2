"""Heartbeats, the long poll and reports, over real HTTP and a real etcd."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.integration.controller.conftest import Controller, Scene, ok, problem

pytestmark = pytest.mark.etcd


def test_a_long_poll_wakes_when_an_order_changes(scene: Scene) -> None:
    one = scene.host("h1")
    one.run(scene.vm)
    where = f"/v1/agent/hosts/{one.name}/assignments"
    before = ok(scene.controller.get(where))
    assert before["assignments"] == []
    with ThreadPoolExecutor(1) as pool:
        polling = pool.submit(scene.controller.get, where, after=before["position"], wait_ms=10_000)
        scene.protect()
        answer = ok(polling.result())
    assert [order["vm"] for order in answer["assignments"]] == [scene.vm]
    assert answer["position"] > before["position"]


def test_a_long_poll_wakes_when_the_backup_moves_to_another_address(scene: Scene) -> None:
    one, two = scene.host("h1"), scene.host("h2")
    scene.become_protected(one)
    where = f"/v1/agent/hosts/{one.name}/assignments"
    before = ok(scene.controller.get(where))
    with ThreadPoolExecutor(1) as pool:
        polling = pool.submit(scene.controller.get, where, after=before["position"], wait_ms=10_000)
        two.facts["peer_address"] = "elsewhere:7001"
        two.beat()
        answer = ok(polling.result())
    assert answer["assignments"][0]["peer_address"] == "elsewhere:7001"
    assert answer["position"] > before["position"]


def test_a_long_poll_without_news_answers_with_the_full_set_all_the_same(scene: Scene) -> None:
    one = scene.host("h1")
    scene.host("h2")
    scene.become_protected(one)
    where = f"/v1/agent/hosts/{one.name}/assignments"
    before = ok(scene.controller.get(where))
    assert ok(scene.controller.get(where, after=before["position"], wait_ms=50)) == before
    assert len(before["assignments"]) == 1


def test_a_position_from_another_store_is_answered_at_once(scene: Scene) -> None:
    one = scene.host("h1")
    where = f"/v1/agent/hosts/{one.name}/assignments"
    assert ok(scene.controller.get(where, after=10**12, wait_ms=10_000))["assignments"] == []


def test_a_wait_that_is_too_long_is_refused(controller: Controller) -> None:
    where = "/v1/agent/hosts/h1/assignments"
    problem(controller.get(where, wait_ms=10_001), 422, "invalid-request")
    problem(controller.get(where, after=-1), 422, "invalid-request")


def test_of_a_holding_that_no_record_knows_nothing_is_said(scene: Scene) -> None:
    one = scene.host("h1")
    one.hold(scene.vm, 3, "primary")
    assert one.beat() == {}


def test_a_malformed_heartbeat_is_refused_with_every_fault(controller: Controller) -> None:
    where = "/v1/agent/hosts/h1/heartbeat"
    refused = problem(
        controller.post(where, {"facts": {"peer_address": "x"}, "mood": "good"}),
        422,
        "invalid-request",
    )
    assert "body.mood: there is no such field" in refused["faults"]
    assert len(refused["faults"]) > 3


def test_a_malformed_claim_is_refused(scene: Scene) -> None:
    one = scene.host("h1")
    problem(one.claim(scene.vm, 1, claim="short"), 422, "invalid-request")
    problem(one.claim(scene.vm, 1, "bad-mood"), 422, "invalid-request")
    problem(one.claim(scene.vm, -1), 422, "invalid-request")


def test_reports_for_a_vm_that_nobody_protects_are_refused(scene: Scene) -> None:
    one = scene.host("h1")
    problem(one.say("seeded", scene.vm, 1), 404, "not-protected")
    problem(one.say("released", scene.vm, 1), 404, "not-protected")
    problem(one.say("seeding-failed", scene.vm, 1, reason="x"), 404, "not-protected")


def test_only_the_primary_of_this_generation_says_that_seeding_is_done(scene: Scene) -> None:
    one, two = scene.host("h1"), scene.host("h2")
    one.run(scene.vm)
    scene.protect()
    generation = scene.wait_for_phase("seeding")["generation"]
    problem(two.say("seeded", scene.vm, generation), 403, "not-your-role")
    problem(one.say("seeded", scene.vm, generation - 1), 409, "stale-generation")
    for _ in range(2):
        answer = ok(one.say("seeded", scene.vm, generation))
        assert answer["record"]["phase"] == "protected"
    assert len(scene.controller.events(scene.vm, "Protected")) == 1
    late = one.say("seeding-failed", scene.vm, generation, reason="x")
    problem(late, 409, "wrong-phase")


def test_an_agent_has_an_event_remembered(scene: Scene) -> None:
    body = {
        "kind": "VmDestroyed",
        "host": "h1",
        "vm": scene.vm,
        "generation": 3,
        "message": "the loser is gone",
        "evidence": {"killed": True, "silence_ms": 250.5},
    }
    stored = ok(scene.controller.post("/v1/agent/events", body))
    (event,) = scene.controller.events(scene.vm)
    assert event == stored
    assert event["evidence"] == {"killed": True, "silence_ms": 250.5}
    problem(
        scene.controller.post("/v1/agent/events", body | {"kind": "Rained"}), 422, "invalid-request"
    )
