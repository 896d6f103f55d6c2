"""Heartbeats, the long poll and reports, over real HTTP and a real etcd."""

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from tests.integration.controller.conftest import Agent, Controller, Etcd, Scene, ok, problem

from holdfast_controller.adapters.etcd import EtcdClient
from holdfast_controller.adapters.keys import ROOT, Kind
from holdfast_controller.http.app import openapi_document
from holdfast_controller.http.express import ASSIGNMENTS, CLAIMS, HEARTBEAT

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
    problem(controller.get(where, wait_ms=30_001), 422, "invalid-request")
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


def test_what_agents_ask_all_the_time_is_answered_the_same_with_and_without_the_framework(
    scene: Scene,
) -> None:
    one = scene.host("h1")
    scene.host("h2")
    generation = scene.become_protected(one)["generation"]
    beat = {"facts": one.facts, "vms": one.vms, "holdings": one.holdings, "position": one.position}
    claim = {
        "vm": scene.vm,
        "generation": generation,
        "host": one.name,
        "claim": "the-same-claim",
        "reason": "peer-silent",
    }
    polled = f"/v1/agent/hosts/{one.name}/assignments?after=0&wait_ms=5"
    asked: list[tuple[str, str, Any]] = [
        ("GET", polled, None),
        ("POST", f"/v1/agent/hosts/{one.name}/heartbeat", beat),
        ("POST", f"/v1/agent/hosts/{one.name}/heartbeat", beat | {"mood": "good"}),
        ("POST", f"/v1/agent/hosts/-{one.name}/heartbeat", beat),
        ("POST", "/v1/agent/claims", claim | {"vm": "nobody-knows-it"}),
        ("POST", "/v1/agent/claims", claim | {"reason": "no-reason"}),
        ("POST", "/v1/agent/claims", claim | {"generation": generation + 9}),
        ("POST", "/v1/agent/claims", claim),
    ]
    plain = {"content-type": "application/json"}
    other = {"content-type": "application/json; charset=utf-8"}
    with httpx.Client(base_url=scene.controller.http.base_url, trust_env=False) as client:
        for method, path, body in asked:
            whole = path if method == "POST" else f"{path}&more=1"
            swift = client.request(method, path, json=body, headers=plain)
            slow = client.request(method, whole, json=body, headers=other)
            assert swift.status_code == slow.status_code, path
            assert swift.headers["content-type"] == slow.headers["content-type"], path
            assert timeless(swift.json()) == timeless(slow.json()), path
        routes = client.get("/metrics").text
    for path in (CLAIMS, HEARTBEAT, ASSIGNMENTS):
        assert f'route="{path}",status="200"' in routes


def timeless(answer: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is different a moment later.

    A claim was won already and the planner went on; of all hosts that still count, one fell silent.
    """
    if "won" in answer:
        record = answer["record"]
        return {"won": answer["won"], "primary": record and record["primary"]}
    return answer | {"beat_seconds": "beat_seconds" in answer}


def test_the_swift_routes_are_routes_of_the_api(controller: Controller) -> None:
    paths = json.loads(openapi_document())["paths"]
    assert set(paths[CLAIMS]) == set(paths[HEARTBEAT]) == {"post"}
    assert set(paths[ASSIGNMENTS]) == {"get"}
    problem(controller.get(CLAIMS), 405, "method-not-allowed")


def test_a_host_is_told_how_often_to_beat_and_gets_a_lease_that_lasts(
    own_etcd: Etcd, make_controller: Callable[..., Controller]
) -> None:
    controller = make_controller(own_etcd, heartbeats_per_second_max=1)
    controller.start()
    one, told = Agent(controller, "one"), []
    for number in range(6):
        ok(Agent(controller, f"other{number}").try_beat())
        told.append(ok(one.try_beat())["beat_seconds"])
    assert told == sorted(told)
    assert 5 <= told[-1] <= 7
    lasts = own_etcd_ttls(own_etcd)
    assert max(lasts) >= 2 * told[-1], "its lease of two seconds was replaced"


def own_etcd_ttls(etcd: Etcd) -> list[int]:
    """Return what the leases of all heartbeats were made for, in seconds."""

    async def ask() -> list[int]:
        client = EtcdClient([etcd.endpoint])
        try:
            found, _ = await client.list(f"{ROOT}{Kind.HEARTBEATS}/")
            return [await client.lease_keep_alive(each.lease) for each in found]
        finally:
            await client.close()

    return asyncio.run(ask())
