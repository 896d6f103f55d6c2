"""A simulated etcd: compare-and-swap on revisions, leases, watches; and clients with bad luck.

The store itself is one and linearizable. What goes wrong is the way to it: a request does not get
there, or is carried out and the answer gets lost, or comes late; a watch lags behind or ends. Both
kinds of unknown outcome raise `EtcdUnavailable`, as the real client does.
"""

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn, TypeVar

from tests.scenarios.simulation import MS
from tests.simulation.kernel import SECOND, Kernel
from tests.simulation.network import Network
from tests.simulation.simulated_loop import SimulatedLoop

from holdfast_controller.adapters.etcd import (
    Compare,
    Delete,
    EtcdUnavailable,
    KeyValue,
    Put,
    TxnResult,
    WatchBatch,
)
from holdfast_controller.adapters.keys import ROOT, Kind

STORE = "store"
REQUEST_NS_MIN = 100 * MS
REQUEST_NS_MAX = 2 * SECOND
RECORDS_HARDER = 4.0
"""Writes of a record get lost so much more often than all else: those are the ones that matter."""
LEASE_CHECK_NS = 500 * MS
WATCH_NS_MAX = 60 * MS

Event = tuple[str, KeyValue]
Answer = TypeVar("Answer")


@dataclass
class Lease:
    """A lease, and the keys that go with it."""

    ttl_ns: int
    expires_ns: int
    keys: set[str] = field(default_factory=set)


class SimulatedStore:
    """What etcd keeps."""

    def __init__(self, kernel: Kernel, network: Network, happened: Counter[str]) -> None:
        self.kernel = kernel
        self.network = network
        self.happened = happened
        self.is_up = True
        self.timeouts = 0.0
        """Share of requests whose outcome the caller does not learn."""
        self.revision = 1
        self.keys: dict[str, KeyValue] = {}
        self.on_change: Callable[[KeyValue | None, KeyValue], None] = lambda _before, _after: None
        self._leases: dict[int, Lease] = {}
        self._numbers = itertools.count(1)
        self._watches: list[Watch] = []
        kernel.after(LEASE_CHECK_NS, self._expire)

    def txn(self, compares: Sequence[Compare], writes: Sequence[Put | Delete]) -> TxnResult:
        """Carry a transaction out, here and now."""
        current = tuple(self.keys.get(c.key) for c in compares)
        found = [0 if key_value is None else key_value.mod_revision for key_value in current]
        if found != [c.mod_revision for c in compares]:
            return TxnResult(succeeded=False, revision=self.revision, current=current)
        self.revision += 1
        self._tell([self._write(write) for write in writes])
        return TxnResult(succeeded=True, revision=self.revision)

    def _write(self, write: Put | Delete) -> Event | None:
        before = self.keys.get(write.key)
        if isinstance(write, Delete):
            return None if before is None else self._delete(write.key)
        after = KeyValue(
            key=write.key,
            value=write.value,
            mod_revision=self.revision,
            create_revision=self.revision if before is None else before.create_revision,
            version=1 if before is None else before.version + 1,
            lease=write.lease,
        )
        if write.lease:
            self._leases[write.lease].keys.add(write.key)
        self.keys[write.key] = after
        self.on_change(before, after)
        return ("put", after)

    def _delete(self, key: str) -> Event:
        self.keys.pop(key)
        return ("delete", KeyValue(key, b"", self.revision, 0, 0, 0))

    def _tell(self, events: Sequence[Event | None]) -> None:
        kept = tuple(event for event in events if event is not None)
        self._watches = [watch for watch in self._watches if not watch.is_over]
        for watch in self._watches:
            watch.add(WatchBatch(revision=self.revision, events=kept))  # type: ignore[arg-type]

    # --- leases -----------------------------------------------------------------------------------

    def grant(self, ttl_seconds: int) -> int:
        number = next(self._numbers)
        ttl_ns = ttl_seconds * SECOND
        self._leases[number] = Lease(ttl_ns, self.kernel.now_ns + ttl_ns)
        return number

    def keep_alive(self, number: int) -> int:
        lease = self._leases.get(number)
        if lease is None:
            return 0
        lease.expires_ns = self.kernel.now_ns + lease.ttl_ns
        return lease.ttl_ns // SECOND

    def has_lease(self, number: int) -> bool:
        return number in self._leases

    def _expire(self) -> None:
        self.kernel.after(LEASE_CHECK_NS, self._expire)
        if not self.is_up:
            for lease in self._leases.values():  # a new leader gives every lease its time again
                lease.expires_ns = self.kernel.now_ns + lease.ttl_ns
            return
        for number, lease in list(self._leases.items()):
            if lease.expires_ns > self.kernel.now_ns:
                continue
            del self._leases[number]
            mine = [k for k in sorted(lease.keys) if k in self.keys]
            mine = [k for k in mine if self.keys[k].lease == number]
            if mine:
                self.happened["lease expired"] += 1
                self.revision += 1
                self._tell([self._delete(key) for key in mine])

    def watch(self, watcher: str) -> "Watch":
        watch = Watch(self, watcher)
        self._watches.append(watch)
        snapshot = tuple(self.keys.values())
        watch.add(WatchBatch(revision=self.revision, resynchronised=True, snapshot=snapshot))
        return watch


