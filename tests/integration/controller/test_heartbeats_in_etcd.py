"""What of a heartbeat is written to a real etcd, and what only keeps its lease alive."""

from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import pytest
from tests.integration.controller.conftest import Etcd, on_etcd, vm_facts

from holdfast_api.messages import Heartbeat, Holding
from holdfast_api.records import HostFacts, VmFacts, WorkerReport
from holdfast_api.words import Role
from holdfast_controller.adapters.etcd import EtcdClient
from holdfast_controller.adapters.heartbeats import Heartbeats, Known
from holdfast_controller.adapters.keys import Kind, encode, key_of
from holdfast_controller.core.rhythm import FIGURES_SECONDS, rhythm_of

pytestmark = pytest.mark.etcd

RHYTHM = rhythm_of(3, 200, 60)


def said(version: str) -> Heartbeat:
    facts = HostFacts(
        peer_address="h1:7001",
        memory_total_bytes=1,
        memory_available_bytes=1,
        qemu_version="7.2.22",
        agent_version=version,
    )
    return Heartbeat(facts=facts)


def test_heartbeats_keep_one_lease_and_find_a_new_one_when_it_is_gone(own_etcd: Etcd) -> None:
    async def scene(_stack: AsyncExitStack, client: EtcdClient) -> None:
        heartbeats = Heartbeats(client)
        key = key_of(Kind.HEARTBEATS, "h1")

        async def present() -> Known:
            found = await client.get(key)
            assert found is not None
            return Known(found.mod_revision, found.lease)

        await heartbeats.hear("h1", said("1"), Known(), RHYTHM)
        first = await present()
        assert first.lease
        await heartbeats.hear("h1", said("2"), first, RHYTHM)
        second = await present()
        assert second.lease == first.lease
        # Heard by a controller that knows less, it is taken over all the same.
        await heartbeats.hear("h1", said("3"), Known(), RHYTHM)
        third = await present()
        assert third.revision > second.revision
        assert third.lease == first.lease
        await client.lease_revoke(third.lease)
        assert await client.get(key) is None
        await heartbeats.hear("h1", said("4"), third, RHYTHM)
        fourth = await present()
        assert fourth.lease not in (0, third.lease)
        await client.lease_revoke(fourth.lease)
        assert await client.get(key) is None, "the heartbeat lives under its lease"

    on_etcd(own_etcd, scene)


def test_a_lease_too_short_for_the_rhythm_is_replaced_and_one_that_lasts_is_kept(
    own_etcd: Etcd,
) -> None:
    async def scene(_stack: AsyncExitStack, client: EtcdClient) -> None:
        key, heartbeats = key_of(Kind.HEARTBEATS, "h1"), Heartbeats(client)
        leases = []
        # 60 s are granted to few hosts; 4,000 beat every 40 s, 4,500 every 45, 3,000 every 30.
        for count in (3, 3_000, 4_000, 4_500, 3):
            found = await client.get(key)
            known = Known() if found is None else Known(found.mod_revision, found.lease, said("1"))
            await heartbeats.hear("h1", said("1"), known, rhythm_of(count, 100, 60))
            after = await client.get(key)
            assert after is not None
            leases.append((after.lease, await client.lease_keep_alive(after.lease)))
        assert [seconds for _, seconds in leases] == [60, 60, 100, 100, 100]
        assert leases[0] == leases[1]
        assert leases[2] == leases[3] == leases[4]

    on_etcd(own_etcd, scene)


class LosesLeases(EtcdClient):
    """A real client whose leases expire the moment after they were kept alive."""

    async def lease_keep_alive(self, lease_id: int) -> int:
        seconds = await super().lease_keep_alive(lease_id)
        await self.lease_revoke(lease_id)
        return seconds


