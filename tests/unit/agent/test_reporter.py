"""The rhythm of heartbeats, whatever else the agent is busy with."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from tests.unit.agent.agents import NOBODY, until

from holdfast_agent.host.reporter import Outbox, keep_beating
from holdfast_api.client import AgentClient
from holdfast_api.messages import Assignment, Assignments, Heartbeat
from holdfast_api.records import HostFacts

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

    async def heartbeat(self, heartbeat: Heartbeat) -> Assignments:
        self.heard.append(heartbeat)
        return Assignments(position=len(self.heard), assignments=())


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
