"""What a controller does by itself: follow the store, plan, prune. Needs an event loop and etcd.

Five tasks, each surviving an outage of the store:

- `follow` keeps the world current by one watch;
- `probe` writes a key every second and waits until the watch shows it: only then is the world in
  memory current, which is what `/readyz` says. A store whose quota is used up takes no key; then
  the last one is read instead, and `/readyz` says what is wrong while everything is readable;
- `plan` takes a snapshot whenever something the planner looks at has changed, and every interval,
  plans from it in a thread, and carries the plan out, if this controller leads;
- `leadership` campaigns for that (`leadership.py`);
- `collecting` keeps collections of garbage short (`collecting.py`).

Planning and carrying out are idempotent, so two controllers may do it at once: compare-and-swap
lets each step happen once. A leader saves the others the work.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing

from holdfast_api.errors import Unavailable
from holdfast_controller.adapters.etcd import EtcdClient, EtcdOutOfSpace, EtcdRefused, WatchBatch
from holdfast_controller.adapters.keys import ROOT
from holdfast_controller.adapters.store import undecided_when_unavailable
from holdfast_controller.collecting import Collecting
from holdfast_controller.control import Control
from holdfast_controller.core.planner import plan
from holdfast_controller.executor import execute
from holdfast_controller.leadership import Leadership

logger = logging.getLogger(__name__)

PROBE_SECONDS = 1.0
REFUSED_PAUSE_SECONDS = 5.0
PASS_DISTANCE_SECONDS = 0.02
"""Shortest distance of two passes: changes that come together are planned for together."""
RESTS_PER_PASS = 4
"""A pass takes the interpreter from all requests: it gets a fifth of the time at most."""
PRUNED_PER_PASS = 1000
APPLY_SECONDS_MAX = 0.01
"""So long requests wait for news of the store at most, before news waits for requests."""
FOLLOW_SECONDS_MAX = 2.0
"""A write that the watch has not shown after so long: the world is not current."""
HISTORY_KEPT = 10_000
"""Revisions that the store keeps for watches that were away for a moment."""


class Loop:
    """The tasks of one controller."""

    def __init__(
        self,
        control: Control,
        etcd: EtcdClient,
        leadership: Leadership,
        *,
        interval_seconds: float,
        events_kept: int,
    ) -> None:
        """Work for `control`; `etcd` stays the caller's. Runs `leadership`."""
        self._control = control
        self._etcd = etcd
        self._leadership = leadership
        self._interval_seconds = interval_seconds
        self._events_kept = events_kept
        self._compacted = 0

    async def run(self) -> None:
        """Run until cancelled. A task that fails ends all, and with it the process."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow(), name="follow")
            group.create_task(self._probe(), name="probe")
            group.create_task(self._plan(), name="plan")
            group.create_task(self._leadership.run(), name="leadership")
            group.create_task(Collecting().run(), name="collecting")

    async def _follow(self) -> None:
        while True:
            try:
                async with aclosing(self._etcd.watch(ROOT, from_revision=0)) as batches:
                    await self._apply(batches)
            except EtcdRefused as error:
                logger.error("%s; trying again", error)  # noqa: TRY400 - says all there is
            await asyncio.sleep(REFUSED_PAUSE_SECONDS)

    async def _apply(self, batches: AsyncIterator[WatchBatch]) -> None:
        """Take batches in; many that wait let others have their turn in between."""
        rested = time.monotonic()
        async for batch in batches:
            self._control.world.apply(batch)
            if time.monotonic() - rested > APPLY_SECONDS_MAX:
                await asyncio.sleep(0)
                rested = time.monotonic()

    async def _probe(self) -> None:
        world = self._control.world
        while True:
            try:
                revision = await self._probed_revision()
            except Unavailable as error:
                logger.debug("probe: %s", error)
                world.set_live(live=False)
            else:
                seen = await world.reached(revision, timeout_seconds=FOLLOW_SECONDS_MAX)
                world.set_live(live=seen)
            await asyncio.sleep(PROBE_SECONDS if world.live else PROBE_SECONDS / 5)

    async def _probed_revision(self) -> int:
        """Return the revision that a current world knows. Raises Unavailable."""
        store = self._control.store
        try:
            revision = await store.probe()
        except Unavailable as error:
            if not isinstance(error.__cause__, EtcdOutOfSpace):
                raise
            self._note_fault("etcd's quota is used up: compact, defragment, then disarm the alarm")
            # What can still happen in the store are deletions, which no key shows. The watch asks
            # for a sign of life by itself.
            return await store.last_probe()
        self._note_fault("")
        return revision

    def _note_fault(self, fault: str) -> None:
        if fault != self._control.store_fault:
            logger.warning(fault or "the store takes writes again")
        self._control.store_fault = fault

    async def _plan(self) -> None:
        world = self._control.world
        while True:
            await self._leadership.won()
            seen = world.planner_changes
            began = time.monotonic()
            if world.live and self._leadership.leads():
                await self._pass_in_a_net()
            # Where much changes all the time, claims are to be decided, too.
            took_seconds = time.monotonic() - began
            rest_seconds = max(PASS_DISTANCE_SECONDS, RESTS_PER_PASS * took_seconds)
            await asyncio.sleep(min(rest_seconds, self._interval_seconds))
            await world.planner_change(seen, self._interval_seconds)

    async def _pass_in_a_net(self) -> None:
        try:
            await self._pass()
        except Unavailable as error:
            logger.info("a plan was left unfinished: %s", error)
        except Exception:  # an outermost net: a broken planner must not keep claims undecided
            logger.exception("the planner failed; claims and requests are answered all the same")
            await asyncio.sleep(self._interval_seconds)

    async def _pass(self) -> None:
        """Plan once, carry it out, and keep the store's history short."""
        control = self._control
        planned = await asyncio.to_thread(plan, control.world.snapshot())
        control.metrics.planner_passes.inc()
        if not control.store_fault:
            leads = self._leadership.leads
            done = await execute(control.store, planned, control.metrics, may_go_on=leads)
            if done:
                logger.info("planned at revision %d: %s", planned.revision, "; ".join(done))
        await self._prune()

    async def _prune(self) -> None:
        """Remove old events and old history; a store without space takes that, too."""
        control = self._control
        if not self._leadership.leads():
            return
        surplus = control.world.events.surplus(self._events_kept)
        await control.store.remove_events(surplus[:PRUNED_PER_PASS])
        await self._compact(control.world.revision)

    async def _compact(self, revision: int) -> None:
        """Let the store forget old history; every heartbeat adds to it, and nobody reads it."""
        if revision - self._compacted < 2 * HISTORY_KEPT:
            return
        self._compacted = revision - HISTORY_KEPT
        with undecided_when_unavailable():
            await self._etcd.compact(self._compacted)
