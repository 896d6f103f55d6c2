"""Events listed, followed, resumed and pruned, over real HTTP and a real etcd."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.integration.controller.conftest import (
    Controller,
    Etcd,
    Scene,
    eventually,
    ok,
    problem,
)

pytestmark = pytest.mark.etcd


def report(controller: Controller, vm: str, message: str) -> int:
    body = {"kind": "WorkerFailed", "host": "h1", "vm": vm, "message": message}
    return int(ok(controller.post("/v1/agent/events", body))["position"])


def followed(lines: Iterator[str], vm: str) -> Iterator[dict[str, Any]]:
    """Yield the events of `vm`, each checked against its id and name."""
    fields: dict[str, str] = {}
    for line in lines:
        if line.startswith(":"):
            continue
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
            continue
        if fields:
            event = json.loads(fields["data"])
            assert fields["id"] == str(event["position"])
            assert fields["event"] == event["kind"]
            if event["vm"] == vm:
                yield event
        fields = {}


def test_events_are_listed_in_order_from_a_position(scene: Scene) -> None:
    controller = scene.controller
    positions = [report(controller, scene.vm, f"number {n}") for n in range(3)]
    assert positions == sorted(positions)
    events = ok(controller.get("/v1/events", after=positions[0]))["events"]
    assert [e["message"] for e in events if e["vm"] == scene.vm] == ["number 1", "number 2"]
    first = ok(controller.get("/v1/events", after=positions[0], limit=1))["events"]
    assert len(first) == 1
    assert ok(controller.get("/v1/events", after=10**12))["events"] == []
    problem(controller.get("/v1/events", limit=0), 422, "invalid-request")
    problem(controller.get("/v1/events", after="now"), 422, "invalid-request")


def test_a_follower_gets_what_is_there_and_what_comes(scene: Scene) -> None:
    controller = scene.controller
    report(controller, scene.vm, "before")
    with controller.http.stream("GET", "/v1/events", params={"follow": True}) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        events = followed(stream.iter_lines(), scene.vm)
        assert next(events)["message"] == "before"
        report(controller, scene.vm, "after")
        assert next(events)["message"] == "after"


@pytest.mark.parametrize("by_header", [True, False])
def test_a_follower_resumes_without_gap_or_repetition(scene: Scene, by_header: bool) -> None:
    controller = scene.controller
    report(controller, scene.vm, "seen")
    seen = report(controller, scene.vm, "seen last")
    report(controller, scene.vm, "missed")
    headers = {"Last-Event-ID": str(seen)} if by_header else {}
    params = {"follow": "true", "after": "0" if by_header else str(seen)}
    with controller.http.stream("GET", "/v1/events", params=params, headers=headers) as stream:
        events = followed(stream.iter_lines(), scene.vm)
        assert next(events)["message"] == "missed"


def test_old_events_are_pruned_and_new_ones_kept(
    own_etcd: Etcd, make_controller: Callable[..., Controller]
) -> None:
    controller = make_controller(own_etcd, events_kept=100)
    controller.start()
    for number in range(130):
        report(controller, "vm", f"number {number}")

    def pruned() -> list[dict[str, Any]] | None:
        events: list[dict[str, Any]] = ok(controller.get("/v1/events"))["events"]
        return events if len(events) == 100 else None

    kept = eventually("the oldest are pruned", pruned)
    assert [e["message"] for e in kept] == [f"number {n}" for n in range(30, 130)]
