"""All of the store's content in memory, kept current by one watch. Needs an event loop.

Bounded by what etcd holds: entries go when their keys go, and events are pruned there. `apply`
takes what the watch brings; `snapshot` hands out an immutable view; `signals` wakes who waits.

A value that can not be read is treated as absent and logged: one bad key must not blind the
control plane to all others. A protection whose record can not be read is then not planned for.

Topics: `revision` (every batch), `plan` (something the planner looks at has changed), `events`,
`host:NAME` (an order of that host has changed).
"""

import logging
import time
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from dataclasses import replace
from types import MappingProxyType

from holdfast_api.errors import Unavailable
from holdfast_api.messages import Heartbeat
from holdfast_api.records import Event, Policy, ProtectionRecord
from holdfast_api.words import HostId, PolicyName, VmId
from holdfast_controller.adapters.etcd import KeyValue, WatchBatch
from holdfast_controller.adapters.heartbeats import Known, known_of
from holdfast_controller.adapters.keys import BadValue, HostEntry, Kind, decode, split_key
from holdfast_controller.core.view import (
    HeartbeatView,
    Held,
    HostView,
    PolicyView,
    ProtectionView,
    View,
)
from holdfast_controller.eventlog import EventLog
from holdfast_controller.signals import Signals

logger = logging.getLogger(__name__)