def test_a_lease_that_expires_between_its_renewal_and_the_write_is_replaced(
    own_etcd: Etcd,
) -> None:
    async def scene(stack: AsyncExitStack, client: EtcdClient) -> None:
        key = key_of(Kind.HEARTBEATS, "h1")
        await Heartbeats(client).hear("h1", said("1"), Known(), RHYTHM)
        before = await client.get(key)
        assert before is not None
        losing = LosesLeases([own_etcd.endpoint])
        stack.push_async_callback(losing.close)
        known = Known(before.mod_revision, before.lease)
        revision = await Heartbeats(losing).hear("h1", said("2"), known, RHYTHM)
        after = await client.get(key)
        assert after is not None
        assert after.mod_revision == revision
        assert after.lease not in (0, before.lease)

    on_etcd(own_etcd, scene)


def test_a_heartbeat_that_adds_nothing_keeps_its_lease_alive_and_is_not_written(
    own_etcd: Etcd,
) -> None:
    async def scene(_stack: AsyncExitStack, client: EtcdClient) -> None:
        now = 100.0
        heartbeats = Heartbeats(client, now_seconds=lambda: now)
        key = key_of(Kind.HEARTBEATS, "h1")
        first = await heartbeats.hear("h1", said("1"), Known(), RHYTHM)
        found = await client.get(key)
        assert found is not None
        known = Known(first, found.lease, said("1"), at_seconds=now)
        moved = said("1").facts.model_copy(update={"memory_available_bytes": 7})
        figures = said("1").model_copy(update={"facts": moved})
        assert await heartbeats.hear("h1", figures, known, RHYTHM) == first
        # Anything else is written at once, and figures when the last ones are old.
        held = Holding(vm="vm", generation=3, role=Role.BACKUP)
        changes: list[dict[str, Any]] = [
            {"position": 9},
            {"holdings": (held,)},
            {"facts": said("2").facts},
            {"vms": (VmFacts.model_validate(vm_facts("vm")),)},
        ]
        for change in changes:
            changed = said("1").model_copy(update=change)
            assert await heartbeats.hear("h1", changed, known, RHYTHM) > first
        now += FIGURES_SECONDS
        written = await heartbeats.hear("h1", figures, known, RHYTHM)
        assert await client.get(key) == replace(
            found,
            value=encode(figures),
            mod_revision=written,
            version=found.version + len(changes) + 1,
        )
        # A lease that is gone took the key with it: it is written whatever it says.
        await client.lease_revoke(found.lease)
        again = Known(written, found.lease, figures, at_seconds=now)
        assert await heartbeats.hear("h1", figures, again, RHYTHM) > written
        assert await client.get(key) is not None

    on_etcd(own_etcd, scene)


def worker(**changes: Any) -> WorkerReport:
    facts: dict[str, Any] = {"vm": "vm", "generation": 3, "role": "primary", "phase": "protecting"}
    return WorkerReport.model_validate(facts | changes)


@pytest.mark.parametrize(
    ("changes", "is_written"),
    [
        ({"counters": {"pages": 7.0}, "epoch": 9, "held_bytes": 1}, False),
        ({"phase": "running-alone"}, True),
        ({"generation": 4}, True),
        ({"detail": "the peer is silent"}, True),
        ({"seeding": {"round": 1, "sent_bytes": 1, "total_bytes": 2}}, True),
    ],
)
def test_what_a_worker_counts_can_wait_and_what_it_does_can_not(
    own_etcd: Etcd, changes: dict[str, Any], *, is_written: bool
) -> None:
    async def scene(_stack: AsyncExitStack, client: EtcdClient) -> None:
        heartbeats = Heartbeats(client, now_seconds=lambda: 100.0)
        before = said("1").model_copy(update={"workers": (worker(),)})
        after = said("1").model_copy(update={"workers": (worker(**changes),)})
        revision = await heartbeats.hear("h1", before, Known(), RHYTHM)
        found = await client.get(key_of(Kind.HEARTBEATS, "h1"))
        assert found is not None
        known = Known(revision, found.lease, before, at_seconds=100.0)
        assert (await heartbeats.hear("h1", after, known, RHYTHM) != revision) is is_written

    on_etcd(own_etcd, scene)
