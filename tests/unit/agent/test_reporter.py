"""The rhythm of heartbeats, whatever else the agent is busy with."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest
from tests.unit.agent.agents import NOBODY, until

from holdfast_agent.host.reporter import RETRY_SECONDS_MAX, Outbox, keep_beating, keep_polling
from holdfast_api.client import AgentClient
from holdfast_api.errors import Unavailable
from holdfast_api.messages import Assignment, Assignments, Heartbeat, HeartbeatAnswer
from holdfast_api.records import HostFacts
from holdfast_controller.http.agents import WAIT_MS_MAX

FACTS = HostFacts(
    peer_address="h1:7701",
    memory_total_bytes=1,
    memory_available_bytes=1,
    qemu_version="7.2.22",
    agent_version="0.1.0",
)


class Answering(AgentClient):
    """A controller that has newer orders in each answer."""

    def __init__(self) -> None:
        super().__init__((NOBODY,), "h1")
        self.heard: list[Heartbeat] = []

    async def heartbeat(self, heartbeat: Heartbeat) -> HeartbeatAnswer:
        self.heard.append(heartbeat)
        return HeartbeatAnswer(position=len(self.heard), assignments=())


def beat(scene: Callable[[Answering, Outbox, asyncio.Event], Awaitable[None]]) -> None:
    """Let a host beat whose orders are carried out when the event is set."""

    async def whole() -> None:
        async with Answering() as client:
            outbox, carried_out = Outbox(client, "h1"), asyncio.Event()

            async def make() -> Heartbeat:
                return Heartbeat(facts=FACTS, position=outbox.position)

            async def apply(assignments: tuple[Assignment, ...]) -> None:
                del assignments
                await carried_out.wait()

            beating = asyncio.create_task(keep_beating(client, outbox, make, apply, 0.001))
            try:
                await scene(client, outbox, carried_out)
            finally:
                beating.cancel()
                await asyncio.gather(beating, return_exceptions=True)

    asyncio.run(whole())


def test_a_host_that_carries_out_orders_for_long_goes_on_beating() -> None:
    async def scene(client: Answering, outbox: Outbox, carried_out: asyncio.Event) -> None:
        del outbox, carried_out
        await until(lambda: len(client.heard) >= 5)

    beat(scene)


def test_a_heartbeat_knows_of_no_orders_that_are_still_being_carried_out() -> None:
    async def scene(client: Answering, outbox: Outbox, carried_out: asyncio.Event) -> None:
        await until(lambda: len(client.heard) >= 5)
        assert {heartbeat.position for heartbeat in client.heard} == {0}
        carried_out.set()
        await until(lambda: outbox.position > 1)
        positions: list[Any] = [heartbeat.position for heartbeat in client.heard]
        assert positions == sorted(positions), "what is known is not forgotten again"
        assert all(position <= number for number, position in enumerate(positions))

    beat(scene)


class HostAsItIs:
    """What an agent sees of its host."""

    def __init__(self) -> None:
        self.facts = FACTS
        self.looks = 0

    async def look(self) -> Heartbeat:
        self.looks += 1
        return Heartbeat(facts=self.facts)


class Slowing(AgentClient):
    """A controller that wants to hear every minute, and whose polls and beats fail if told so."""

    def __init__(self) -> None:
        super().__init__((NOBODY,), "h1")
        self.heard: list[tuple[float, Heartbeat]] = []
        self.polled: list[float] = []
        self.answers = True

    async def heartbeat(self, heartbeat: Heartbeat) -> HeartbeatAnswer:
        self.heard.append((asyncio.get_running_loop().time(), heartbeat))
        if not self.answers:
            raise Unavailable("no-controller", "as asked")
        return HeartbeatAnswer(position=0, assignments=(), beat_seconds=60)

    async def assignments(self, after: int, wait_ms: int) -> Assignments:
        assert after == 0
        assert wait_ms <= WAIT_MS_MAX
        self.polled.append(asyncio.get_running_loop().time())
        raise Unavailable("no-controller", "as asked")


class OwnTime(asyncio.SelectorEventLoop):
    """An event loop whose time passes at once when there is nothing to do but wait."""

    passed_seconds = 0.0

    def time(self) -> float:
        return self.passed_seconds

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self.passed_seconds = max(self.time(), self._scheduled[0].when())  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


def in_own_time(
    scene: Callable[[Slowing, Outbox, HostAsItIs], Awaitable[None]], share: float = 0.0
) -> None:
    """Run a scene in which a host beats to one controller and looks at itself each second."""

    async def whole() -> None:
        async with Slowing() as client:
            outbox, host = Outbox(client, "h1"), HostAsItIs()

            async def apply(assignments: tuple[Assignment, ...]) -> None:
                assert assignments == ()

            beating = asyncio.create_task(
                keep_beating(client, outbox, host.look, apply, 1.0, share=lambda: share)
            )
            try:
                await scene(client, outbox, host)
            finally:
                beating.cancel()
                await asyncio.gather(beating, return_exceptions=True)

    with asyncio.Runner(loop_factory=OwnTime) as runner:
        runner.run(whole())


def test_a_host_beats_as_often_as_the_controllers_want_and_at_once_when_something_happened() -> (
    None
):
    async def scene(client: Slowing, outbox: Outbox, host: HostAsItIs) -> None:
        await asyncio.sleep(59.5)
        assert [round(at) for at, _ in client.heard] == [0]
        assert host.looks == 60, "it looks at itself in its own rhythm"
        await asyncio.sleep(10)
        assert [round(at) for at, _ in client.heard] == [0, 60]
        host.facts = host.facts.model_copy(update={"memory_available_bytes": 7})
        await asyncio.sleep(10)
        assert len(client.heard) == 2, "figures wait for the next one"
        host.facts = host.facts.model_copy(update={"bridges": ("br0",)})
        await asyncio.sleep(1.5)
        assert client.heard[2][1].facts.bridges == ("br0",)
        outbox.beat_now()
        await asyncio.sleep(0.5)
        assert len(client.heard) == 4

    in_own_time(scene)


def test_hosts_that_heard_something_at_the_same_moment_beat_at_moments_of_their_own() -> None:
    async def scene(client: Slowing, outbox: Outbox, host: HostAsItIs) -> None:
        del outbox, host
        await asyncio.sleep(59.5)
        assert [round(at) for at, _ in client.heard] == [0, 54]

    in_own_time(scene, share=1.0)


def test_a_host_whom_nobody_answers_tries_ever_less_often() -> None:
    async def scene(client: Slowing, outbox: Outbox, host: HostAsItIs) -> None:
        del outbox
        await asyncio.sleep(0.5)
        client.answers = False
        await asyncio.sleep(600)
        distances = [round(later[0] - earlier[0]) for earlier, later in pairwise(client.heard[1:])]
        assert distances[:7] == [1, 2, 4, 8, 16, 32, 60]
        assert set(distances[7:]) == {60}
        client.answers = True
        await asyncio.sleep(60)
        assert client.heard[-1][1].facts == host.facts

    in_own_time(scene)


def test_polls_that_fail_are_tried_again_ever_less_often_and_at_times_of_their_own() -> None:
    async def polled(share: float) -> list[float]:
        async with Slowing() as client:

            async def apply(assignments: tuple[Assignment, ...]) -> None:
                raise AssertionError(assignments)

            with suppress(TimeoutError):
                async with asyncio.timeout(30):
                    await keep_polling(client, Outbox(client, "h1"), apply, share=lambda: share)
            return [later - earlier for earlier, later in pairwise(client.polled)]

    with asyncio.Runner(loop_factory=OwnTime) as runner:
        late, early = runner.run(polled(1.0)), runner.run(polled(0.0))
    assert late[:5] == pytest.approx([0.5, 1, 2, 4, 5])
    assert early[:5] == pytest.approx([0.25, 0.5, 1, 2, 2.5])
    assert max(late) == pytest.approx(RETRY_SECONDS_MAX)
