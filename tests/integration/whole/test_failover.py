"""Hosts die under a protected VM; its client must not notice."""

from collections.abc import Callable
from typing import Any

import pytest

from holdfast_api.records import Policy
from holdfast_api.words import EventKind, Phase
from holdfast_lab.vm import VmOptions

pytestmark = [pytest.mark.qemu, pytest.mark.netns, pytest.mark.etcd]


def test_a_client_counts_on_through_two_deaths_of_the_host(cluster: Any) -> None:
    protection = cluster.protect()
    client = cluster.counting()
    cluster.goes_on(client)
    for _ in range(2):
        primary, backup = protection.primary, protection.backup
        assert backup is not None
        cluster.lab.kill(primary)
        cluster.wait_primary(backup)
        cluster.goes_on(client)
        cluster.lab.revive(primary)
        protection = cluster.wait_protected(primary=backup)
        cluster.goes_on(client)
    assert len(cluster.events(EventKind.FAILED_OVER)) == 2
    assert protection.generation == 6


def test_a_dead_backup_is_replaced_by_a_third_host(cluster: Any) -> None:
    protection = cluster.protect()
    client = cluster.counting()
    cluster.goes_on(client)
    cluster.lab.kill(protection.backup)
    cluster.goes_on(client)
    after = cluster.wait_protected(primary=protection.primary)
    assert after.backup not in (protection.backup, protection.primary)
    cluster.goes_on(client)


def test_without_a_host_left_the_reasons_are_said_and_one_that_returns_is_taken(
    make_cluster: Callable[..., Any],
) -> None:
    cluster = make_cluster(2)
    cluster.run_vm()
    cluster.protect()
    client = cluster.counting()
    cluster.goes_on(client)
    cluster.lab.kill("h1")
    cluster.wait_primary("h2")
    cluster.goes_on(client)
    cluster.wait_for(
        "the reasons are said",
        lambda: bool((p := cluster.protection()).placement and p.placement.rejections),
    )
    protection = cluster.protection()
    assert protection.phase is Phase.UNPROTECTED
    assert protection.reason
    assert {r.host for r in protection.placement.rejections} >= {"h1"}
    cluster.lab.revive("h1")
    assert cluster.wait_protected(primary="h2").backup == "h1"
    cluster.goes_on(client)


def test_a_planned_switchover_moves_the_vm_and_protects_it_again(cluster: Any) -> None:
    protection = cluster.protect()
    client = cluster.counting()
    cluster.goes_on(client)
    cluster.client.switchover("vm", to=protection.backup)
    cluster.wait_primary(protection.backup)
    cluster.goes_on(client)
    after = cluster.wait_protected(primary=protection.backup)
    assert after.generation == protection.generation + 2
    cluster.goes_on(client)
    assert not cluster.events(EventKind.FAILED_OVER)


@pytest.mark.parametrize(
    ("options", "tracker"),
    [
        pytest.param(VmOptions(memory_mb=192, shared_memory=True), "auto", id="shared-memory-vga"),
        pytest.param(VmOptions(memory_mb=3584, graphics=False), "auto", id="two-ranges"),
        pytest.param(VmOptions(memory_mb=128, graphics=False), "compare", id="compare"),
        pytest.param(VmOptions(memory_mb=128, graphics=False, nics=2, vcpus=2), "auto", id="two"),
    ],
)
def test_every_kind_of_memory_survives_a_failover(
    make_cluster: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    options: VmOptions,
    tracker: str,
) -> None:
    monkeypatch.setenv("HOLDFAST_AGENT_TRACKER", tracker)
    cluster = make_cluster(2)
    cluster.run_vm(options=options)
    redis = cluster.lab.redis("vm", timeout_seconds=60)
    for number in range(200):
        redis.command("SET", f"key{number}", str(number) * 500)
    protection = cluster.protect()
    assert protection.primary_report.tracker == (
        "compare" if tracker == "compare" else "pagemap-scan"
    )
    redis.command("SET", "last", "words")
    cluster.lab.kill("h1")
    cluster.wait_primary("h2")
    assert redis.command("GET", "last") == "words"
    for number in range(200):
        assert redis.command("GET", f"key{number}") == str(number) * 500
    redis.close()


def test_a_guest_that_writes_as_fast_as_its_backup_is_filled_is_slowed_until_it_is(
    make_cluster: Callable[..., Any],
) -> None:
    cluster = make_cluster(2)
    options = VmOptions(
        memory_mb=768, graphics=False, shared_memory=True, dirty_mb=512, dirty_pps=200_000
    )
    cluster.run_vm(options=options)
    console = cluster.lab.log("console vm")
    cluster.wait_for("the guest writes", lambda: b"guest: rewriting" in console.read_bytes())
    cluster.protect()
    client = cluster.counting()
    cluster.goes_on(client)
    report = cluster.protection().primary_report
    assert report.counters["seeding_brakes"] >= 1, report
    cluster.lab.kill("h1")
    cluster.wait_primary("h2")
    cluster.goes_on(client)
    assert len(cluster.events(EventKind.FAILED_OVER)) == 1


def test_unprotecting_leaves_the_vm_as_it_was_and_protecting_again_works(cluster: Any) -> None:
    before = cluster.protect()
    client = cluster.counting()
    cluster.goes_on(client)
    cluster.client.unprotect("vm")
    cluster.wait_for("it is not protected", lambda: not is_protected(cluster))
    cluster.goes_on(client)
    after = cluster.protect(Policy(interval_ms=20))
    assert after.generation > before.generation
    cluster.goes_on(client)


def is_protected(cluster: Any) -> bool:
    return cluster.client.vm("vm").protection is not None


def test_the_interval_is_changed_while_running(cluster: Any) -> None:
    cluster.protect(Policy(interval_ms=500, output_triggered=False))
    from holdfast_api.messages import PolicyPatch  # noqa: PLC0415

    client = cluster.counting()
    cluster.client.change("vm", PolicyPatch(interval_ms=20, output_triggered=True))
    cluster.wait_for(
        "the policy is followed", lambda: cluster.protection().policy.interval_ms == 20
    )
    cluster.goes_on(client, more=100)
    assert cluster.protection().phase is Phase.PROTECTED
