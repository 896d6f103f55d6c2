"""A thousand agents in one process, for measuring what they ask.

They speak HTTP over kept connections with as little effort as possible: on real hosts each agent
has a processor of its own, and here all of them together must not take what the controllers need.
What they say and do is what the product's agents do: a heartbeat in a rhythm, a long poll, orders
of newer generations taken up at once, a seeded report for each new pair.

Touches TCP. Every connection ends with the process, which ends with its parent.
"""

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from typing import Any
from urllib.parse import urlsplit

from bench.planning import facts_of, host_name, vm_of
from holdfast_agent.host.reporter import POLL_MS, RETRY_SECONDS, RETRY_SECONDS_MAX
from holdfast_api.messages import Heartbeat, Holding, SeededReport
from holdfast_api.words import Generation, HostId, Phase, Role, VmId

RAMP_SECONDS = 30.0
"""As long as figures stay unwritten at a thousand hosts: from then on these are spread evenly."""
RUN_SECONDS_MAX = 180.0
ANSWER_SECONDS_MAX = 30.0

# --- HTTP -----------------------------------------------------------------------------------------


class Answers(asyncio.Protocol):
    """The near end of a connection: one request, one answer."""

    def __init__(self) -> None:
        """Wait for nothing yet."""
        self.answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._read = b""

    def data_received(self, data: bytes) -> None:
        """Note what came; the answer is there when its body is."""
        self._read += data
        head, found, body = self._read.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(body) == length:
            self._read = b""
            if self.answer is not None and not self.answer.done():
                self.answer.set_result((int(head.split(b" ", 2)[1]), body))

    def connection_lost(self, _error: Exception | None) -> None:
        """End the wait."""
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(ConnectionResetError("hung up"))


class Connection:
    """One kept HTTP connection to one of several controllers; another one after a failure."""

    def __init__(self, urls: Sequence[str]) -> None:
        """Begin with the first URL."""
        self._urls = list(urls)
        self._ends: tuple[asyncio.Transport, Answers] | None = None

    async def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Return status and body; status 0 if nobody answered."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS_MAX):
                return await self._ask(method, path, body)
        except (OSError, TimeoutError):
            self.close()
            self._urls.append(self._urls.pop(0))
            return 0, b""

    async def _ask(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        loop = asyncio.get_running_loop()
        if self._ends is None or self._ends[0].is_closing():
            where = urlsplit(self._urls[0])
            assert where.hostname is not None
            assert where.port is not None
            self._ends = await loop.create_connection(Answers, where.hostname, where.port)
        transport, answers = self._ends
        answers.answer = loop.create_future()
        head = f"{method} {path} HTTP/1.1\r\nhost: bench\r\ncontent-length: {len(body)}\r\n"
        transport.write(f"{head}content-type: application/json\r\n\r\n".encode() + body)
        return await answers.answer

    def close(self) -> None:
        """Hang up."""
        if self._ends is not None:
            self._ends[0].close()
            self._ends = None


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
    wanted: float = 0.0
    """Seconds between two heartbeats, as a controller asked for last."""
    _seeded: set[tuple[VmId, Generation]] = field(default_factory=set)
    _taken: list[dict[str, Any]] = field(default_factory=list)
    _body: bytes = b""

    async def beat(self, seconds: float) -> None:
        """Send heartbeats for ever."""
        connection = Connection(self.urls)
        path = f"/v1/agent/hosts/{self.name}/heartbeat"
        looks, due, retry = time.monotonic(), 0.0, seconds
        while True:
            if not self._body or time.monotonic() >= due:
                status, answer = await connection.ask("POST", path, self._body or self._say())
                self.beats += 1
                if status == 200:
                    told = json.loads(answer)
                    await self._take(told, connection)
                    if told["position"] != self.position:
                        self.position, self._body = told["position"], b""
                    self.wanted, retry = told["beat_seconds"], seconds
                    due = time.monotonic() + self.wanted * (1 - random.random() / 10)
                else:
                    due = time.monotonic() + retry
                    retry = min(2 * retry, max(self.wanted, RETRY_SECONDS_MAX, seconds))
            looks = max(looks + seconds, time.monotonic())
            await asyncio.sleep(looks - time.monotonic())

    async def poll(self) -> None:
        """Wait for newer orders for ever."""
        connection = Connection(self.urls)
        position, retry = 0, RETRY_SECONDS
        while True:
            path = f"/v1/agent/hosts/{self.name}/assignments?after={position}&wait_ms={POLL_MS}"
            status, answer = await connection.ask("GET", path)
            if status == 200:
                told = json.loads(answer)
                position = told["position"]
                await self._take(told, connection)
                if position > self.position:
                    self.position, self._body = position, b""
                retry = RETRY_SECONDS
            else:
                await asyncio.sleep(retry * (0.5 + random.random() / 2))
                retry = min(2 * retry, RETRY_SECONDS_MAX)

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

    async def _take(self, told: dict[str, Any], connection: Connection) -> None:
        """Do as told. What was done before costs nothing."""
        if told["assignments"] != self._taken:
            for order in told["assignments"]:
                await self._obey(order, connection)
            self._taken, self._body = told["assignments"], b""

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
    asked = max(beat_seconds, *(agent.wanted for agent in agents))
    print(f"  {rate:.0f} heartbeats a second; asked for is one each {asked:.1f} s", flush=True)
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