@dataclass(eq=False)
class Watch:
    """One watcher's stream, in order, with a delay of its own."""

    store: SimulatedStore
    watcher: str
    is_over: bool = False
    lag_ns: int = 0
    arrived: list[WatchBatch] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    _due_ns: int = 0

    def add(self, batch: WatchBatch) -> None:
        kernel = self.store.kernel
        delay_ns = kernel.between_ns(MS // 10, WATCH_NS_MAX if kernel.chance(0.1) else 2 * MS)
        self._due_ns = max(self._due_ns, kernel.now_ns + delay_ns + self.lag_ns)
        kernel.at(self._due_ns, lambda: self._arrive(batch))

    def _arrive(self, batch: WatchBatch) -> None:
        if self.is_over:
            return
        if not self.store.is_up or not self.store.network.passes(STORE, self.watcher):
            self.is_over = True  # the client notices, and begins again with everything
        else:
            self.arrived.append(batch)
        self.news.set()


class SimulatedEtcd:
    """What the controllers use of `EtcdClient`, for one controller."""

    def __init__(self, store: SimulatedStore, owner: str, loop: SimulatedLoop) -> None:
        self._store = store
        self._owner = owner
        self._loop = loop
        self.watch_lag_ns = 0
        self._watch_now: Watch | None = None

    async def get(self, key: str) -> KeyValue | None:
        return await self._request("get", lambda: self._store.keys.get(key))

    async def txn(self, compares: Sequence[Compare], writes: Sequence[Put | Delete]) -> TxnResult:
        def commit() -> TxnResult:
            for write in writes:
                lease = write.lease if isinstance(write, Put) else 0
                if lease and not self._store.has_lease(lease):
                    raise EtcdUnavailable("txn", maybe_applied=False, reasons={})
            return self._store.txn(compares, writes)

        is_record = any(w.key.startswith(f"{ROOT}{Kind.PROTECTIONS}/") for w in writes)
        return await self._request("txn", commit, harder=RECORDS_HARDER if is_record else 1.0)

    async def lease_grant(self, ttl_seconds: int) -> int:
        return await self._request("grant", lambda: self._store.grant(ttl_seconds))

    async def lease_keep_alive(self, lease_id: int) -> int:
        return await self._request("keep alive", lambda: self._store.keep_alive(lease_id))

    def lag(self, lag_ns: int) -> None:
        """Have the watch run behind from now on."""
        self.watch_lag_ns = lag_ns
        if self._watch_now is not None:
            self._watch_now.lag_ns = lag_ns

    async def watch(self, prefix: str, *, from_revision: int) -> AsyncGenerator[WatchBatch, None]:
        assert prefix
        assert from_revision == 0
        while True:
            watch = await self._request("watch", lambda: self._store.watch(self._owner))
            self._watch_now = watch
            watch.lag_ns = self.watch_lag_ns
            while not watch.is_over or watch.arrived:
                if not watch.arrived:
                    watch.news.clear()
                    await watch.news.wait()
                    continue
                batches, watch.arrived = watch.arrived, []
                for batch in batches:
                    yield batch
            await asyncio.sleep(0.2)

    async def _request(self, what: str, do: Callable[[], Answer], *, harder: float = 1.0) -> Answer:
        """Go there, have it done, come back; each of the three can fail."""
        store = self._store
        await asyncio.sleep(store.network.latency_ns(self._owner, STORE) / 1e9)
        is_lost = store.kernel.chance(store.timeouts * harder)
        is_lost_before = is_lost and store.kernel.chance(0.5)
        if is_lost_before or not store.is_up or not store.network.passes(self._owner, STORE):
            await self._give_up(what, maybe_applied=False)
        answer = do()
        if is_lost or not store.network.passes(STORE, self._owner):
            await self._give_up(what, maybe_applied=True)
        await asyncio.sleep(store.network.latency_ns(STORE, self._owner) / 1e9)
        return answer

    async def _give_up(self, what: str, *, maybe_applied: bool) -> NoReturn:
        if what == "txn":
            kind = "done" if maybe_applied else "not done"
            self._store.happened[f"store timeout, {kind}"] += 1
        await asyncio.sleep(self._store.kernel.between_ns(REQUEST_NS_MIN, REQUEST_NS_MAX) / 1e9)
        # The caller never knows: the real client says `maybe_applied` after every timeout.
        raise EtcdUnavailable(what, maybe_applied=True, reasons={STORE: "no answer in time"})
