"""An agent's way to the controllers: the calls of `AgentClient`, over the simulated network.

A request runs the controller's own route in the controller's own loop. It may not get there, the
controller may die meanwhile, the answer may get lost although all was done: the caller can not tell
these apart. Claims go through the production reading of answers (`read_claim_answer`).
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from tests.simulation.control_plane import Controller
from tests.simulation.network import Network

from holdfast_api.errors import Refused, Unavailable
from holdfast_api.exchange import Answer, read_claim_answer
from holdfast_api.messages import (
    Assignments,
    Claim,
    ClaimVerdict,
    EventReport,
    Heartbeat,
    ReleasedReport,
    SeededReport,
    SeedingFailedReport,
)
from holdfast_controller.control import Control
from holdfast_controller.http import agents

TIMEOUT_SECONDS = 5.0
CLAIM_PATIENCE_SECONDS = 0.25
CLAIM_PATIENCE_SECONDS_MAX = 4.0
PAUSE_SECONDS = 0.05
PAUSE_SECONDS_MAX = 1.0

Handler = Callable[[Control], Awaitable[Any]]


class SimulatedAgentClient:
    """What `host.reporter` uses of `AgentClient`."""

    def __init__(self, host: str, network: Network, controllers: list[Controller]) -> None:
        self._host = host
        self._network = network
        self._controllers = list(controllers)

    async def heartbeat(self, heartbeat: Heartbeat) -> Assignments:
        return await self._call(  # type: ignore[no-any-return]
            lambda control: agents.hear_heartbeat(self._host, heartbeat, control)
        )

    async def assignments(self, after: int, wait_ms: int) -> Assignments:
        return await self._call(  # type: ignore[no-any-return]
            lambda control: agents.get_assignments(self._host, control, after, wait_ms),
            wait_seconds=wait_ms / 1000,
        )

    async def seeded(self, report: SeededReport) -> None:
        await self._call(lambda control: agents.seeded(report, control))

    async def released(self, report: ReleasedReport) -> None:
        await self._call(lambda control: agents.released(report, control))

    async def seeding_failed(self, report: SeedingFailedReport) -> None:
        await self._call(lambda control: agents.seeding_failed(report, control))

    async def event(self, report: EventReport) -> None:
        await self._call(lambda control: agents.report_event(report, control))

    async def claim(self, claim: Claim) -> ClaimVerdict:
        """Ask until it is decided, as the production client does."""
        pause, patience = PAUSE_SECONDS, CLAIM_PATIENCE_SECONDS
        while True:
            for controller in list(self._controllers):
                verdict = await self._claim_once(controller, claim, patience)
                if verdict is not None:
                    self._prefer(controller)
                    return verdict
            await asyncio.sleep(pause)
            pause = min(2 * pause, PAUSE_SECONDS_MAX)
            patience = min(2 * patience, CLAIM_PATIENCE_SECONDS_MAX)

    async def _claim_once(
        self, controller: Controller, claim: Claim, patience: float
    ) -> ClaimVerdict | None:
        try:
            verdict = await self._ask(
                controller, lambda control: agents.claim(claim, control), patience
            )
        except (Unavailable, Refused, TimeoutError) as error:
            self._network.kernel.log(self._host, f"claim undecided at {controller.name}: {error}")
            return None
        answer = Answer(200, "application/json", verdict.model_dump_json().encode())
        read = read_claim_answer(answer, claim)
        return read if isinstance(read, ClaimVerdict) else None

    async def _call(self, handler: Handler, *, wait_seconds: float = 0.0) -> Any:
        each = TIMEOUT_SECONDS / len(self._controllers) + wait_seconds
        last: Exception = Unavailable("no-controller", "no controller answered")
        for controller in list(self._controllers):
            try:
                answer = await self._ask(controller, handler, each)
            except (Unavailable, TimeoutError) as error:
                last = error
                continue
            self._prefer(controller)
            return answer
        raise Unavailable("no-controller", f"no controller answered: {last}") from last

    def _prefer(self, controller: Controller) -> None:
        self._controllers.remove(controller)
        self._controllers.insert(0, controller)

    async def _ask(self, controller: Controller, handler: Handler, seconds: float) -> Any:
        """Have one controller carry `handler` out. Raises what it raises, or TimeoutError."""
        network, here, there = self._network, self._host, controller.name
        mine = asyncio.get_running_loop().create_future()
        kernel = network.kernel

        def tell(task: "asyncio.Task[Any]") -> None:
            if task.cancelled():
                return
            error = task.exception()
            result = None if error is not None else task.result()
            kernel.after(network.latency_ns(there, here), lambda: come_back(error, result))

        def come_back(error: BaseException | None, result: Any) -> None:
            if not network.passes(there, here):
                network.happened["answer lost"] += 1
            elif not mine.done():
                mine.set_result((error, result))

        def get_there() -> None:
            if controller.answers and network.passes(here, there):
                task = controller.loop.spawn(handler(controller.control))  # type: ignore[arg-type]
                task.add_done_callback(tell)

        kernel.after(network.latency_ns(here, there), get_there)
        async with asyncio.timeout(seconds):
            error, result = await mine
        if error is not None:
            raise error
        return result
