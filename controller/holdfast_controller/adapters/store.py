"""What the control plane keeps, on etcd: every change is one compare-and-swap with its event.

Talks to etcd through the client it is given; reads are linearizable.

`Changes` is the only way to change a record: read it, let a pure function decide its successor,
write the successor and the event that tells of it in one transaction that succeeds only if the
record is still the one that was read. If it is not, the present one is decided on again. A write
whose outcome is unknown is never assumed either way: the caller hears `Unavailable`, and asks
again (INV-5).

| raised        | means                                                                        |
|---------------|------------------------------------------------------------------------------|
| `Refused`     | decided: no; nothing was changed                                             |
| `Unavailable` | not decided: the store did not answer, or others were quicker too many times |
"""

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from holdfast_api.errors import Refused, Unavailable
from holdfast_api.records import Event, HostSettings, Policy, ProtectionRecord
from holdfast_api.transitions import Outcome, Refusal
from holdfast_api.words import EventKind, Generation, HostId, PolicyName, VmId
from holdfast_controller.adapters.etcd import (
    Compare,
    Delete,
    EtcdClient,
    EtcdRefused,
    EtcdUnavailable,
    KeyValue,
    Put,
    TxnResult,
    absent,
    unchanged,
)
from holdfast_controller.adapters.keys import (
    ROOT,
    BadValue,
    HostEntry,
    Kind,
    Stored,
    decode,
    encode,
    key_of,
)

ATTEMPTS_MAX = 32
"""Lost races until a change gives up as undecided; each loss means that somebody else won."""
_PROBE_KEY = f"{ROOT}probe"
DELETES_PER_TXN = 100
"""etcd takes 128 operations in a transaction unless told otherwise."""

Evidence = dict[str, str | int | float | bool | None]


@dataclass(frozen=True)
class EventDraft:
    """An event that is not written yet: it has neither position nor time."""

    kind: EventKind
    message: str
    vm: VmId | None = None
    host: HostId | None = None
    generation: Generation | None = None
    evidence: Evidence = field(default_factory=dict)


@dataclass(frozen=True)
class Changed:
    """A record as it stands after a change, and the store's revision that shows it."""

    record: ProtectionRecord
    revision: int
    written: bool
    """False when the record was as wanted already."""


Decide = Callable[[ProtectionRecord | None], Outcome]
Describe = Callable[[ProtectionRecord | None, ProtectionRecord], EventDraft]


@contextmanager
def undecided_when_unavailable() -> Iterator[None]:
    """Turn the client's errors into the API's."""
    try:
        yield
    except EtcdUnavailable as error:
        raise Unavailable("store-unavailable", f"{error}; ask again") from error
    except EtcdRefused as error:
        raise Unavailable("store-unavailable", f"{error}; an operator must look at etcd") from error
    except BadValue as error:
        raise Unavailable("store-unavailable", f"{error}; an operator must look at it") from error


