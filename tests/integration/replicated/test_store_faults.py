"""Half-dead stores: a member behind a cut, history that is gone, a member replaced."""

import json
import shutil
from typing import Any

import pytest
from tests.integration.controller.conftest import Agent, Scene, problem
from tests.integration.replicated.plane import Plane, Replica, eventually

from holdfast_lab import processes, services
from holdfast_lab.errors import LabError

pytestmark = [pytest.mark.netns, pytest.mark.etcd]


def scene_at(replica: Replica) -> Scene:
    """Return a test's own hosts and VM, who speak to this controller."""
    return Scene(replica)  # type: ignore[arg-type] # it speaks like a controller


def stored_generation(plane: Plane, member: str, vm: str) -> int:
    """Ask one member what it has, without asking it to make sure."""
    text = plane.etcdctl(
        "get", "--consistency=s", "--print-value-only", f"/holdfast/v1/protections/{vm}",
        member=member,
    )  # fmt: skip
    return int(json.loads(text)["generation"])


def test_a_controller_at_a_member_that_is_behind_decides_and_tells_nothing(plane: Plane) -> None:
    """The member still has the old record, in which the loser could win."""
    behind, cut_off = plane.members[0], plane.replicas[2]
    scene = scene_at(plane.replicas[0])
    one, two = scene.host("one"), scene.host("two")
    generation = scene.become_protected(one)["generation"]
    for member in plane.members[1:]:
        plane.lab.cut(cut_off.name, member)
    plane.isolate(behind, also=("controller 1", "controller 2"))
    verdict = eventually("the backup's claim is decided", lambda: _verdict(two, scene, generation))
    assert (verdict["won"], verdict["record"]["generation"]) == (True, generation + 1)
    assert stored_generation(plane, behind, scene.vm) == generation, "it is not behind at all"
    one.controller = cut_off  # type: ignore[assignment]
    for _ in range(2):
        problem(one.claim(scene.vm, generation), 503, "store-unavailable")
    eventually("it says that it can not", cut_off.is_unready)
    problem(cut_off.get(f"/v1/vms/{scene.vm}/protection"), 503, "store-unavailable")
    problem(one.try_beat(), 503, "store-unavailable")
    assert stored_generation(plane, behind, scene.vm) == generation, "still behind"
    plane.lab.heal()
    plane.wait_ready()
    answer = eventually("the late claim is decided", lambda: _verdict(one, scene, generation))
    assert (answer["won"], answer["record"]["primary"]) == (False, two.name)
    eventually("it has caught up", lambda: _holds(plane, behind, scene.vm, generation + 1))


def _verdict(agent: Agent, scene: Scene, generation: int) -> dict[str, Any] | None:
    """Claim as an agent does: the same claim again, until it is decided."""
    answer = agent.claim(scene.vm, generation, claim=f"claim-of-{agent.name}")
    found: dict[str, Any] = answer.json()
    return found if answer.is_success else None


def test_a_controller_that_was_away_while_history_was_compacted_knows_everything(
    plane: Plane,
) -> None:
    here, away = plane.leader(), plane.followers()[0]
    for name in ("kept", "removed"):
        assert here.put(f"/v1/policies/{name}", {}).is_success
    eventually("all is seen", lambda: _policies(away) >= {"kept", "removed"})
    for member in plane.members:
        plane.lab.cut(away.name, member)
    eventually("it is away", away.is_unready)
    assert here.put("/v1/policies/added", {}).is_success
    assert here.http.delete("/v1/policies/removed").is_success
    revision = json.loads(plane.etcdctl("get", "x", "-w", "json"))["header"]["revision"]
    plane.etcdctl("compact", str(revision))
    plane.lab.heal()
    plane.wait_ready(away)
    assert _policies(away) >= {"kept", "added"}
    assert "removed" not in _policies(away)


def _policies(replica: Replica) -> set[str]:
    return {stored["name"] for stored in replica.get("/v1/policies").json()["policies"]}


def test_a_member_is_replaced_by_an_empty_one_while_everything_goes_on(plane: Plane) -> None:
    old = plane.etcd_leader()
    first = next(member for member in plane.members if member != old)
    scene = scene_at(plane.replicas[0])
    one, two = scene.host("one"), scene.host("two")
    generation = scene.become_protected(one)["generation"]
    listed = json.loads(plane.etcdctl("member", "list", "-w", "json", member=first))["members"]
    dead = next(each for each in listed if each["name"] == old.replace(" ", "-"))
    plane.lab.kill(old)
    plane.etcd_leader()  # the others elect one: what is proposed before is lost
    plane.etcdctl("member", "remove", f"{dead['ID']:x}", member=first)
    shutil.rmtree(plane.lab.folder.path / dead["name"])
    plane.etcdctl("member", "add", dead["name"], f"--peer-urls={dead['peerURLs'][0]}", member=first)
    _start_as_newcomer(plane, old)
    # One of the two that were never touched goes: the new one is needed for a majority.
    eventually("the new one has it", lambda: _holds(plane, old, scene.vm, generation))
    plane.lab.kill(first)
    verdict = eventually("the claim is decided", lambda: _verdict(two, scene, generation))
    assert (verdict["won"], verdict["record"]["generation"]) == (True, generation + 1)
    eventually("the new one has that, too", lambda: _holds(plane, old, scene.vm, generation + 1))


def _start_as_newcomer(plane: Plane, member: str) -> None:
    lab = plane.lab
    with lab.folder.change() as state:
        service = services.describe(lab.folder, state, member)
        state.processes[member] = processes.spawn(
            [*service.argv, "--initial-cluster-state=existing"],
            log=lab.log(member),
            namespace=lab.network.namespace(service.party),
        )


def _holds(plane: Plane, member: str, vm: str, generation: int) -> bool:
    try:
        return stored_generation(plane, member, vm) == generation
    except (LabError, ValueError):
        return False
