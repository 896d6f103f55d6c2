"""The world in memory: what a watch brings, and who is woken by it."""

import asyncio

import pytest
from tests.unit.controller.worlds import heartbeat as heartbeat_view
from tests.unit.controller.worlds import record

from holdfast_api.errors import Unavailable
from holdfast_api.messages import Heartbeat, Holding
from holdfast_api.records import Event, Policy
from holdfast_api.words import EventKind, Phase, Role
from holdfast_controller.adapters.etcd import KeyValue, WatchBatch
from holdfast_controller.adapters.keys import (
    BadValue,
    HostEntry,
    Kind,
    Stored,
    decode,
    encode,
    key_of,
    split_key,
)
from holdfast_controller.signals import Signals
from holdfast_controller.world import World


def put(kind: Kind, name: str, value: Stored, revision: int, lease: int = 0) -> KeyValue:
    return KeyValue(key_of(kind, name), encode(value), revision, revision, 1, lease)


def batch(*put_values: KeyValue, deleted: tuple[KeyValue, ...] = ()) -> WatchBatch:
    events = [("put", kv) for kv in put_values] + [("delete", kv) for kv in deleted]
    revision = max(kv.mod_revision for kv in (*put_values, *deleted))
    return WatchBatch(revision=revision, events=tuple(events))  # type: ignore[arg-type]


def said(address: str = "h:1", free: int = 5, **more: object) -> Heartbeat:
    facts = heartbeat_view(peer_address=address, memory_available_bytes=free).facts
    return Heartbeat.model_validate({"facts": facts} | more)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_everything_survives_its_way_through_the_store() -> None:
    event = Event(position=0, at=1.5, kind=EventKind.PROTECTED, message="m", evidence={"a": 1.5})
    values: list[tuple[Kind, Stored]] = [
        (Kind.POLICIES, Policy(interval_ms=99)),
        (Kind.HOSTS, HostEntry(present=True)),
        (Kind.HEARTBEATS, said(holdings=[Holding(vm="vm", generation=1, role=Role.BACKUP)])),
        (Kind.PROTECTIONS, record(Phase.PROTECTED)),
        (Kind.EVENTS, event),
    ]
    for kind, value in values:
        assert decode(key_of(kind, "x"), encode(value)) == value
        assert split_key(key_of(kind, "x")) == (kind, "x")


def test_what_lasts_is_written_in_full_so_that_new_defaults_do_not_change_it() -> None:
    assert b'"keepalive_ms":50' in encode(Policy())
    assert b'"keepalive_ms":50' in encode(record())


@pytest.mark.parametrize("key", ["/other/x", "/holdfast/v1/probe", "/holdfast/v1/cats/x", "/"])
def test_keys_that_are_not_ours_are_none(key: str) -> None:
    assert split_key(key) is None
    with pytest.raises(BadValue):
        decode(key, b"{}")


def test_one_value_that_can_not_be_read_does_not_hide_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World()
    bad = KeyValue(key_of(Kind.PROTECTIONS, "bad"), b'{"vm":1}', 2, 2, 1, 0)
    world.apply(batch(put(Kind.PROTECTIONS, "vm", record(), 1), bad))
    assert set(world.present.protections) == {"vm"}
    assert "/protections/bad can not be read" in caplog.text


def test_a_record_is_indexed_by_its_hosts_and_moves_with_them() -> None:
    world = World()
    world.apply(batch(put(Kind.PROTECTIONS, "vm", record(Phase.PROTECTED), 3)))
    assert (world.vms_of("h1"), world.vms_of("h2")) == ({"vm"}, {"vm"})
    alone = put(Kind.PROTECTIONS, "vm", record(generation=4, primary="h2"), 5)
    world.apply(batch(alone))
    assert (world.vms_of("h1"), world.vms_of("h2")) == (set(), {"vm"})
    assert (world.orders_revision("h1"), world.orders_revision("h2")) == (5, 5)
    world.apply(batch(deleted=(alone,)))
    assert world.vms_of("h2") == set()
    assert world.present.protections == {}


def test_a_snapshot_stays_and_the_present_goes_on() -> None:
    world = World()
    snapshot, present = world.snapshot(), world.present
    world.apply(batch(put(Kind.PROTECTIONS, "vm", record(), 3)))
    assert snapshot.protections == {}
    assert set(present.protections) == {"vm"}


def test_the_time_at_a_generation_runs_on_through_changes_within_it() -> None:
    clock = Clock()
    world = World(now_seconds=clock)
    world.apply(batch(put(Kind.PROTECTIONS, "vm", record(), 3)))
    clock.now = 200.0
    world.apply(batch(put(Kind.PROTECTIONS, "vm", record(backup_wanted=False), 4)))
    assert world.present.protections["vm"].since_seconds == 100.0
    resynchronised = put(Kind.PROTECTIONS, "vm", record(), 5)
    world.apply(WatchBatch(revision=9, resynchronised=True, snapshot=(resynchronised,)))
    assert world.present.protections["vm"].since_seconds == 100.0
    world.apply(batch(put(Kind.PROTECTIONS, "vm", record(generation=4), 10)))
    assert world.present.protections["vm"].since_seconds == 200.0


