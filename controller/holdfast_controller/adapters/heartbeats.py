"""Heartbeats in etcd, each under the lease of its host: who lives is what has a key.

Talks to etcd. The lease's id is kept where every controller sees it: in the heartbeat's own key.
So any replica can hear a host's next heartbeat and keep the same lease alive; when there is none,
or it has expired meanwhile (and the key with it, so that the write's condition fails), a new one is
granted. Of two leases that two controllers granted at the same moment, one expires unused. One that
is too short for the rhythm in which the host is asked to beat (`core.rhythm`) is replaced, too.

Most of what hosts say is what they said before. So a heartbeat that adds nothing keeps its lease
alive and is not written: every write is one more for all members of etcd, and one more to read for
all controllers. Figures that move all the time (free memory, counters of workers) are written when
the last ones are old.

Writes are compare-and-swaps here too: a write whose outcome was unknown may be applied late, and
must not then replace what the host said after it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from holdfast_api.errors import Unavailable
from holdfast_api.messages import Heartbeat
from holdfast_api.words import HostId
from holdfast_controller.adapters.etcd import EtcdClient, KeyValue, Put
from holdfast_controller.adapters.keys import Kind, encode, key_of
from holdfast_controller.adapters.store import compare, undecided_when_unavailable

ATTEMPTS_MAX = 4


@dataclass(frozen=True)
class Known:
    """The present heartbeat of a host as far as is known; zeros: there is none."""

    revision: int = 0
    lease: int = 0
    said: Heartbeat | None = None
    """None: what it says has to be written, whatever it is."""
    at_seconds: float = 0.0
    """When it became known here, by this process's own clock."""


class Rhythm(Protocol):
    """What `core.rhythm` grants a host."""

    @property
    def lease_seconds(self) -> int:
        """What a new lease is made for."""

    @property
    def lease_seconds_min(self) -> int:
        """A lease that is shorter than this is replaced."""

    @property
    def figures_seconds(self) -> float:
        """Figures that were written longer ago are written again."""


class Heartbeats:
    """Writes heartbeats so that they vanish by themselves when a host falls silent."""

    def __init__(
        self,
        etcd: EtcdClient,
        *,
        now_seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        """Work on `etcd`, which stays the caller's; `now_seconds` is `Known.at_seconds`' clock."""
        self._etcd = etcd
        self._now_seconds = now_seconds

    async def hear(self, host: HostId, heartbeat: Heartbeat, known: Known, rhythm: Rhythm) -> int:
        """Store what `host` says; returns the revision that shows it. Raises Unavailable."""
        with undecided_when_unavailable():
            for _ in range(ATTEMPTS_MAX):
                lease = await self._lease(known, rhythm)
                if lease == known.lease and self._adds_nothing(known, heartbeat, rhythm):
                    return known.revision
                written = await self._put(host, encode(heartbeat), Known(known.revision, lease))
                if isinstance(written, int):
                    return written
                known = written
        raise Unavailable("store-unavailable", f"the heartbeat of {host} changes all the time")

    def _adds_nothing(self, known: Known, heartbeat: Heartbeat, rhythm: Rhythm) -> bool:
        return (
            known.said is not None
            and self._now_seconds() - known.at_seconds < rhythm.figures_seconds
            and known.said.without_figures() == heartbeat.without_figures()
        )

    async def _lease(self, known: Known, rhythm: Rhythm) -> int:
        """Return a lease with its whole time ahead of it: the known one, or a new one."""
        if known.lease:
            kept_seconds = await self._etcd.lease_keep_alive(known.lease)
            if kept_seconds >= rhythm.lease_seconds_min:
                return known.lease
        return await self._etcd.lease_grant(rhythm.lease_seconds)

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
