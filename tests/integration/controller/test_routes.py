"""Every route with good and with bad input, over real HTTP and a real etcd."""

import socket
from typing import Any

import pytest
from tests.integration.controller.conftest import (
    Controller,
    Scene,
    eventually,
    ok,
    problem,
)

pytestmark = pytest.mark.etcd


# --- hosts ----------------------------------------------------------------------------------------


def test_hosts_are_listed_with_their_facts_and_their_vms(scene: Scene) -> None:
    one, two = scene.host("h1"), scene.host("h2")
    scene.become_protected(one)
    hosts = {host["host"]: host for host in ok(scene.controller.get("/v1/hosts"))["hosts"]}
    assert hosts[one.name]["alive"] is True
    assert hosts[one.name]["facts"]["qemu_version"] == "7.2.22"
    assert hosts[one.name]["primaries"] == [scene.vm]
    assert hosts[two.name]["backups"] == [scene.vm]
    assert ok(scene.controller.get(f"/v1/hosts/{one.name}")) == hosts[one.name]


def test_labels_are_set_and_removed_and_maintenance_stays(scene: Scene) -> None:
    one = scene.host("h1")
    where = f"/v1/hosts/{one.name}"
    ok(scene.controller.patch(where, {"labels": {"rack": "r1", "row": "4"}, "maintenance": True}))
    changed = ok(scene.controller.patch(where, {"labels": {"rack": None}}))["settings"]
    assert changed == {"labels": {"scene": str(scene.number), "row": "4"}, "maintenance": True}
    assert ok(scene.controller.get(where))["settings"] == changed


def test_more_labels_than_a_host_may_have_are_refused(scene: Scene) -> None:
    one = scene.host("h1")
    labels = {f"label{number}": "x" for number in range(70)}
    problem(
        scene.controller.patch(f"/v1/hosts/{one.name}", {"labels": labels}), 422, "invalid-request"
    )


def test_an_unknown_host_and_a_malformed_name_are_refused(controller: Controller) -> None:
    problem(controller.get("/v1/hosts/nobody"), 404, "unknown-host")
    problem(controller.patch("/v1/hosts/nobody", {"maintenance": True}), 404, "unknown-host")
    problem(controller.get("/v1/hosts/No%20Body"), 422, "invalid-request")


def test_hosts_that_appear_fall_silent_and_return_are_told_of(scene: Scene) -> None:
    one = scene.host("h1")

    def kinds() -> list[str]:
        events = ok(scene.controller.get("/v1/events"))["events"]
        return [e["kind"] for e in events if e["host"] == one.name and e["kind"] != "HostChanged"]

    eventually("it appeared", lambda: kinds() == ["HostAppeared"])
    eventually("it fell silent", lambda: kinds() == ["HostAppeared", "HostWentSilent"])
    host = ok(scene.controller.get(f"/v1/hosts/{one.name}"))
    assert (host["alive"], host["facts"]) == (False, None)
    one.beat()
    eventually("it returned", lambda: kinds()[2:] == ["HostReturned"])


# --- VMs ------------------------------------------------------------------------------------------


def test_vms_are_listed_wherever_they_run(scene: Scene) -> None:
    one = scene.host("h1")
    one.run(scene.vm)
    found = ok(scene.controller.get(f"/v1/vms/{scene.vm}"))
    assert (found["host"], found["protection"]) == (one.name, None)
    assert found["facts"]["memory_bytes"] == 256 * 1024**2
    assert found in ok(scene.controller.get("/v1/vms"))["vms"]
    scene.protect()
    assert ok(scene.controller.get(f"/v1/vms/{scene.vm}"))["protection"]["vm"] == scene.vm


def test_an_unknown_vm_is_unknown_to_every_route(controller: Controller) -> None:
    problem(controller.get("/v1/vms/nothing"), 404, "unknown-vm")
    problem(controller.get("/v1/vms/nothing/preflight"), 404, "unknown-vm")
    problem(controller.get("/v1/vms/nothing/protection"), 404, "unknown-vm")
    problem(controller.put("/v1/vms/nothing/protection"), 404, "unknown-vm")
    problem(controller.patch("/v1/vms/nothing/protection", {}), 404, "unknown-vm")
    problem(controller.delete("/v1/vms/nothing/protection"), 404, "unknown-vm")
    problem(controller.post("/v1/vms/nothing/switchover"), 404, "unknown-vm")