def test_a_resynchronisation_forgets_what_is_gone() -> None:
    world = World()
    event = Event(position=0, at=1.0, kind=EventKind.PROTECTED, message="m")
    world.apply(
        batch(
            put(Kind.PROTECTIONS, "vm", record(), 3),
            put(Kind.HEARTBEATS, "h1", said(), 4, lease=7),
            put(Kind.POLICIES, "p", Policy(), 5),
            put(Kind.EVENTS, "e", event, 6),
        )
    )
    assert (world.known_heartbeat("h1").revision, world.known_heartbeat("h1").lease) == (4, 7)
    world.apply(WatchBatch(revision=9, resynchronised=True, snapshot=()))
    seen = world.present
    assert (seen.hosts, seen.protections, seen.policies) == ({}, {}, {})
    assert (len(world.events), world.revision, world.vms_of("h1")) == (0, 9, set())
    assert world.known_heartbeat("h1").lease == 0


def test_a_host_is_known_by_its_entry_after_its_heartbeat_is_gone() -> None:
    world = World()
    beat = put(Kind.HEARTBEATS, "h1", said(), 4)
    world.apply(batch(beat, put(Kind.HEARTBEATS, "h2", said(), 5)))
    world.apply(batch(put(Kind.HOSTS, "h1", HostEntry(present=True), 6)))
    assert world.present.hosts["h1"].alive
    second = KeyValue(key_of(Kind.HEARTBEATS, "h2"), b"", 7, 0, 0, 0)
    world.apply(batch(deleted=(beat, second)))
    (host,) = world.present.hosts.values()
    assert (host.host, host.alive, host.present, host.settings_revision) == ("h1", False, True, 6)


def test_a_heartbeat_is_no_later_evidence_than_its_host_can_have_known() -> None:
    world = World()
    late = said().model_copy(update={"position": 3})
    world.apply(batch(put(Kind.HEARTBEATS, "h1", late, 9)))
    beat = world.present.heartbeat("h1")
    assert beat is not None
    assert beat.revision == 4
    ahead = said().model_copy(update={"position": 90})
    world.apply(batch(put(Kind.HEARTBEATS, "h1", ahead, 10)))
    beat = world.present.heartbeat("h1")
    assert beat is not None
    assert beat.revision == 10


def planner_wakes(world: World, beat: Heartbeat) -> bool:
    seen = world.planner_changes
    world.apply(batch(put(Kind.HEARTBEATS, "h1", beat, world.revision + 1)))
    return world.planner_changes != seen


def test_the_planner_is_woken_by_news_and_not_by_figures_that_always_move() -> None:
    world = World()
    assert planner_wakes(world, said())
    assert not planner_wakes(world, said(free=6))
    assert planner_wakes(world, said("h:2"))
    holding = Holding(vm="vm", generation=1, role=Role.BACKUP)
    assert planner_wakes(world, said("h:2", holdings=[holding]))
    assert not planner_wakes(world, said("h:2", holdings=[holding]))


def test_the_primary_gets_a_new_order_when_its_backup_moves() -> None:
    world = World()
    world.apply(batch(put(Kind.PROTECTIONS, "vm", record(Phase.PROTECTED), 3)))
    world.apply(batch(put(Kind.HEARTBEATS, "h2", said(), 4)))
    assert world.orders_revision("h1") == 4
    world.apply(batch(put(Kind.HEARTBEATS, "h2", said(free=1), 5)))
    assert world.orders_revision("h1") == 4
    world.apply(batch(put(Kind.HEARTBEATS, "h2", said("h:2"), 6)))
    assert world.orders_revision("h1") == 6


def test_a_world_that_is_not_live_says_so() -> None:
    world = World()
    with pytest.raises(Unavailable):
        world.require_live()
    world.set_live(live=True)
    world.require_live()


def test_events_are_in_the_order_of_their_revisions_whatever_their_names() -> None:
    world = World()
    for name, revision in (("b", 5), ("a", 7), ("c", 6)):
        event = Event(position=0, at=1.0, kind=EventKind.PROTECTED, message=name)
        world.apply(batch(put(Kind.EVENTS, name, event, revision)))
    assert [(e.position, e.message) for e in world.events.after(5, 9)] == [(6, "c"), (7, "a")]
    assert [e.message for e in world.events.after(0, 2)] == ["b", "c"]
    assert world.events.surplus(2) == ["b"]
    assert world.events.surplus(3) == []
    assert (world.events.reaches(6), world.events.reaches(7)) == (True, False)
    world.events.remove("c")
    world.events.remove("c")
    assert [e.message for e in world.events.after(0, 9)] == ["b", "a"]


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_a_waiter_is_woken_by_its_own_topic_only_and_all_at_the_end() -> None:
    async def scene() -> None:
        signals, seen = Signals(), [0]
        mine = asyncio.create_task(signals.wait("mine", lambda: seen[0] > 0, 60))
        other = asyncio.create_task(signals.wait("other", lambda: False, 60))
        await settle()
        signals.fire("mine")
        await settle()
        assert not mine.done()
        seen[0] = 1
        signals.fire("other")
        await settle()
        assert not mine.done()
        signals.fire("mine")
        assert await mine is True
        signals.close()
        assert await other is False
        assert await signals.wait("late", lambda: False, 60) is False
        assert await signals.wait("late", lambda: True, 0) is True

    asyncio.run(scene())


def test_a_waiter_that_times_out_or_is_cancelled_leaves_nothing_behind() -> None:
    async def scene() -> None:
        signals = Signals()
        assert await signals.wait("x", lambda: False, 0.01) is False
        waiting = asyncio.create_task(signals.wait("x", lambda: False, 60))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert signals._waiting == {}

    asyncio.run(scene())


def test_unknown_facts_are_not_accepted_from_the_store() -> None:
    key = key_of(Kind.HEARTBEATS, "h1")
    with pytest.raises(BadValue):
        decode(key, b'{"facts":{},"mood":1}')
