"""Speaks with the controllers for this host: heartbeats, assignments, claims, reports, events.

Touches HTTP through `AgentClient`. Two loops run for the agent's whole life: heartbeats, and a long
poll for assignments. Both hand the full set of assignments on. What is put into the outbox is sent
until a controller has answered; an answer that refuses ends it as well, since repeating would not
help.

The host looks at itself in a fixed rhythm of its own, and tells the controllers when something has
changed, otherwise as often as they ask for: of a thousand hosts, none beats every second. While no
controller answers, polls are tried again ever less often, and each host's at a time of its own: a
control plane that comes back must not find all hosts at its door. A heartbeat carries the orders as
well, so none of them waits for a poll for long.
"""

import asyncio
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable

from holdfast_api.client import AgentClient
from holdfast_api.errors import Refused, Unavailable
from holdfast_api.messages import (
    Assignment,
    Assignments,
    Claim,
    ClaimVerdict,
    EventReport,
    Heartbeat,
    ReleasedReport,
    SeededReport,
    SeedingFailedReport,
)
from holdfast_api.words import Generation, HostId, VmId

LOGGER = logging.getLogger(__name__)
EVENT_LIMIT = 1024
RETRY_SECONDS = 0.5
RETRY_SECONDS_MAX = 5.0
POLL_MS = 20_000

Apply = Callable[[tuple[Assignment, ...]], Awaitable[None]]


def _nothing() -> None:
    """Do nothing when a report was noted that nobody waits for."""


class Outbox:
    """What this host has to say; everything here returns at once and is sent in the background."""

    def __init__(self, client: AgentClient, host: HostId) -> None:
        """Use `client` for everything; `close` ends what is still under way."""
        self._client = client
        self._host = host
        self._reports: dict[tuple[str, VmId, Generation], asyncio.Task[None]] = {}
        self._events: deque[EventReport] = deque(maxlen=EVENT_LIMIT)
        self._event_sender: asyncio.Task[None] | None = None
        self.beat = asyncio.Event()
        self.position = 0
        """Position of the newest orders that are carried out."""

    def beat_now(self) -> None:
        """Send a heartbeat soon; something changed."""
        self.beat.set()

    def seeded(self, vm: VmId, generation: Generation, noted: Callable[[], None]) -> None:
        """Report that the first checkpoint is acknowledged; calls `noted` when that is known."""
        report = SeededReport(vm=vm, generation=generation, host=self._host)
        self._report("seeded", vm, generation, lambda: self._client.seeded(report), noted)

    def released(self, vm: VmId, generation: Generation) -> None:
        """Report that everything of the protection is taken out."""
        report = ReleasedReport(vm=vm, generation=generation, host=self._host)
        self._report("released", vm, generation, lambda: self._client.released(report), _nothing)

    def seeding_failed(
        self,
        vm: VmId,
        generation: Generation,
        reason: str,
        noted: Callable[[], None] = _nothing,
    ) -> None:
        """Report that the backup could not be filled; calls `noted` when that is known."""
        report = SeedingFailedReport(
            vm=vm, generation=generation, host=self._host, reason=reason[:1024]
        )
        self._report(
            "seeding-failed", vm, generation, lambda: self._client.seeding_failed(report), noted
        )

    def event(self, event: EventReport) -> None:
        """Have something remembered; the oldest is dropped when a thousand wait."""
        self._events.append(event)
        if self._event_sender is None or self._event_sender.done():
            self._event_sender = asyncio.create_task(self._send_events())

    async def claim(self, claim: Claim) -> ClaimVerdict:
        """Ask until the claim is decided (INV-5); only cancelling ends it earlier."""
        return await self._client.claim(claim)

    async def close(self) -> None:
        """End everything that is under way."""
        tasks = [*self._reports.values()]
        if self._event_sender is not None:
            tasks.append(self._event_sender)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _report(
        self,
        what: str,
        vm: VmId,
        generation: Generation,
        send: Callable[[], Awaitable[object]],
        noted: Callable[[], None],
    ) -> None:
        key = (what, vm, generation)
        if key not in self._reports:
            task = asyncio.create_task(self._send_until_answered(what, vm, send, noted))
            self._reports[key] = task
            task.add_done_callback(lambda _: self._reports.pop(key, None))

    async def _send_until_answered(
        self,
        what: str,
        vm: VmId,
        send: Callable[[], Awaitable[object]],
        noted: Callable[[], None],
    ) -> None:
        while True:
            try:
                await send()
            except Unavailable:
                await asyncio.sleep(RETRY_SECONDS)
            except Refused as refusal:
                LOGGER.warning("%s of %s was refused: %s", what, vm, refusal)
                break
            else:
                break
        noted()
        self.beat_now()

    async def _send_events(self) -> None:
        while self._events:
            try:
                await self._client.event(self._events[0])
            except Unavailable:
                await asyncio.sleep(RETRY_SECONDS)
                continue
            except Refused as refusal:
                LOGGER.warning("an event was refused: %s", refusal)
            if self._events:
                self._events.popleft()


