"""Heartbeats in etcd, each under the lease of its host: who lives is what has a key.

Talks to etcd. The lease's id is kept where every controller sees it: in the heartbeat's own key.
So any replica can hear a host's next heartbeat and keep the same lease alive; when there is none,
or it has expired meanwhile (and the key with it, so that the write's condition fails), a new one is
granted. Of two leases that two controllers granted at the same moment, one expires unused.

Hosts beat every second, and most of what they say is what they said before. So a heartbeat that
adds nothing keeps its lease alive and is not written: every write is one more for all members of
etcd, and one more to read for all controllers. Figures that move all the time (free memory,
counters of workers) are written when the last ones are `FIGURES_SECONDS` old.

Writes are compare-and-swaps here too: a write whose outcome was unknown may be applied late, and
must not then replace what the host said after it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from holdfast_api.errors import Unavailable
from holdfast_api.messages import Heartbeat
from holdfast_api.records import HostFacts, WorkerReport
from holdfast_api.words import HostId
from holdfast_controller.adapters.etcd import EtcdClient, KeyValue, Put
from holdfast_controller.adapters.keys import Kind, encode, key_of
from holdfast_controller.adapters.store import compare, undecided_when_unavailable

ATTEMPTS_MAX = 4
FIGURES_SECONDS = 3.0


@dataclass(frozen=True)
class Known:
    """The present heartbeat of a host as far as is known; zeros: there is none."""

    revision: int = 0
    lease: int = 0
    said: Heartbeat | None = None
    """None: what it says has to be written, whatever it is."""
    at_seconds: float = 0.0
    """When it became known here, by this process's own clock."""


class Heartbeats:
    """Writes heartbeats so that they vanish by themselves when a host falls silent."""

    def __init__(
        self,
        etcd: EtcdClient,
        *,
        ttl_seconds: int,
        now_seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        """Work on `etcd`, which stays the caller's; a host is silent after `ttl_seconds`.

        `now_seconds` is the clock of `Known.at_seconds`.
        """
        self._etcd = etcd
        self._ttl_seconds = ttl_seconds
        self._now_seconds = now_seconds

    async def hear(self, host: HostId, heartbeat: Heartbeat, known: Known) -> int:
        """Store what `host` says; returns the revision that shows it. Raises Unavailable."""
        with undecided_when_unavailable():
            if self._adds_nothing(known, heartbeat) and await self._etcd.lease_keep_alive(
                known.lease
            ):
                return known.revision
            value = encode(heartbeat)
            for _ in range(ATTEMPTS_MAX):
                lease = await self._lease(known)
                written = await self._put(host, value, Known(known.revision, lease))
                if isinstance(written, int):
                    return written
                known = written
        raise Unavailable("store-unavailable", f"the heartbeat of {host} changes all the time")

    def _adds_nothing(self, known: Known, heartbeat: Heartbeat) -> bool:
        return (
            known.said is not None
            and self._now_seconds() - known.at_seconds < FIGURES_SECONDS
            and _without_figures(known.said) == _without_figures(heartbeat)
        )

    async def _lease(self, known: Known) -> int:
        """Return a lease with its whole time ahead of it: the known one, or a new one."""
        if known.lease and await self._etcd.lease_keep_alive(known.lease):
            return known.lease
        return await self._etcd.lease_grant(self._ttl_seconds)

    async def _put(self, host: HostId, value: bytes, known: Known) -> int | Known:
        """Write the key and return its revision; else what is there instead."""
        key = key_of(Kind.HEARTBEATS, host)
        result = await self._etcd.txn(
            [compare(key, known.revision)], [Put(key, value, known.lease)]
        )
        if result.succeeded:
            return result.revision
        return known_of(result.current[0])


def known_of(found: KeyValue | None) -> Known:
    """Return what the next heartbeat must know of the present one."""
    return Known() if found is None else Known(found.mod_revision, found.lease)


def _without_figures(heartbeat: Heartbeat) -> tuple[object, ...]:
    """Return all of a heartbeat but what moves all the time."""
    return (
        heartbeat.position,
        still_facts(heartbeat.facts),
        heartbeat.vms,
        heartbeat.holdings,
        tuple(_standing(report) for report in heartbeat.workers),
    )


def still_facts(facts: HostFacts) -> HostFacts:
    """Return the facts without what moves all the time."""
    return facts.model_copy(update={"memory_available_bytes": 0})


def _standing(report: WorkerReport) -> tuple[object, ...]:
    """Return where a worker stands; how far seeding is counts, somebody waits for it."""
    return (
        *(report.vm, report.generation, report.role, report.phase, report.detail),
        *(report.tracker, report.plug, report.seeding),
    )