class World:
    """The store's content as this controller last heard it."""

    def __init__(self, *, now_seconds: Callable[[], float] = time.monotonic) -> None:
        """Start empty and not live; `now_seconds` is this process's own clock."""
        self.signals = Signals()
        self.events = EventLog()
        self.revision = 0
        self.planner_changes = 0
        """Rises whenever something that the planner looks at has changed."""
        self._now_seconds = now_seconds
        self._live = False
        self._hosts: dict[HostId, HostView] = {}
        self._known: dict[HostId, Known] = {}
        self._protections: dict[VmId, ProtectionView] = {}
        self._policies: dict[PolicyName, PolicyView] = {}
        self._orders_revision: dict[HostId, int] = {}
        self._vms_of: dict[HostId, set[VmId]] = {}

    # --- what others ask ----------------------------------------------------------------------

    @property
    def live(self) -> bool:
        """The content was loaded and the store answers."""
        return self._live

    def set_live(self, live: bool) -> None:  # noqa: FBT001 - a setter of one flag
        """Say whether the store answers and the watch follows it."""
        if live != self._live:
            logger.info("the store %s", "answers" if live else "does not answer")
        self._live = live

    def require_live(self) -> None:
        """Raise Unavailable unless the content is current."""
        if not self._live:
            raise Unavailable("store-unavailable", "the store does not answer; ask again")

    def snapshot(self) -> View:
        """Return a view that stays as it is."""
        return View(
            revision=self.revision,
            now_seconds=self._now_seconds(),
            hosts=dict(self._hosts),
            protections=dict(self._protections),
            policies=dict(self._policies),
        )

    @property
    def present(self) -> View:
        """A view that is true until the next await: it shares this world's own tables.

        An answer to one of a thousand hosts must not copy ten thousand records.
        """
        return View(
            revision=self.revision,
            now_seconds=self._now_seconds(),
            hosts=MappingProxyType(self._hosts),
            protections=MappingProxyType(self._protections),
            policies=MappingProxyType(self._policies),
        )

    def vms_of(self, host: HostId) -> AbstractSet[VmId]:
        """Return the VMs whose record names `host`, in whatever phase."""
        return self._vms_of.get(host, frozenset())

    def known_record(self, vm: VmId) -> tuple[ProtectionRecord, int] | None:
        """Return the record of `vm` and its revision as last heard; None if there was none."""
        known = self._protections.get(vm)
        return None if known is None else (known.record, known.revision)

    def known_heartbeat(self, host: HostId) -> Known:
        """Return what the next heartbeat of `host` must know of the present one."""
        return self._known.get(host, Known())

    @property
    def beating_count(self) -> int:
        """How many hosts have a heartbeat that counts."""
        return len(self._known)

    def orders_revision(self, host: HostId) -> int:
        """Return the revision at which an order of `host` last changed."""
        return self._orders_revision.get(host, 0)

    async def reached(self, revision: int, *, timeout_seconds: float = 1.0) -> bool:
        """Wait until `revision` is known here, so that a caller reads what it has written."""
        return await self.signals.wait(
            "revision", lambda: self.revision >= revision, timeout_seconds
        )

    async def planner_change(self, seen: int, timeout_seconds: float) -> bool:
        """Wait until `planner_changes` is no longer `seen`, at most for `timeout_seconds`."""
        return await self.signals.wait(
            "plan", lambda: self.planner_changes != seen, timeout_seconds
        )

    # --- what the watch brings ----------------------------------------------------------------

    def load(self, key_values: Iterable[KeyValue], revision: int) -> None:
        """Replace everything by `key_values`, the whole content at `revision`."""
        since = self._protections
        affected = set(self._orders_revision)
        self._hosts, self._known, self._protections, self._policies = {}, {}, {}, {}
        self._orders_revision, self._vms_of = {}, {}
        self.events.clear()
        for key_value in sorted(key_values, key=lambda kv: kv.mod_revision):
            self._put(key_value, since)
        self.revision = revision
        for host in affected | set(self._orders_revision):
            self.signals.fire(f"host:{host}")
        self._wake_planner()
        for topic in ("revision", "events"):
            self.signals.fire(topic)

    def apply(self, batch: WatchBatch) -> None:
        """Take in one batch of the watch."""
        if batch.resynchronised:
            self.load(batch.snapshot, batch.revision)
            return
        for kind, key_value in batch.events:
            if kind == "put":
                self._put(key_value, self._protections)
            else:
                self._delete(key_value)
        self.revision = max(self.revision, batch.revision)
        self.signals.fire("revision")

    def _put(self, key_value: KeyValue, before: dict[VmId, ProtectionView]) -> None:
        found = split_key(key_value.key)
        if found is None:
            return
        kind, name = found
        try:
            value = decode(key_value.key, key_value.value)
        except BadValue as error:
            logger.error("%s", error)  # noqa: TRY400 - a traceback would say no more
            self._delete(key_value)
            return
        revision = key_value.mod_revision
        if isinstance(value, Event):
            self.events.add(name, value.model_copy(update={"position": revision}))
            self.signals.fire("events")
        elif isinstance(value, Heartbeat):
            self._put_heartbeat(name, value, key_value)
        elif isinstance(value, HostEntry):
            self._hosts[name] = replace(
                self._hosts.get(name, HostView(name)),
                settings=value.settings,
                settings_revision=revision,
                present=value.present,
            )
            self._wake_planner()
        elif isinstance(value, Policy):
            self._policies[name] = PolicyView(value, revision)
            self._wake_planner()
        else:
            assert isinstance(value, ProtectionRecord), kind
            self._put_record(value, revision, before.get(name))

    def _put_record(
        self, record: ProtectionRecord, revision: int, before: ProtectionView | None
    ) -> None:
        same = before is not None and before.record.generation == record.generation
        since = before.since_seconds if before is not None and same else self._now_seconds()
        self._protections[record.vm] = ProtectionView(record, revision, since)
        for host in _hosts_of(before):
            self._vms_of.get(host, set()).discard(record.vm)
            self._order_changed(host, revision)
        for host in _hosts_of(self._protections[record.vm]):
            self._vms_of.setdefault(host, set()).add(record.vm)
            self._order_changed(host, revision)
        self._wake_planner()

    def _put_heartbeat(self, host: HostId, heartbeat: Heartbeat, key_value: KeyValue) -> None:
        before = self._hosts.get(host, HostView(host))
        now = heartbeat_view(heartbeat, key_value.mod_revision)
        self._hosts[host] = replace(before, heartbeat=now)
        self._known[host] = replace(
            known_of(key_value), said=heartbeat, at_seconds=self._now_seconds()
        )
        if before.heartbeat is None or _matters_to_planner(before.heartbeat, now):
            self._wake_planner()
        if (
            before.heartbeat is None
            or before.heartbeat.facts.peer_address != now.facts.peer_address
        ):
            self._peer_moved(host, key_value.mod_revision)

    def _delete(self, key_value: KeyValue) -> None:
        found = split_key(key_value.key)
        if found is None:
            return
        kind, name = found
        match kind:
            case Kind.EVENTS:
                self.events.remove(name)
                return
            case Kind.HEARTBEATS:
                self._known.pop(name, None)
                if name in self._hosts:
                    self._hosts[name] = replace(self._hosts[name], heartbeat=None)
                    self._forget_empty(name)
            case Kind.HOSTS:
                if name in self._hosts:
                    heartbeat = self._hosts[name].heartbeat
                    self._hosts[name] = HostView(name, heartbeat=heartbeat)
                    self._forget_empty(name)
            case Kind.POLICIES:
                self._policies.pop(name, None)
            case Kind.PROTECTIONS:
                for host in _hosts_of(self._protections.pop(name, None)):
                    self._vms_of.get(host, set()).discard(name)
        self._wake_planner()

    def _forget_empty(self, name: HostId) -> None:
        host = self._hosts[name]
        if host.heartbeat is None and host.settings_revision == 0:
            del self._hosts[name]

    def _wake_planner(self) -> None:
        self.planner_changes += 1
        self.signals.fire("plan")

    def _peer_moved(self, backup: HostId, revision: int) -> None:
        for vm in self._vms_of.get(backup, ()):
            record = self._protections[vm].record
            if record.backup == backup:
                self._order_changed(record.primary, revision)

    def _order_changed(self, host: HostId, revision: int) -> None:
        self._orders_revision[host] = max(revision, self._orders_revision.get(host, 0))
        self.signals.fire(f"host:{host}")


def _hosts_of(known: ProtectionView | None) -> tuple[HostId, ...]:
    if known is None:
        return ()
    record = known.record
    return (record.primary,) if record.backup is None else (record.primary, record.backup)


def heartbeat_view(heartbeat: Heartbeat, revision: int) -> HeartbeatView:
    """Return what the planner sees of a heartbeat that was written at `revision`.

    It may have been under way for long: it is no later evidence than its host can have known.
    """
    return HeartbeatView(
        revision=min(revision, heartbeat.position + 1),
        facts=heartbeat.facts,
        vms={facts.vm: facts for facts in heartbeat.vms},
        workers={report.vm: report for report in heartbeat.workers},
        held={h.vm: Held(h.vm, h.generation, h.role) for h in heartbeat.holdings},
    )


def _matters_to_planner(before: HeartbeatView, now: HeartbeatView) -> bool:
    """Whether more has changed than figures that move all the time; those wait for the tick."""
    return (
        before.vms != now.vms
        or before.held != now.held
        or before.facts.without_figures() != now.facts.without_figures()
    )