def test_a_known_vm_without_protection_is_not_protected(scene: Scene) -> None:
    scene.host("h1").run(scene.vm)
    where = f"/v1/vms/{scene.vm}/protection"
    problem(scene.controller.get(where), 404, "not-protected")
    problem(scene.controller.patch(where, {}), 404, "not-protected")
    problem(scene.controller.delete(where), 404, "not-protected")


def test_preflight_names_every_issue_and_a_blocking_one_refuses_protection(scene: Scene) -> None:
    one, two = scene.host("h1"), scene.host("h2")
    issue = {"code": "passed-through-device", "severity": "blocking", "message": "has a GPU"}
    one.run(scene.vm, issues=[issue], running=False)
    two.run(scene.vm)
    two.vms = []
    two.beat()
    preflight = ok(scene.controller.get(f"/v1/vms/{scene.vm}/preflight"))
    assert preflight["protectable"] is False
    assert [i["code"] for i in preflight["issues"]] == ["passed-through-device", "not-running"]
    refused = problem(
        scene.controller.put(f"/v1/vms/{scene.vm}/protection"), 409, "preflight-failed"
    )
    assert refused["faults"][0] == "passed-through-device: has a GPU"
    assert len(refused["faults"]) == 2
    problem(scene.controller.get(f"/v1/vms/{scene.vm}/protection"), 404, "not-protected")


def test_a_vm_that_two_hosts_report_is_not_protectable(scene: Scene) -> None:
    one, two = scene.host("h1"), scene.host("h2")
    one.run(scene.vm)
    two.run(scene.vm)
    preflight = ok(scene.controller.get(f"/v1/vms/{scene.vm}/preflight"))
    assert "on-several-hosts" in [i["code"] for i in preflight["issues"]]
    problem(scene.controller.put(f"/v1/vms/{scene.vm}/protection"), 409, "preflight-failed")


# --- protections ----------------------------------------------------------------------------------


def test_protecting_twice_changes_nothing_and_another_policy_changes_it(scene: Scene) -> None:
    scene.host("h1").run(scene.vm)
    where = f"/v1/vms/{scene.vm}/protection"
    policy = scene.inline_policy(interval_ms=40)
    first = scene.controller.put(where, {"policy": policy})
    assert first.status_code == 202
    second = ok(scene.controller.put(where, {"policy": policy}))
    assert second["generation"] == ok(first)["generation"] == 1
    third = ok(scene.controller.put(where, {"policy": policy | {"interval_ms": 80}}))
    assert (third["generation"], third["policy"]["interval_ms"]) == (1, 80)
    assert third["policy_name"] is None
    assert len(scene.controller.events(scene.vm, "ProtectionRequested")) == 1
    assert len(scene.controller.events(scene.vm, "ProtectionChanged")) == 1


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ({"policy": {"interval_msec": 5}}, "body.policy.interval_msec: there is no such field"),
        ({"policy_name": "a", "policy": {}}, None),
        ({"policy": {"min_interval_ms": 500}}, "body.policy"),
        ({"policy": {"output": "leak"}}, "body.policy.output"),
        ([], "body"),
    ],
)
def test_a_malformed_protect_request_is_refused(
    controller: Controller, body: Any, fault: str | None
) -> None:
    refused = problem(controller.put("/v1/vms/any/protection", body), 422, "invalid-request")
    assert fault is None or any(found.startswith(fault) for found in refused["faults"])


def test_all_faults_of_a_request_are_named_at_once(controller: Controller) -> None:
    body = {"interval_ms": 1, "keepalive_ms": 1, "transport": "pigeon"}
    refused = problem(controller.put("/v1/policies/bad", body), 422, "invalid-request")
    assert len(refused["faults"]) == 3


def test_a_patch_changes_the_policy_while_running_and_makes_it_the_vms_own(scene: Scene) -> None:
    scene.host("h1").run(scene.vm)
    where = f"/v1/vms/{scene.vm}/protection"
    assert ok(scene.controller.put(where))["policy_name"] == "default"
    assert ok(scene.controller.patch(where, {"interval_ms": 50}))["policy_name"] == "default"
    patched = ok(scene.controller.patch(where, {"interval_ms": 70, "reprotect": "manual"}))
    assert (patched["policy"]["interval_ms"], patched["policy_name"]) == (70, None)
    problem(scene.controller.patch(where, {"min_interval_ms": 71}), 422, "invalid-request")
    problem(scene.controller.patch(where, {"keepalive_ms": 20}), 422, "invalid-request")
    assert ok(scene.controller.delete(where))["phase"] == "releasing"
    problem(scene.controller.patch(where, {"interval_ms": 90}), 409, "wrong-phase")


