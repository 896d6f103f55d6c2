"""Processes and networks fail around a protected VM."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from holdfast_api.records import Policy
from holdfast_api.words import EventKind, Phase

pytestmark = [pytest.mark.qemu, pytest.mark.netns, pytest.mark.etcd]

PATIENT = Policy(keepalive_ms=1000, keepalive_misses=10)
"""A peer may be stopped for seconds without being suspected."""


def test_not_one_packet_leaves_while_acknowledgements_are_withheld(cluster: Any) -> None:
    protection = cluster.protect(PATIENT)
    client = cluster.counting()
    cluster.goes_on(client)
    address = cluster.lab.state.vms["vm"].addresses[0]
    worker = cluster.pid_of_worker(protection.backup)
    with cluster.capture(address) as seen:
        cluster.goes_on(client)
        assert seen.count() > 0, "the capture sees nothing even when output flows"
        os.kill(worker, signal.SIGSTOP)
        try:
            cluster.says_nothing(client, 0.5)
            seen.clear()
            cluster.says_nothing(client, 2.0)
            assert seen.count() == 0, "a packet left without an acknowledgement"
        finally:
            os.kill(worker, signal.SIGCONT)
        cluster.goes_on(client)
    assert cluster.protection().generation == protection.generation


@pytest.mark.parametrize("side", ["primary", "backup"])
def test_an_agent_is_killed_and_restarted_without_a_failover(cluster: Any, side: str) -> None:
    protection = cluster.protect()
    client = cluster.counting()
    host = getattr(protection, side)
    cluster.lab.kill(f"agent {host}")
    cluster.goes_on(client)
    cluster.lab.start(f"agent {host}")
    cluster.wait_for(
        "its report is back",
        lambda: getattr(cluster.protection(), f"{side}_report") is not None,
    )
    cluster.goes_on(client)
    assert cluster.protection().generation == protection.generation
    cluster.lab.kill(protection.primary)
    cluster.wait_primary(protection.backup)
    cluster.goes_on(client)


@pytest.mark.parametrize("side", ["primary", "backup"])
def test_a_worker_dies_and_the_vm_goes_on_somewhere(cluster: Any, side: str) -> None:
    protection = cluster.protect()
    client = cluster.counting()
    cluster.goes_on(client)
    os.kill(cluster.pid_of_worker(getattr(protection, side)), signal.SIGKILL)
    cluster.wait_for(
        "the generation is over", lambda: cluster.protection().generation > protection.generation
    )
    cluster.wait_protected()
    cluster.goes_on(client)


def test_a_qemu_that_crashes_is_a_failover_and_says_so(cluster: Any) -> None:
    protection = cluster.protect()
    client = cluster.counting()
    cluster.goes_on(client)
    os.kill(cluster.pid_of_qemu(protection.primary), signal.SIGKILL)
    cluster.wait_primary(protection.backup)
    cluster.goes_on(client)
    (event,) = cluster.events(EventKind.FAILED_OVER)
    assert "vm-failed" in f"{event.message} {event.evidence}"


def test_a_guest_that_shuts_itself_down_is_not_brought_back(cluster: Any) -> None:
    cluster.protect()
    cluster.lab.power_off_vm("vm")
    cluster.wait_for("the protection has ended", lambda: cluster.protection().phase is Phase.ENDED)
    assert cluster.events(EventKind.GUEST_ENDED)
    cluster.wait_for("no QEMU is left", lambda: cluster.count_qemus() == 0)
    assert not cluster.events(EventKind.FAILED_OVER)


def test_a_cut_between_primary_and_backup_leaves_exactly_one(cluster: Any) -> None:
    protection = cluster.protect()
    client = cluster.counting()
    cluster.goes_on(client)
    cluster.lab.cut(protection.primary, protection.backup)
    cluster.wait_for(
        "the generation is over", lambda: cluster.protection().generation > protection.generation
    )
    cluster.goes_on(client)
    cluster.lab.heal()
    cluster.wait_protected()
    cluster.goes_on(client)


def test_a_primary_cut_off_from_all_says_nothing_and_is_destroyed_when_it_is_back(
    cluster: Any,
) -> None:
    protection = cluster.protect()
    client = cluster.counting()
    cluster.goes_on(client)
    primary, backup = protection.primary, protection.backup
    (third,) = {"h1", "h2", "h3"} - {primary, backup}
    for party in (backup, third, "control"):
        cluster.lab.cut(primary, party)
    cluster.wait_primary(backup)
    cluster.goes_on(client)
    assert cluster.pid_of_qemu(primary), "the loser still stands there, silent"
    cluster.lab.heal()
    cluster.wait_for("the loser is destroyed", lambda: not cluster.has_qemu(primary))
    cluster.goes_on(client)


def test_with_etcd_stopped_a_lost_backup_holds_output_until_etcd_is_back(cluster: Any) -> None:
    protection = cluster.protect()
    client = cluster.counting()
    cluster.goes_on(client)
    cluster.lab.kill("etcd")
    cluster.goes_on(client)
    cluster.lab.kill(protection.backup)
    cluster.says_nothing(client, 3.0)
    cluster.lab.start("etcd")
    cluster.goes_on(client)
    after = cluster.wait_protected(primary=protection.primary)
    assert after.generation > protection.generation


def test_the_backup_dies_in_the_middle_of_seeding(
    make_cluster: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDFAST_AGENT_SEEDING_BYTES_PER_SECOND", str(20_000_000))
    cluster = make_cluster(3)
    cluster.run_vm()
    client = cluster.counting()

    cluster.client.protect("vm", policy=Policy())
    cluster.wait_for(
        "seeding moves",
        lambda: bool((s := cluster.protection().seeding) and s.sent_bytes > 4_000_000),
    )
    seeding = cluster.protection()
    assert seeding.phase is Phase.SEEDING
    cluster.goes_on(client)
    cluster.lab.kill(seeding.backup)
    after = cluster.wait_protected(primary=seeding.primary)
    assert after.backup != seeding.backup
    cluster.goes_on(client)


def test_both_hosts_die_and_the_loss_is_said_plainly(cluster: Any) -> None:
    protection = cluster.protect()
    cluster.lab.kill(protection.backup)
    cluster.lab.kill(protection.primary)
    cluster.lab.revive(protection.primary)
    cluster.lab.revive(protection.backup)
    cluster.wait_for("the loss is said", lambda: cluster.protection().phase is Phase.ENDED)
    assert cluster.events(EventKind.VM_LOST)


def test_a_backup_whose_disk_is_full_is_passed_over_for_another(cluster: Any) -> None:
    with cluster.full_disk("h2"), cluster.full_disk("h3"):
        cluster.client.protect("vm", policy=Policy())
        client = cluster.counting()
        cluster.wait_for(
            "it was tried and given up",
            lambda: bool(cluster.events(EventKind.BACKUP_DROPPED)),
        )
        assert cluster.protection().phase is not Phase.PROTECTED
        cluster.goes_on(client)
    cluster.wait_protected()
    cluster.goes_on(client)
