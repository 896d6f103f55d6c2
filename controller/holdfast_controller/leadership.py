"""Which of several controllers plans and prunes: the one that holds a lease in etcd. Talks etcd.

One key, created under a lease, if it does not exist: who has written it leads. The others watch it
and try when it vanishes, at once when the leader resigned, after the lease's time when it died.

The leader renews the lease, looks that the key is still its own, and believes in it only as long as
`core.tenure` allows: without an answer from etcd it stops before another can be elected, also when
the process itself was stopped meanwhile. A controller that does not follow the store neither
campaigns nor renews: it would lead and not plan.

This saves work and noise, no more. Every step of a plan is one compare-and-swap, so two leaders
at once do each step once (a step that was sent before the tenure ended may arrive after it). Claims
are not a leader's business: every replica decides them.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from contextlib import aclosing

from holdfast_controller.adapters.etcd import (
    EtcdClient,
    EtcdError,
    EtcdRefused,
    EtcdUnavailable,
    Put,
    WatchBatch,
    absent,
)
from holdfast_controller.adapters.keys import ROOT
from holdfast_controller.core.tenure import Tenure

logger = logging.getLogger(__name__)

KEY = f"{ROOT}leader"
PAUSE_SECONDS = 0.2
"""After a failure: short against the lease, long against a spin."""
RESIGN_SECONDS_MAX = 1.0
"""For giving the lease back; without an answer it ends by itself."""


def _uptime_seconds() -> float:
    """Return a clock that also counts while the machine is suspended; a lease does too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Leadership:
    """One controller's part in the election. `run` campaigns, leads, and campaigns again."""

    def __init__(
        self,
        etcd: EtcdClient,
        *,
        name: str,
        ttl_seconds: int,
        fit: Callable[[], bool],
        now_seconds: Callable[[], float] = _uptime_seconds,
    ) -> None:
        """Use `etcd`, which stays the caller's.

        `name` is for people who look into the store. `fit` says whether we could plan.
        """
        self._etcd = etcd
        self._name = name
        self._ttl_seconds = ttl_seconds
        self._fit = fit
        self._now_seconds = now_seconds
        self._tenure: Tenure | None = None
        self._lease = 0
        self._won = asyncio.Event()
        self._resigned = asyncio.Event()

    def leads(self) -> bool:
        """Whether we lead at this very moment. Ask before each step, and not ahead of time."""
        return (
            self._tenure is not None
            and not self._resigned.is_set()
            and self._tenure.holds(self._now_seconds())
        )

    async def won(self) -> None:
        """Wait until an election is won; returns at once in a term that was not given up."""
        await self._won.wait()

    def resign(self) -> None:
        """Lead no more, from now on and for good; `run` gives the lease back and returns."""
        self._resigned.set()

    async def run(self) -> None:
        """Campaign and lead until `resign` or cancelled; leaves no lease behind if etcd answers."""
        terms = asyncio.create_task(self._terms(), name="terms of leadership")
        resigned = asyncio.create_task(self._resigned.wait(), name="resignation")
        try:
            await asyncio.wait([terms, resigned], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (terms, resigned):
                task.cancel()
            await asyncio.wait([terms, resigned])
            await self._give_up()
        if not terms.cancelled():
            terms.result()

    async def _terms(self) -> None:
        while True:
            try:
                if self._fit():
                    await self._vacancy()
                    await self._one_term()
            except (EtcdUnavailable, EtcdRefused) as error:
                logger.info("no leader could be elected: %s", error)
            await asyncio.sleep(PAUSE_SECONDS)

    async def _one_term(self) -> None:
        try:
            if await self._win():
                logger.info("%s leads", self._name)
                await self._serve()
                logger.info("%s leads no more", self._name)
        finally:
            await self._give_up()

    async def _vacancy(self) -> None:
        """Return when nobody leads as far as is known, and now and then in any case."""
        with contextlib.suppress(TimeoutError):
            async with (
                asyncio.timeout(self._ttl_seconds),
                aclosing(self._etcd.watch(KEY, from_revision=0)) as batches,
            ):
                async for batch in batches:
                    if _is_vacant_after(batch):
                        return

    async def _win(self) -> bool:
        """Try to become leader; says whether we did."""
        if await self._etcd.get(KEY) is not None:
            return False
        asked_at_seconds = self._now_seconds()
        self._lease = await self._etcd.lease_grant(self._ttl_seconds)
        # If the outcome is unknown this raises, and our lease is revoked with whatever it holds.
        result = await self._etcd.txn([absent(KEY)], [Put(KEY, self._name.encode(), self._lease)])
        if not result.succeeded:
            return False
        self._tenure = Tenure(asked_at_seconds, self._ttl_seconds)
        self._won.set()
        return True

    async def _serve(self) -> None:
        """Renew until the lease is lost, or may be."""
        while self.leads():
            assert self._tenure is not None
            wait_seconds = self._tenure.renew_at_seconds - self._now_seconds()
            await asyncio.sleep(max(PAUSE_SECONDS, wait_seconds))
            if not self._fit():
                continue
            try:
                if not await self._renew(self._tenure):
                    logger.warning("the lease on leadership is lost")
                    return
            except (EtcdUnavailable, EtcdRefused, TimeoutError) as error:
                logger.info("leadership is not renewed: %s", str(error) or "no answer in time")

    async def _renew(self, tenure: Tenure) -> bool:
        """Renew the lease; False: it is gone, or the key is not ours any more.

        Raises TimeoutError at the end of the tenure, and the client's errors.
        """
        asked_at_seconds = self._now_seconds()
        async with asyncio.timeout(max(0.0, tenure.ends_at_seconds - asked_at_seconds)):
            if not await self._etcd.lease_keep_alive(self._lease):
                return False
            # Also because a deposed member of etcd may renew a lease, but can not answer this.
            found = await self._etcd.get(KEY)
        if found is None or found.lease != self._lease:
            return False
        self._tenure = Tenure(asked_at_seconds, self._ttl_seconds)
        return True

    async def _give_up(self) -> None:
        """Lead no more, then give the lease back if there is one."""
        self._tenure = None
        self._won.clear()
        lease, self._lease = self._lease, 0
        if not lease:
            return
        try:
            async with asyncio.timeout(RESIGN_SECONDS_MAX):
                await self._etcd.lease_revoke(lease)
        except (EtcdError, TimeoutError) as error:
            logger.info("the lease ends by itself: %s", str(error) or "no answer in time")


def _is_vacant_after(batch: WatchBatch) -> bool:
    if batch.resynchronised:
        return all(key_value.key != KEY for key_value in batch.snapshot)
    kinds = [kind for kind, key_value in batch.events if key_value.key == KEY]
    return bool(kinds) and kinds[-1] == "delete"