class _Orders:
    """Carries out answers beside the heartbeats, one at a time.

    It may take seconds (a worker starts on a busy host), and a host that keeps silent meanwhile is
    given up. An answer that comes before the last one is done is left alone: the next one says it
    all again.
    """

    def __init__(self, apply: Apply, outbox: Outbox) -> None:
        self._apply = apply
        self._outbox = outbox
        self._task: asyncio.Task[None] | None = None

    def take(self, answer: Assignments) -> None:
        """Begin with an answer, unless one is being carried out; raises what ended the last one."""
        if self._task is not None:
            if not self._task.done():
                return
            self._task.result()
        self._task = asyncio.create_task(self._carry_out(answer))

    def close(self) -> None:
        """End what is being done."""
        if self._task is not None:
            self._task.cancel()

    async def _carry_out(self, answer: Assignments) -> None:
        await self._apply(answer.assignments)
        self._outbox.position = answer.position


class _Rhythm:
    """When a heartbeat is to be sent that nobody on this host asked for."""

    def __init__(self, interval_seconds: float, share: Callable[[], float]) -> None:
        """`interval_seconds` is the host's own rhythm, and its first distance after a failure."""
        self._interval_seconds = interval_seconds
        self._share = share
        self._now_seconds = asyncio.get_running_loop().time
        self._beat_seconds = 0.0
        self._retry_seconds = interval_seconds
        self._due_seconds = self._now_seconds()
        self._told: Heartbeat | None = None

    def wants(self, heartbeat: Heartbeat) -> bool:
        """Whether to send it now: it is time, or something happened since the last answered one."""
        if self._now_seconds() >= self._due_seconds:
            return True
        told = self._told
        return told is not None and told.without_figures() != heartbeat.without_figures()

    def answered(self, heartbeat: Heartbeat, beat_seconds: float) -> None:
        """Note what the controllers know now, and when they want the next one.

        Up to a tenth earlier than that: hosts that were told something at the same moment must not
        beat at the same moment for ever.
        """
        self._told = heartbeat
        self._beat_seconds = beat_seconds
        self._due_seconds = self._now_seconds() + beat_seconds * (1 - self._share() / 10)
        self._retry_seconds = self._interval_seconds

    def failed(self) -> None:
        """Try again, ever less often: those who do not answer may have too much to do."""
        self._told = None
        self._due_seconds = self._now_seconds() + self._retry_seconds
        slowest_seconds = max(self._beat_seconds, RETRY_SECONDS_MAX, self._interval_seconds)
        self._retry_seconds = min(2 * self._retry_seconds, slowest_seconds)


async def keep_beating(
    client: AgentClient,
    outbox: Outbox,
    make: Callable[[], Awaitable[Heartbeat]],
    apply: Apply,
    interval_seconds: float,
    *,
    share: Callable[[], float] = random.random,
) -> None:
    """Send heartbeats for ever and apply what they answer, without waiting for that.

    `make` is called every `interval_seconds`. What it makes is sent when it says more than figures
    do, when the controllers want it, and after `Outbox.beat_now`. `share` is anything from 0 to 1.
    """
    silent = False
    orders = _Orders(apply, outbox)
    rhythm = _Rhythm(interval_seconds, share)
    try:
        while True:
            is_wanted = outbox.beat.is_set()
            outbox.beat.clear()
            heartbeat = await make()
            if is_wanted or rhythm.wants(heartbeat):
                try:
                    answer = await client.heartbeat(heartbeat)
                except (Unavailable, Refused) as error:
                    rhythm.failed()
                    if not silent:
                        LOGGER.warning("no controller takes our heartbeat: %s", error)
                    silent = True
                else:
                    if silent:
                        LOGGER.warning("a controller answers again")
                    silent = False
                    rhythm.answered(heartbeat, answer.beat_seconds)
                    orders.take(answer)
            await _pause(outbox, interval_seconds)
    finally:
        orders.close()


async def _pause(outbox: Outbox, interval_seconds: float) -> None:
    """Wait for the next heartbeat's time, or until something has changed."""
    try:
        async with asyncio.timeout(interval_seconds):
            await outbox.beat.wait()
    except TimeoutError:
        return
    await asyncio.sleep(0.02)  # what changes together is told together


async def keep_polling(
    client: AgentClient,
    outbox: Outbox,
    apply: Apply,
    *,
    share: Callable[[], float] = random.random,
) -> None:
    """Wait for newer assignments for ever and apply them. `share` is anything from 0 to 1."""
    position = 0
    retry_seconds = RETRY_SECONDS
    while True:
        try:
            answer = await client.assignments(position, POLL_MS)
        except (Unavailable, Refused):
            await asyncio.sleep(retry_seconds * (0.5 + share() / 2))
            retry_seconds = min(2 * retry_seconds, RETRY_SECONDS_MAX)
            position = 0
            continue
        retry_seconds = RETRY_SECONDS
        if answer.position != position:
            position = answer.position
            await apply(answer.assignments)
            outbox.position = max(outbox.position, position)