class Store:
    """Reads and changes of everything but heartbeats."""

    def __init__(
        self,
        etcd: EtcdClient,
        *,
        now_seconds: Callable[[], float] = time.time,
        new_name: Callable[[], str] = lambda: secrets.token_hex(6),
    ) -> None:
        """Work on `etcd`, which stays the caller's.

        `now_seconds` is UTC, for people to read; `new_name` tells two events of one moment apart.
        """
        self._etcd = etcd
        self.now_seconds = now_seconds
        self._new_name = new_name

    async def read(self, vm: VmId) -> tuple[ProtectionRecord | None, int]:
        """Return the record of `vm` and its revision (0: there is none)."""
        key = key_of(Kind.PROTECTIONS, vm)
        with undecided_when_unavailable():
            return _record_of(key, await self._etcd.get(key))

    async def change(
        self,
        vm: VmId,
        decide: Decide,
        describe: Describe,
        *,
        also: tuple[Compare, ...] = (),
        guess: tuple[ProtectionRecord, int] | None = None,
    ) -> Changed:
        """Change the record of `vm` as `decide` says; it may be asked more than once.

        `also`: further conditions; when one of them fails, the change is refused as `conflict`.
        `guess`: the record and its revision as they probably are, which saves reading them. Only
        one that `decide` changes: a write fails if the guess is wrong, anything else would be
        answered from it.
        """
        key = key_of(Kind.PROTECTIONS, vm)
        record, revision = guess or await self.read(vm)
        for attempt in range(ATTEMPTS_MAX):
            outcome = decide(record)
            is_guessed = guess is not None and attempt == 0
            assert not (is_guessed and (isinstance(outcome, Refusal) or outcome == record))
            if isinstance(outcome, Refusal):
                raise Refused(outcome.code, outcome.explanation)
            if outcome == record:
                return Changed(record, revision, written=False)
            result = await self._write(
                [compare(key, revision), *also],
                [Put(key, encode(outcome)), self._event(describe(record, outcome))],
            )
            if result.succeeded:
                return Changed(outcome, result.revision, written=True)
            with undecided_when_unavailable():
                previous, (record, revision) = revision, _record_of(key, result.current[0])
            if revision == previous:
                raise Refused("conflict", "what this change relies on was changed; try again")
        raise Unavailable("store-unavailable", f"{vm} changes all the time; ask again")

    async def swap(
        self,
        vm: VmId,
        expected_revision: int,
        to: ProtectionRecord,
        draft: EventDraft,
    ) -> bool:
        """Replace the record of `vm` if it is still at `expected_revision`; say whether."""
        key = key_of(Kind.PROTECTIONS, vm)
        result = await self._write(
            [compare(key, expected_revision)], [Put(key, encode(to)), self._event(draft)]
        )
        return result.succeeded

    async def store_host(
        self, host: HostId, expected_revision: int, entry: HostEntry, draft: EventDraft
    ) -> int | None:
        """Store what is kept of `host` if it is at `expected_revision`; return the new revision.

        None: it was changed meanwhile, and stays as it is.
        """
        key = key_of(Kind.HOSTS, host)
        result = await self._write(
            [compare(key, expected_revision)], [Put(key, encode(entry)), self._event(draft)]
        )
        return result.revision if result.succeeded else None

    async def change_host(
        self, host: HostId, decide: Callable[[HostSettings], HostSettings], message: str
    ) -> tuple[HostSettings, int]:
        """Change the operator's settings of `host`; returns them and the revision to see them."""
        key = key_of(Kind.HOSTS, host)
        for _ in range(ATTEMPTS_MAX):
            with undecided_when_unavailable():
                found = await self._etcd.get(key)
                entry = HostEntry() if found is None else decode(key, found.value)
            assert isinstance(entry, HostEntry), key
            revision = 0 if found is None else found.mod_revision
            settings = decide(entry.settings)
            if settings == entry.settings:
                return settings, revision
            draft = EventDraft(EventKind.HOST_CHANGED, message, host=host)
            changed = entry.model_copy(update={"settings": settings})
            written = await self.store_host(host, revision, changed, draft)
            if written is not None:
                return settings, written
        raise Unavailable("store-unavailable", f"{host} changes all the time; ask again")

    async def read_policy(self, name: PolicyName) -> tuple[Policy | None, int]:
        """Return the stored policy and its revision (0: there is none)."""
        key = key_of(Kind.POLICIES, name)
        with undecided_when_unavailable():
            found = await self._etcd.get(key)
            if found is None:
                return None, 0
            policy = decode(key, found.value)
        assert isinstance(policy, Policy), key
        return policy, found.mod_revision

    async def store_policy(self, name: PolicyName, policy: Policy) -> int:
        """Store `policy` under `name`; returns the revision that shows it. Idempotent."""
        key = key_of(Kind.POLICIES, name)
        for _ in range(ATTEMPTS_MAX):
            present, revision = await self.read_policy(name)
            if present == policy:
                return revision
            draft = EventDraft(EventKind.POLICY_STORED, f"policy {name} was stored")
            result = await self._write(
                [compare(key, revision)], [Put(key, encode(policy)), self._event(draft)]
            )
            if result.succeeded:
                return result.revision
        raise Unavailable("store-unavailable", f"{name} changes all the time; ask again")

    async def remove_policy(self, name: PolicyName) -> int | None:
        """Remove the policy; returns the revision without it, None if there was none."""
        key = key_of(Kind.POLICIES, name)
        for _ in range(ATTEMPTS_MAX):
            present, revision = await self.read_policy(name)
            if present is None:
                return None
            draft = EventDraft(EventKind.POLICY_REMOVED, f"policy {name} was removed")
            result = await self._write(
                [unchanged(key, revision)], [Delete(key), self._event(draft)]
            )
            if result.succeeded:
                return result.revision
        raise Unavailable("store-unavailable", f"{name} changes all the time; ask again")

    async def add_event(self, draft: EventDraft, *, once: str | None = None) -> Event | None:
        """Write an event that changes nothing else.

        `once`: a name; a second event of this name is not written, and None returned.
        """
        put = self._event(draft, once)
        result = await self._write([absent(put.key)], [put])
        if not result.succeeded:
            return None
        event = decode(put.key, put.value)
        assert isinstance(event, Event), put.key
        return event.model_copy(update={"position": result.revision})

    async def remove_events(self, names: list[str]) -> None:
        """Remove events; those that are gone already are no fault."""
        for start in range(0, len(names), DELETES_PER_TXN):
            part = names[start : start + DELETES_PER_TXN]
            await self._write([], [Delete(key_of(Kind.EVENTS, name)) for name in part])

    async def probe(self) -> int:
        """Write something, as only a working majority can; returns the revision that shows it.

        Raises Unavailable.
        """
        result = await self._write([], [Put(_PROBE_KEY, b"")])
        return result.revision

    async def last_probe(self) -> int:
        """Return the revision of the newest probe of any controller, read from a majority.

        Raises Unavailable.
        """
        with undecided_when_unavailable():
            found = await self._etcd.get(_PROBE_KEY)
        return 0 if found is None else found.mod_revision

    async def _write(self, compares: list[Compare], writes: list[Put | Delete]) -> TxnResult:
        assert (
            sum(w.key.startswith(f"{ROOT}{Kind.EVENTS}/") for w in writes if isinstance(w, Put))
            <= 1
        ), "two events of one revision have one position"
        with undecided_when_unavailable():
            return await self._etcd.txn(compares, writes)

    def _event(self, draft: EventDraft, once: str | None = None) -> Put:
        now = self.now_seconds()
        name = once or f"{int(now * 1_000_000):020d}-{self._new_name()}"
        event = Event(
            position=0,
            at=now,
            kind=draft.kind,
            vm=draft.vm,
            host=draft.host,
            generation=draft.generation,
            message=draft.message,
            evidence=draft.evidence,
        )
        return Put(key_of(Kind.EVENTS, name), encode(event))


def compare(key: str, revision: int) -> Compare:
    """Demand that `key` is still at `revision`, where 0 stands for its absence."""
    return unchanged(key, revision) if revision else absent(key)


def _record_of(key: str, found: KeyValue | None) -> tuple[ProtectionRecord | None, int]:
    if found is None:
        return None, 0
    record: Stored = decode(key, found.value)
    assert isinstance(record, ProtectionRecord), key
    return record, found.mod_revision
