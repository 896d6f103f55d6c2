"""Parts of the control plane are dead, stopped or cut off; protections go on and fail over."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from tests.integration.replicated.conftest import Stand
from tests.integration.replicated.plane import Plane

pytestmark = [pytest.mark.qemu, pytest.mark.netns, pytest.mark.etcd]
FAILOVER_SECONDS_MAX = 60.0


def kill_a_controller(plane: Plane) -> None:
    plane.lab.kill(plane.followers()[0].name)


def kill_the_leading_controller(plane: Plane) -> None:
    plane.lab.kill(plane.leader().name)


def freeze_the_leading_controller(plane: Plane) -> None:
    plane.lab.freeze(plane.leader().name)


def kill_a_member(plane: Plane) -> None:
    plane.lab.kill(plane.etcd_follower())


def freeze_the_leading_member(plane: Plane) -> None:
    plane.lab.freeze(plane.etcd_leader())


def cut_the_leading_member_off(plane: Plane) -> None:
    leader = plane.etcd_leader()
    plane.isolate(leader, also=tuple(replica.name for replica in plane.replicas))


def cut_a_member_off_from_the_members(plane: Plane) -> None:
    """Controllers still reach it, and it answers them."""
    plane.isolate(plane.etcd_follower())


FAULTS: list[Callable[[Plane], None]] = [
    kill_a_controller,
    kill_the_leading_controller,
    freeze_the_leading_controller,
    kill_a_member,
    freeze_the_leading_member,
    cut_the_leading_member_off,
    cut_a_member_off_from_the_members,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_client_counts_on_through_the_fault_and_a_failover(
    stand: Stand, fault: Callable[[Plane], None], record_property: Callable[[str, Any], None]
) -> None:
    """Its host dies at the same moment; the VM is protected again while the part is missing."""
    cluster = stand.cluster
    protection = cluster.wait_protected()
    assert protection.backup is not None
    client = stand.client
    cluster.goes_on(client)
    fault(stand.plane)
    killed_at = stand.lab.kill(protection.primary)
    cluster.wait_primary(protection.backup)
    cluster.goes_on(client)
    record_property("stall_seconds", client.stall_seconds(since=killed_at))
    assert cluster.wait_protected(primary=protection.backup).backup is not None
    cluster.goes_on(client)


def test_the_etcd_leader_and_the_primarys_host_die_at_the_same_moment(
    stand: Stand, record_property: Callable[[str, Any], None]
) -> None:
    cluster = stand.cluster
    protection = cluster.wait_protected()
    assert protection.backup is not None
    client = stand.client
    cluster.goes_on(client)
    leader = stand.plane.etcd_leader()
    killing = threading.Thread(target=stand.lab.kill, args=(leader,))
    killing.start()
    killed_at = stand.lab.kill(protection.primary)
    killing.join()
    replied_at = client.wait_for_reply(after=killed_at + 0.1, deadline_seconds=FAILOVER_SECONDS_MAX)
    assert replied_at is not None, cluster.story()
    record_property("failover_seconds", replied_at - killed_at)
    cluster.goes_on(client)
    assert cluster.wait_protected(primary=protection.backup).backup is not None


def test_without_a_majority_nothing_is_decided_and_output_is_held_until_there_is_one(
    stand: Stand,
) -> None:
    cluster, plane = stand.cluster, stand.plane
    protection = cluster.wait_protected()
    client = stand.client
    cluster.goes_on(client)
    dead = plane.members[:2]
    for member in dead:
        stand.lab.kill(member)
    cluster.goes_on(client, more=100)
    stand.lab.kill(protection.backup or "")
    cluster.says_nothing(client, 3.0)
    assert not any(replica.is_ready() for replica in plane.replicas)
    for member in dead:
        stand.lab.start(member)
    cluster.goes_on(client)
    after = cluster.wait_protected(primary=protection.primary)
    assert after.generation > protection.generation
    assert after.backup not in (None, protection.backup)
    cluster.goes_on(client)
