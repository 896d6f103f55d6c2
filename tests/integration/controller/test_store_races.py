"""Two writers that have both read before either writes: the store lets exactly one through."""

import asyncio
from contextlib import AsyncExitStack

import pytest
from tests.integration.controller.conftest import Etcd, on_etcd

from holdfast_api import transitions
from holdfast_api.errors import Refused
from holdfast_api.messages import Claim, ClaimVerdict
from holdfast_api.records import HostSettings, PlacementNote, Policy, ProtectionRecord
from holdfast_api.transitions import Outcome
from holdfast_api.words import ClaimReason, EventKind, Phase
from holdfast_controller.adapters.etcd import EtcdClient, KeyValue, absent
from holdfast_controller.adapters.heartbeats import Heartbeats
from holdfast_controller.adapters.keys import ROOT, HostEntry, Kind, decode, key_of
from holdfast_controller.adapters.store import EventDraft, Store
from holdfast_controller.claims import decide_claim
from holdfast_controller.control import Control
from holdfast_controller.core.planner import ChangeProtection, NoteHost, Plan
from holdfast_controller.executor import execute
from holdfast_controller.metrics import Metrics
from holdfast_controller.world import World

pytestmark = pytest.mark.etcd


class Meeting:
    """A place where so many must arrive before any goes on; later comers pass."""

    def __init__(self, parties: int) -> None:
        self._missing = parties
        self._complete = asyncio.Event()

    async def arrive(self) -> None:
        self._missing -= 1
        if self._missing <= 0:
            self._complete.set()
        async with asyncio.timeout(60):
            await self._complete.wait()


class ReadsThenMeets(EtcdClient):
    """A real client whose first read returns only when all others have read, too."""

    def __init__(self, endpoint: str, meeting: Meeting) -> None:
        super().__init__([endpoint])
        self._meeting = meeting

    async def get(self, key: str) -> KeyValue | None:
        found = await super().get(key)
        await self._meeting.arrive()
        return found


def protected() -> ProtectionRecord:
    return ProtectionRecord(
        vm="vm", generation=4, phase=Phase.PROTECTED, primary="h1", backup="h2", policy=Policy()
    )


def draft(message: str = "a test") -> EventDraft:
    return EventDraft(EventKind.PROTECTION_CHANGED, message, vm="vm")


async def write(store: Store, record: ProtectionRecord) -> int:
    changed = await store.change(record.vm, lambda _: record, lambda _, __: draft())
    return changed.revision


async def events(client: EtcdClient, kind: EventKind) -> list[KeyValue]:
    found, _ = await client.list(f"{ROOT}{Kind.EVENTS}/")
    return [kv for kv in found if f'"kind":"{kind}"'.encode() in kv.value]


def control_on(client: EtcdClient) -> Control:
    return Control(Store(client), Heartbeats(client), World(), Metrics(), 200, 5)


def test_of_claims_that_all_read_the_same_record_exactly_one_wins(own_etcd: Etcd) -> None:
    async def scene(stack: AsyncExitStack, client: EtcdClient) -> None:
        before = await write(Store(client), protected())
        claims = [
            ("h1", ClaimReason.STREAM_BROKEN),
            ("h1", ClaimReason.PEER_SILENT),
            ("h2", ClaimReason.PEER_SILENT),
            ("h2", ClaimReason.STREAM_BROKEN),
        ]
        meeting = Meeting(len(claims))
        deciding: list[asyncio.Task[ClaimVerdict]] = []
        for number, (host, reason) in enumerate(claims):
            meeting_client = ReadsThenMeets(own_etcd.endpoint, meeting)
            stack.push_async_callback(meeting_client.close)
            claim = Claim(
                vm="vm", generation=4, host=host, claim=f"claim-000{number}", reason=reason
            )
            decision = decide_claim(control_on(meeting_client), claim)
            deciding.append(asyncio.create_task(decision))
        verdicts = await asyncio.gather(*deciding)
        (winner,) = [v for v in verdicts if v.won]
        record, revision = await Store(client).read("vm")
        assert winner.record == record
        assert record is not None
        assert (record.generation, record.backup) == (5, None)
        assert all(v.record == record for v in verdicts)
        stored = await client.get(key_of(Kind.PROTECTIONS, "vm"))
        assert stored is not None
        assert (stored.version, revision > before) == (2, True)
        told = await events(client, EventKind.CLAIM_WON)
        told += await events(client, EventKind.FAILED_OVER)
        assert [kv.mod_revision for kv in told] == [revision]
        assert len(await events(client, EventKind.CLAIM_LOST)) == 3

    on_etcd(own_etcd, scene)


