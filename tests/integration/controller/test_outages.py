"""The store freezes, dies and comes back; controllers start, stop and work side by side."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from tests.integration.controller.conftest import (
    Controller,
    Etcd,
    Scene,
    eventually,
    noted_once,
    ok,
    problem,
)

pytestmark = pytest.mark.etcd
MakeController = Callable[..., Controller]


def test_while_the_store_is_frozen_everything_is_undecided_and_recovers_by_itself(
    own_etcd: Etcd, make_controller: MakeController
) -> None:
    controller = make_controller(own_etcd)
    controller.start()
    scene = Scene(controller)
    one, two = scene.host("h1"), scene.host("h2")
    generation = scene.become_protected(one)["generation"]
    own_etcd.freeze()
    problem(two.claim(scene.vm, generation), 503, "store-unavailable")
    controller.wait_not_ready()
    problem(one.try_beat(), 503, "store-unavailable")
    problem(controller.get("/v1/hosts"), 503, "store-unavailable")
    problem(controller.get("/v1/vms/x/protection"), 503, "store-unavailable")
    problem(controller.get(f"/v1/agent/hosts/{one.name}/assignments"), 503, "store-unavailable")
    problem(controller.put("/v1/policies/p", {}), 503, "store-unavailable")
    assert ok(controller.get("/healthz")) == {"status": "ok"}
    assert "holdfast_store_reachable 0.0" in controller.get("/metrics").text
    own_etcd.thaw()
    controller.wait_ready()
    verdict = ok(two.claim(scene.vm, generation))
    assert (verdict["won"], verdict["record"]["generation"]) == (True, generation + 1)
    assert len(controller.events(scene.vm, "FailedOver")) == 1


def test_rivals_whose_claims_met_a_frozen_store_agree_on_one_winner(
    own_etcd: Etcd, make_controller: MakeController
) -> None:
    controller = make_controller(own_etcd)
    controller.start()
    scene = Scene(controller)
    one, two = scene.host("h1"), scene.host("h2")
    generation = scene.become_protected(one)["generation"]
    own_etcd.freeze()
    with ThreadPoolExecutor(2) as pool:
        undecided = [
            pool.submit(one.claim, scene.vm, generation, "stream-broken", "claim-of-one"),
            pool.submit(two.claim, scene.vm, generation, "peer-silent", "claim-of-two"),
        ]
        for claim in undecided:
            problem(claim.result(), 503, "store-unavailable")
    own_etcd.thaw()
    controller.wait_ready()
    for _ in range(2):
        verdicts = [
            ok(one.claim(scene.vm, generation, "stream-broken", "claim-of-one")),
            ok(two.claim(scene.vm, generation, "peer-silent", "claim-of-two")),
        ]
        assert sorted(verdict["won"] for verdict in verdicts) == [False, True]
    assert controller.protection(scene.vm)["generation"] == generation + 1


def test_a_store_that_was_killed_comes_back_with_everything(
    own_etcd: Etcd, make_controller: MakeController
) -> None:
    controller = make_controller(own_etcd)
    controller.start()
    scene = Scene(controller)
    one = scene.host("h1")
    scene.host("h2")
    before = scene.become_protected(one)
    own_etcd.end()
    controller.wait_not_ready()
    own_etcd.start()
    controller.wait_ready()
    scene.beat_all()
    after = controller.protection(scene.vm)
    assert (after["generation"], after["phase"]) == (before["generation"], "protected")
    third = scene.host("h3")
    assert third.name in {h["host"] for h in ok(controller.get("/v1/hosts"))["hosts"]}


def test_a_controller_started_before_its_store_becomes_ready_with_it(
    own_etcd: Etcd, make_controller: MakeController
) -> None:
    own_etcd.end()
    controller = make_controller(own_etcd)
    controller.start(ready=False)
    controller.wait_not_ready()
    own_etcd.start()
    controller.wait_ready()


def test_two_controllers_plan_side_by_side_and_every_step_happens_once(
    own_etcd: Etcd, make_controller: MakeController
) -> None:
    first, second = make_controller(own_etcd), make_controller(own_etcd)
    first.start()
    second.start()
    scene = Scene(first)
    one, two = scene.host("h1"), scene.host("h2", second)
    scene.host("h3", second)
    generation = scene.become_protected(one)["generation"]
    assert generation == 2
    # The same host may be heard by any of them: the lease is found in the heartbeat's key.
    for _ in range(3):
        two.controller = first if two.controller is second else second
        assert two.beat()[scene.vm]["role"] == "backup"
    assert ok(second.get(f"/v1/vms/{scene.vm}/protection"))["phase"] == "protected"
    with ThreadPoolExecutor(2) as pool:
        claims = [
            pool.submit(one.claim, scene.vm, generation, "stream-broken", "claim-of-one"),
            pool.submit(two.claim, scene.vm, generation, "peer-silent", "claim-of-two"),
        ]
        assert sorted(ok(claim.result())["won"] for claim in claims) == [False, True]
    assigned = [e["generation"] for e in first.events(scene.vm, "BackupAssigned")]
    assert len(assigned) == len(set(assigned))
    events = ok(first.get("/v1/events"))["events"]
    assert [a.name for a in scene.agents.values() if not noted_once(events, a.name)] == []


def test_asked_to_stop_it_lets_its_long_polls_and_followers_go_and_ends_cleanly(
    own_etcd: Etcd, make_controller: MakeController
) -> None:
    controller = make_controller(own_etcd)
    controller.start()
    where = "/v1/agent/hosts/h1/assignments"
    streaming = threading.Event()

    def follow() -> None:
        with controller.http.stream("GET", "/v1/events", params={"follow": True}) as stream:
            for _ in stream.iter_lines():
                streaming.set()

    with ThreadPoolExecutor(2) as pool:
        polling = pool.submit(controller.get, where, after=1, wait_ms=10_000)
        following = pool.submit(follow)
        assert streaming.wait(30)
        assert controller.end(signal.SIGTERM) == 0
        following.result()
        assert isinstance(polling.exception(), httpx.TransportError | None)
    assert "stopped" in controller.text()
    assert "Traceback" not in controller.text()


def test_a_follower_that_hangs_up_frees_its_place(
    own_etcd: Etcd, make_controller: MakeController
) -> None:
    controller = make_controller(own_etcd)
    controller.start()
    for _ in range(300):
        with controller.http.stream("GET", "/v1/events", params={"follow": True}) as stream:
            assert stream.status_code == 200, "a place was lost"
            next(stream.iter_lines())


def test_an_address_that_is_taken_is_a_clear_error(
    own_etcd: Etcd, make_controller: MakeController
) -> None:
    controller = make_controller(own_etcd)
    controller.start()
    second = make_controller(own_etcd, listen_port=controller.http.base_url.port)
    second.launch()
    assert second.running is not None
    assert second.running.wait(timeout=60) == 3
    assert "can not listen" in second.text()


def test_without_assertions_it_does_not_run() -> None:
    done = subprocess.run(
        [sys.executable, "-O", "-m", "holdfast_controller.main"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert "python -O" in done.stderr


def test_faulty_options_are_all_named_and_nothing_starts(
    own_etcd: Etcd, make_controller: MakeController
) -> None:
    controller = make_controller(own_etcd, listen_port=70_000, colour="red")
    controller.launch()
    assert controller.running is not None
    assert controller.running.wait(timeout=60) == 2
    text = eventually("it says why", controller.text)
    assert "listen_port" in text
    assert "colour: there is no such option" in text