# --- policies -------------------------------------------------------------------------------------


def test_the_default_policy_is_always_there(controller: Controller) -> None:
    policies = {p["name"]: p["policy"] for p in ok(controller.get("/v1/policies"))["policies"]}
    assert policies["default"]["interval_ms"] == 50
    assert ok(controller.get("/v1/policies/default"))["policy"] == policies["default"]
    assert controller.delete("/v1/policies/default").status_code == 204


def test_a_policy_is_stored_followed_and_removed_when_unused(scene: Scene) -> None:
    where = f"/v1/policies/{scene.policy}"
    scene.host("h1").run(scene.vm)
    request = {"policy_name": scene.policy}
    problem(scene.controller.get(where), 404, "unknown-policy")
    unknown = scene.controller.put(f"/v1/vms/{scene.vm}/protection", request)
    problem(unknown, 404, "unknown-policy")
    stored = ok(scene.controller.put(where, scene.inline_policy(interval_ms=30)))
    assert ok(scene.controller.get(where)) == stored
    ok(scene.controller.put(f"/v1/vms/{scene.vm}/protection", request))
    refused = problem(scene.controller.delete(where), 409, "policy-in-use")
    assert refused["faults"] == [scene.vm]
    ok(scene.controller.put(where, scene.inline_policy(interval_ms=35)))

    def followed() -> bool:
        found = scene.controller.protection(scene.vm)
        return bool(found["policy"]["interval_ms"] == 35 and found["policy_name"] == scene.policy)

    eventually("the protection follows its policy", followed)
    ok(scene.controller.delete(f"/v1/vms/{scene.vm}/protection"))
    assert scene.controller.delete(where).status_code == 204
    problem(scene.controller.delete(where), 404, "unknown-policy")


# --- everything -----------------------------------------------------------------------------------


def test_unknown_paths_and_methods_are_problems_too(controller: Controller) -> None:
    problem(controller.get("/v2/hosts"), 404, "unknown-path")
    problem(controller.get("/v1/hosts/"), 404, "unknown-path")
    refused = controller.post("/v1/hosts", {})
    problem(refused, 405, "method-not-allowed")
    assert refused.headers["allow"] == "GET"


def test_a_body_that_is_no_json_is_refused(controller: Controller) -> None:
    refused = controller.http.put(
        "/v1/policies/bad", content=b"{", headers={"content-type": "application/json"}
    )
    problem(refused, 422, "invalid-request")


def test_a_body_that_is_too_large_is_refused(controller: Controller) -> None:
    body = b" " * (1024 * 1024 + 1)
    problem(controller.http.put("/v1/policies/bad", content=body), 413, "too-large")


def test_a_client_that_hangs_up_in_its_body_does_no_harm(controller: Controller) -> None:
    base = controller.http.base_url
    with socket.create_connection((base.host, base.port or 0), timeout=10) as half:
        half.sendall(b"PUT /v1/policies/half HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    problem(controller.get("/v1/policies/half"), 404, "unknown-policy")
    assert "Traceback" not in controller.text()


def test_health_readiness_and_metrics_answer(scene: Scene) -> None:
    controller, one = scene.controller, scene.host("h1")
    scene.host("h2")
    scene.become_protected(one)
    assert ok(controller.get("/healthz")) == {"status": "ok"}
    assert ok(controller.get("/readyz")) == {"status": "ready"}
    text = controller.get("/metrics").text
    assert "holdfast_store_reachable 1.0" in text
    assert 'holdfast_protections{phase="protected"}' in text
    assert 'route="/v1/vms/{vm}/protection"' in text
    assert "holdfast_hosts_alive" in text
    assert 'holdfast_claims_total{outcome="won"}' in text


def test_the_openapi_document_is_served(controller: Controller) -> None:
    document = ok(controller.get("/openapi.json"))
    assert document["info"]["title"] == "Holdfast"
    assert "/v1/agent/claims" in document["paths"]