@pytest.mark.parametrize("known", ["as it is", "older", "of other hosts", "unknown"])
def test_a_claim_is_decided_by_the_store_whatever_the_controller_believes(
    own_etcd: Etcd, known: str
) -> None:
    async def scene(_stack: AsyncExitStack, client: EtcdClient) -> None:
        control, store = control_on(client), Store(client)
        key = key_of(Kind.PROTECTIONS, "vm")
        others = protected().model_copy(update={"primary": "h3", "backup": "h4"})
        for record in (others, protected()):
            await write(store, record)
            found = await client.get(key)
            assert found is not None
            if known == ("of other hosts" if record is others else "as it is"):
                control.world.load([found], found.mod_revision)
        if known == "older":
            assert found is not None
            control.world.load([found], found.mod_revision)
            won = await decide_claim(control, claim_of("h2", "first"))
            assert won.won
        verdict = await decide_claim(control, claim_of("h1", "second"))
        record_now, _ = await store.read("vm")
        assert verdict.won == (known != "older")
        assert verdict.record == record_now
        assert record_now is not None
        assert record_now.generation == 5
        assert record_now.primary == ("h2" if known == "older" else "h1")
        again = await decide_claim(control, claim_of("h1", "second"))
        assert again.won == verdict.won
        assert again.record == record_now

    on_etcd(own_etcd, scene)


def claim_of(host: str, name: str) -> Claim:
    reason = ClaimReason.PEER_SILENT
    return Claim(vm="vm", generation=4, host=host, claim=f"claim-{name}", reason=reason)


def test_a_claim_and_the_report_of_seeding_at_once_leave_a_legal_record(own_etcd: Etcd) -> None:
    async def scene(stack: AsyncExitStack, client: EtcdClient) -> None:
        seeding = protected().model_copy(update={"phase": Phase.SEEDING, "unprotected_since": 1.0})
        await write(Store(client), seeding)
        meeting = Meeting(2)
        first = ReadsThenMeets(own_etcd.endpoint, meeting)
        second = ReadsThenMeets(own_etcd.endpoint, meeting)
        stack.push_async_callback(first.close)
        stack.push_async_callback(second.close)

        def seeded(record: ProtectionRecord | None) -> Outcome:
            assert record is not None
            return transitions.become_protected(record, "h1", 4)

        def failed(record: ProtectionRecord | None) -> Outcome:
            assert record is not None
            return transitions.drop_seeding_backup(record, "h1", 4, setback="disk full")

        done = await asyncio.gather(
            Store(first).change("vm", seeded, lambda _, __: draft()),
            Store(second).change("vm", failed, lambda _, __: draft()),
            return_exceptions=True,
        )
        refused = [each for each in done if isinstance(each, Refused)]
        assert len(refused) == 1
        assert refused[0].code in ("wrong-phase", "stale-generation")
        stored = await client.get(key_of(Kind.PROTECTIONS, "vm"))
        assert stored is not None
        assert stored.version == 2

    on_etcd(own_etcd, scene)


def test_a_change_whose_other_condition_fails_is_refused_and_writes_nothing(
    own_etcd: Etcd,
) -> None:
    async def scene(_stack: AsyncExitStack, client: EtcdClient) -> None:
        store = Store(client)
        await write(store, protected())
        await store.store_policy("p", Policy())
        gone = (absent(key_of(Kind.POLICIES, "p")),)

        def decide(record: ProtectionRecord | None) -> Outcome:
            assert record is not None
            return record.model_copy(update={"handover": True})

        with pytest.raises(Refused) as caught:
            await store.change("vm", decide, lambda _, __: draft(), also=gone)
        assert caught.value.code == "conflict"
        record, _ = await store.read("vm")
        assert record == protected()

    on_etcd(own_etcd, scene)


def test_a_plan_of_an_older_world_changes_nothing(own_etcd: Etcd) -> None:
    async def scene(_stack: AsyncExitStack, client: EtcdClient) -> None:
        store = Store(client)
        alone = protected().model_copy(update={"phase": Phase.UNPROTECTED, "backup": None})
        revision = await write(store, alone)
        seeding = transitions.assign_backup(alone, PlacementNote(chosen="h3"))
        assert isinstance(seeding, ProtectionRecord)
        step = ChangeProtection(
            "vm", revision, seeding, EventKind.BACKUP_ASSIGNED, "h3 was chosen", "h3"
        )
        note = NoteHost("h3", 0, HostSettings(), True, EventKind.HOST_APPEARED, "h3 answers")
        planned = Plan(revision, (step, note))
        assert await execute(store, planned, Metrics()) == ["h3 was chosen", "h3 answers"]
        assert await execute(store, planned, Metrics()) == []
        record, _ = await store.read("vm")
        assert record == seeding
        assert len(await events(client, EventKind.BACKUP_ASSIGNED)) == 1
        assert len(await events(client, EventKind.HOST_APPEARED)) == 1

    on_etcd(own_etcd, scene)


def test_settings_changed_by_two_at_once_are_both_there(own_etcd: Etcd) -> None:
    async def scene(stack: AsyncExitStack, client: EtcdClient) -> None:
        meeting = Meeting(2)

        async def label(name: str) -> None:
            own = ReadsThenMeets(own_etcd.endpoint, meeting)
            stack.push_async_callback(own.close)

            def decide(settings: HostSettings) -> HostSettings:
                return HostSettings(labels={**settings.labels, name: "y"})

            await Store(own).change_host("h1", decide, "a test")

        await asyncio.gather(label("one"), label("two"))
        stored = await client.get(key_of(Kind.HOSTS, "h1"))
        assert stored is not None
        entry = decode(stored.key, stored.value)
        assert isinstance(entry, HostEntry)
        assert entry.settings.labels == {"one": "y", "two": "y"}

    on_etcd(own_etcd, scene)
