"""A thousand agents in one process, for measuring what they ask.

They speak HTTP over kept connections with as little effort as possible: on real hosts each agent
has a processor of its own, and here all of them together must not take what the controllers need.
What they say and do is what the product's agents do: a heartbeat in a rhythm, a long poll, orders
of newer generations taken up at once, a seeded report for each new pair.

Touches TCP. Every connection ends with the process, which ends with its parent.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from typing import Any
from urllib.parse import urlsplit

from bench.planning import facts_of, host_name, vm_of
from holdfast_api.messages import Heartbeat, Holding, SeededReport
from holdfast_api.words import Generation, HostId, Phase, Role, VmId

RAMP_SECONDS = 10.0
RUN_SECONDS_MAX = 120.0
ANSWER_SECONDS_MAX = 15.0
RETRY_SECONDS = 0.5
POLL_MS = 5000

# --- HTTP -----------------------------------------------------------------------------------------


class Connection:
    """One kept HTTP connection to one of several controllers; another one after a failure."""

    def __init__(self, urls: Sequence[str]) -> None:
        """Begin with the first URL."""
        self._urls = list(urls)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Return status and body; status 0 if nobody answered."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS_MAX):
                return await self._ask(method, path, body)
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            self.close()
            self._urls.append(self._urls.pop(0))
            return 0, b""

    async def _ask(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        if self._streams is None:
            where = urlsplit(self._urls[0])
            self._streams = await asyncio.open_connection(where.hostname, where.port)
        reader, writer = self._streams
        head = f"{method} {path} HTTP/1.1\r\nhost: bench\r\ncontent-length: {len(body)}\r\n"
        writer.write(f"{head}content-type: application/json\r\n\r\n".encode() + body)
        answered = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = answered.partition(b"content-length:")[2].partition(b"\r\n")[0]
        return int(answered.split(b" ", 2)[1]), await reader.readexactly(int(length))

    def close(self) -> None:
        """Hang up."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


# --- agents ---------------------------------------------------------------------------------------


@dataclass
class LightAgent:
    """A host without QEMU: takes what it is assigned and reports it as done at once."""

    number: int
    name: HostId
    urls: Sequence[str]
    orders: dict[VmId, tuple[Generation, Role]] = field(default_factory=dict)
    position: int = 0
    beats: int = 0
    _seeded: set[tuple[VmId, Generation]] = field(default_factory=set)
    _told: bytes = b""
    _beaten: bytes = b""
    _body: bytes = b""

    async def beat(self, seconds: float) -> None:
        """Send heartbeats for ever."""
        connection = Connection(self.urls)
        path = f"/v1/agent/hosts/{self.name}/heartbeat"
        due = time.monotonic()
        while True:
            status, answer = await connection.ask("POST", path, self._body or self._say())
            self.beats += 1
            if status == 200:
                await self._take(answer, connection, is_beat=True)
            due = max(due + seconds, time.monotonic())
            await asyncio.sleep(due - time.monotonic())

    async def poll(self) -> None:
        """Wait for newer orders for ever."""
        connection = Connection(self.urls)
        position = 0
        while True:
            path = f"/v1/agent/hosts/{self.name}/assignments?after={position}&wait_ms={POLL_MS}"
            status, answer = await connection.ask("GET", path)
            if status == 200:
                position = json.loads(answer)["position"]
                await self._take(answer, connection, is_beat=False)
            else:
                await asyncio.sleep(RETRY_SECONDS)

    def _say(self) -> bytes:
        heartbeat = Heartbeat(
            facts=facts_of(self.number),
            vms=tuple(vm_of(vm) for vm, (_, role) in self.orders.items() if role is Role.PRIMARY),
            holdings=tuple(
                Holding(vm=vm, generation=generation, role=role)
                for vm, (generation, role) in self.orders.items()
            ),
            position=self.position,
        )
        self._body = heartbeat.model_dump_json().encode()
        return self._body

    async def _take(self, answer: bytes, connection: Connection, *, is_beat: bool) -> None:
        """Do as told. An answer that was taken before costs nothing."""
        if answer != self._told:
            for order in json.loads(answer)["assignments"]:
                await self._obey(order, connection)
            self._told, self._body = answer, b""
        if is_beat and answer != self._beaten:
            self.position = json.loads(answer)["position"]
            self._beaten, self._body = answer, b""

    async def _obey(self, order: dict[str, Any], connection: Connection) -> None:
        vm, generation, role = order["vm"], order["generation"], Role(order["role"])
        if self.orders.get(vm, (0, role))[0] > generation:
            return
        if role is Role.NONE:
            self.orders.pop(vm, None)
            return
        self.orders[vm] = (generation, role)
        if role is Role.PRIMARY and order["phase"] == Phase.SEEDING:
            await self._report_seeded(vm, generation, connection)

    async def _report_seeded(self, vm: VmId, generation: Generation, via: Connection) -> None:
        if (vm, generation) in self._seeded:
            return
        report = SeededReport(vm=vm, generation=generation, host=self.name)
        status, _ = await via.ask("POST", "/v1/agent/seeded", report.model_dump_json().encode())
        if status not in (0, 503):
            self._seeded.add((vm, generation))


def agents_of(count: int, urls: Sequence[str]) -> list[LightAgent]:
    """Return agents whose hosts back each other up in a ring, each with a VM of its own."""
    agents = []
    for number in range(count):
        first = number % len(urls)
        agent = LightAgent(number, host_name(number), [*urls[first:], *urls[:first]])
        agent.orders[f"vm{number:05d}"] = (3, Role.PRIMARY)
        agent.orders[f"vm{(number - 1) % count:05d}"] = (3, Role.BACKUP)
        agents.append(agent)
    return agents


async def live(
    agents: Sequence[LightAgent], beat_seconds: float, started: Event, ended: Event
) -> None:
    """Let agents beat and poll until `ended`; sets `started` when the last one does."""
    tasks: list[asyncio.Task[None]] = []
    begun = time.monotonic()
    for agent in agents:
        tasks += [asyncio.create_task(agent.beat(beat_seconds)), asyncio.create_task(agent.poll())]
        due = begun + RAMP_SECONDS * (agent.number + 1) / len(agents)
        await asyncio.sleep(max(due - time.monotonic(), 0))
    started.set()
    begun, before = time.monotonic(), sum(agent.beats for agent in agents)
    await asyncio.to_thread(ended.wait, RUN_SECONDS_MAX)
    rate = (sum(agent.beats for agent in agents) - before) / (time.monotonic() - begun)
    print(
        f"  {rate:.0f} heartbeats a second of {len(agents) / beat_seconds:.0f} wanted", flush=True
    )
    for task in tasks:
        task.cancel()
    failed = await asyncio.gather(*tasks, return_exceptions=True)
    faults = {repr(each) for each in failed if not isinstance(each, asyncio.CancelledError)}
    for fault in faults:
        print(f"  an agent failed: {fault}", flush=True)


def agents_process(
    agent_count: int, urls: list[str], beat_seconds: float, started: Event, ended: Event
) -> None:
    """Be the process of all agents."""
    asyncio.run(live(agents_of(agent_count, urls), beat_seconds, started, ended))
