"""A controller process: production store, world, planner, claims and routes over a simulated etcd.

Its three tasks are those of `holdfast_controller.loop`: follow the store, probe it, plan. Several
controllers plan at once and answer at once; each can be killed, frozen or cut off.
"""

import asyncio
import itertools
from collections import Counter
from dataclasses import dataclass, field

from tests.simulation.kernel import Clock, Kernel
from tests.simulation.simulated_loop import SimulatedLoop, new_loop
from tests.simulation.store import SimulatedEtcd, SimulatedStore

from holdfast_api.errors import Unavailable
from holdfast_controller.adapters.etcd import EtcdClient, EtcdUnavailable
from holdfast_controller.adapters.heartbeats import Heartbeats
from holdfast_controller.adapters.keys import ROOT
from holdfast_controller.adapters.store import Store
from holdfast_controller.control import Control
from holdfast_controller.core.planner import plan
from holdfast_controller.executor import execute
from holdfast_controller.metrics import Metrics
from holdfast_controller.world import World

PROBE_SECONDS = 1.0
PLAN_SECONDS = 1.0
PASS_DISTANCE_SECONDS = 0.02
HEARTBEAT_TTL_SECONDS = 5
EVENTS_KEPT = 200


@dataclass
class WallClock:
    """UTC as one controller believes it; it may jump, and nothing may depend on it."""

    kernel: Kernel
    offset_seconds: float = 0.0

    def now_seconds(self) -> float:
        return 1.8e9 + self.kernel.now_ns / 1e9 + self.offset_seconds


@dataclass(eq=False)
class Controller:
    """One controller, through all its restarts."""

    kernel: Kernel
    store: SimulatedStore
    name: str
    clock: Clock
    happened: Counter[str]
    beats_per_second_max: int
    loop: SimulatedLoop = field(init=False)
    etcd: SimulatedEtcd = field(init=False)
    control: Control = field(init=False)

    def __post_init__(self) -> None:
        self.wall_clock = WallClock(self.kernel)
        self.start()

    @property
    def answers(self) -> bool:
        return self.loop.is_alive

    def kill(self) -> None:
        self.loop.kill()

    def start(self) -> None:
        self.loop = new_loop(self.kernel, self.name, self.clock)
        self.etcd = SimulatedEtcd(self.store, self.name, self.loop)
        client: EtcdClient = self.etcd  # type: ignore[assignment]
        started, numbers = f"{self.name}{self.kernel.now_ns:x}", itertools.count()
        store = Store(
            client,
            now_seconds=self.wall_clock.now_seconds,
            new_name=lambda: f"{started}-{next(numbers):06d}",
        )
        self.control = Control(
            store=store,
            heartbeats=Heartbeats(client, now_seconds=self.loop.time),
            world=World(now_seconds=self.loop.time),
            metrics=Metrics(),
            beats_per_second_max=self.beats_per_second_max,
            silence_seconds=HEARTBEAT_TTL_SECONDS,
        )
        for task in (self._follow(), self._probe(), self._plan()):
            self.loop.spawn(task)

    async def _follow(self) -> None:
        while True:
            try:
                async for batch in self.etcd.watch(ROOT, from_revision=0):
                    self.control.world.apply(batch)
            except EtcdUnavailable as error:
                self.kernel.log(self.name, f"watches again: {error}")
            await asyncio.sleep(0.5)

    async def _probe(self) -> None:
        world = self.control.world
        while True:
            try:
                revision = await self.control.store.probe()
            except Unavailable:
                world.set_live(live=False)
            else:
                world.set_live(live=await world.reached(revision, timeout_seconds=2.0))
            await asyncio.sleep(PROBE_SECONDS if world.live else PROBE_SECONDS / 5)

    async def _plan(self) -> None:
        control = self.control
        while True:
            seen = control.world.planner_changes
            if control.world.live:
                try:
                    await self._pass()
                except Unavailable as error:
                    self.kernel.log(self.name, f"a plan was left unfinished: {error}")
            await asyncio.sleep(PASS_DISTANCE_SECONDS)
            await control.world.planner_change(seen, PLAN_SECONDS)

    async def _pass(self) -> None:
        control = self.control
        planned = plan(control.world.snapshot())
        await asyncio.sleep(self.kernel.between_ns(0, 5_000_000) / 1e9)
        for sentence in await execute(control.store, planned, control.metrics):
            self.kernel.log(self.name, f"plans: {sentence}")
        surplus = control.world.events.surplus(EVENTS_KEPT)
        await control.store.remove_events(surplus[:100])
