"""One of three controllers leads; how another takes over."""

import json

import pytest
from tests.integration.controller.conftest import Scene
from tests.integration.replicated.plane import Plane, Replica, eventually

from holdfast_controller.leadership import KEY

pytestmark = [pytest.mark.netns, pytest.mark.etcd]


def passes(replica: Replica) -> float:
    found = replica.metric("holdfast_planner_passes_total")
    assert found is not None, replica.name
    return found


def lease_of_leader(plane: Plane) -> int:
    """Return the lease of whoever leads as etcd sees it, 0 if nobody does."""
    found = json.loads(plane.etcdctl("get", KEY, "-w", "json"))
    return int(found["kvs"][0]["lease"]) if "kvs" in found else 0


def test_exactly_one_leads_and_it_alone_plans_while_all_answer(plane: Plane) -> None:
    leader = plane.leader()
    before = [passes(replica) for replica in plane.replicas]
    scene = Scene(leader)  # type: ignore[arg-type] # speaks like a controller
    for number, replica in enumerate(plane.replicas):
        scene.host(f"h{number}", replica)  # type: ignore[arg-type]
    eventually("the leader planned", lambda: passes(leader) > before[plane.replicas.index(leader)])
    for replica, count in zip(plane.replicas, before, strict=True):
        if replica is not leader:
            assert passes(replica) == count, replica.name
        hosts = {host["host"] for host in replica.get("/v1/hosts").json()["hosts"]}
        assert {agent.name for agent in scene.agents.values()} <= hosts


def test_a_leader_that_is_asked_to_stop_hands_over_before_its_lease_ends(plane: Plane) -> None:
    leader = plane.leader()
    lease = lease_of_leader(plane)
    assert lease
    plane.lab.stop(leader.name)
    assert lease_of_leader(plane) != lease, "the lease outlives the process"
    assert plane.leader() is not leader


def test_a_leader_that_is_killed_or_frozen_is_replaced_and_does_not_lead_on(plane: Plane) -> None:
    first = plane.leader()
    plane.lab.kill(first.name)
    second = plane.leader()
    assert second is not first
    plane.lab.freeze(second.name)
    others = [replica for replica in plane.replicas if replica not in (first, second)]
    eventually("the third leads", others[0].leads)
    plane.lab.thaw(second.name)
    # The frozen one finds its time over by its own clock, before any answer of etcd tells it so.
    eventually("it answers", lambda: second.metric("holdfast_controller_is_leader") is not None)
    assert plane.leader() is others[0]


def test_a_leader_that_is_cut_off_from_etcd_stops_before_another_begins(plane: Plane) -> None:
    leader = plane.leader()
    for member in plane.members:
        plane.lab.cut(leader.name, member)
    others = [replica for replica in plane.replicas if replica is not leader]

    def another_leads() -> bool:
        if not any(replica.leads() for replica in others):
            return False
        assert not leader.leads(), "two at once"
        return True

    eventually("another leads", another_leads)
    eventually("it says that it can not", leader.is_unready)
    plane.lab.heal()
    plane.wait_ready()
    assert plane.leader() is not leader


@pytest.mark.parametrize("loss", ["lease", "key"])
def test_a_leader_whose_lease_or_key_is_taken_notices(plane: Plane, loss: str) -> None:
    leader = plane.leader()
    log = plane.lab.log(leader.name)
    before = log.read_text().count("the lease on leadership is lost")
    if loss == "key":
        plane.etcdctl("del", KEY)
    else:
        plane.etcdctl("lease", "revoke", f"{lease_of_leader(plane):x}")
    eventually(
        "it notices",
        lambda: log.read_text().count("the lease on leadership is lost") > before,
    )
    plane.leader()
