"""Two that plan at the same time do no harm, whatever the election did."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
from tests.integration.controller.conftest import (
    Controller,
    Etcd,
    Scene,
    noted_once,
    ok,
    running_etcd,
)

from holdfast_api.messages import Heartbeat
from holdfast_api.records import HostFacts
from holdfast_controller.adapters.etcd import EtcdClient
from holdfast_controller.adapters.heartbeats import Heartbeats, Known
from holdfast_controller.adapters.keys import ROOT
from holdfast_controller.adapters.store import Store
from holdfast_controller.control import Control
from holdfast_controller.core.planner import plan
from holdfast_controller.core.rhythm import rhythm_of
from holdfast_controller.executor import execute
from holdfast_controller.leadership import Leadership
from holdfast_controller.loop import Loop
from holdfast_controller.metrics import Metrics
from holdfast_controller.world import World

pytestmark = pytest.mark.etcd


class Unelected(Leadership):
    """Believes that it leads, whatever the store says: the worst that an election can do."""

    def leads(self) -> bool:
        return True

    async def won(self) -> None:
        return

    async def run(self) -> None:
        await asyncio.Event().wait()


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Etcd]:
    """A store that nobody plans for."""
    with running_etcd(tmp_path) as server:
        yield server


@pytest.fixture
def controller(tmp_path: Path, etcd: Etcd) -> Iterator[Controller]:
    """A controller that was elected."""
    made = Controller(tmp_path, etcd, "elected")
    try:
        made.start()
        yield made
    finally:
        made.close()


def with_client(etcd: Etcd, use: Callable[[EtcdClient], Awaitable[None]]) -> None:
    async def body() -> None:
        client = EtcdClient([etcd.endpoint])
        try:
            await use(client)
        finally:
            await client.close()

    asyncio.run(body())


def unelected_loop(etcd: EtcdClient) -> tuple[Loop, Metrics]:
    world, metrics = World(), Metrics()
    leadership = Unelected(etcd, name="nobody", ttl_seconds=5, fit=lambda: True)
    control = Control(Store(etcd), Heartbeats(etcd), world, metrics, 200, 5)
    return Loop(control, etcd, leadership, interval_seconds=0.2, events_kept=1000), metrics


def one_protected_life(scene: Scene) -> None:
    """Three hosts appear, a VM is protected, fails over, and is protected by the third host."""
    first = scene.host("a")
    scene.host("b")
    scene.host("c")
    generation = scene.become_protected(first)["generation"]
    backup = next(agent for agent in scene.agents.values() if agent.holdings and agent is not first)
    assert ok(backup.claim(scene.vm, generation))["won"]
    first.vms, first.holdings = [], []
    backup.hold(scene.vm, generation + 1, "primary")
    backup.run(scene.vm)
    scene.wait_for_phase("seeding")


def test_three_planning_loops_at_once_do_every_step_once(
    etcd: Etcd, controller: Controller
) -> None:
    scene = Scene(controller)
    passes: list[float] = []

    async def plan_beside(client: EtcdClient) -> None:
        made = [unelected_loop(client) for _ in range(2)]
        tasks = [asyncio.create_task(loop.run()) for loop, _ in made]
        try:
            await asyncio.to_thread(one_protected_life, scene)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        passes.extend(metrics.planner_passes._value.get() for _, metrics in made)

    with_client(etcd, plan_beside)
    assert min(passes) > 1, "they did not plan at all"
    events = ok(controller.get("/v1/events"))["events"]
    assigned = [e["generation"] for e in events if e["kind"] == "BackupAssigned"]
    assert len(assigned) >= 2
    assert len(assigned) == len(set(assigned))
    assert [a.name for a in scene.agents.values() if not noted_once(events, a.name)] == []
    assert len(controller.events(scene.vm, "FailedOver")) == 1


def test_a_plan_is_left_where_it_is_when_its_maker_leads_no_more(etcd: Etcd) -> None:
    facts = HostFacts(
        peer_address="h:7001",
        memory_total_bytes=1 << 30,
        memory_available_bytes=1 << 30,
        qemu_version="7.2.22",
        agent_version="0.1.0",
    )

    async def carry_out(client: EtcdClient) -> None:
        heartbeats = Heartbeats(client)
        for name in ("a", "b"):
            await heartbeats.hear(name, Heartbeat(facts=facts), Known(), rhythm_of(2, 200, 60))
        world, store = World(), Store(client)
        async with aclosing(client.watch(ROOT, from_revision=0)) as batches:
            world.apply(await anext(batches))
        planned = plan(world.snapshot())
        assert len(planned.steps) == 2, "both are new and must be noted"
        answers = iter([True, False])
        done = await execute(store, planned, Metrics(), may_go_on=lambda: next(answers))
        assert len(done) == 1
        assert len(await execute(store, planned, Metrics())) == 1, "the rest, and no step twice"

    with_client(etcd, carry_out)
