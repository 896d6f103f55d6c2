"""An asyncio event loop on simulated time: production coroutines run on it as they are.

One loop is one process, an agent or a controller. Killed, nothing of it runs ever again, not even
what asyncio would do to clean up; frozen, it runs late. What a task raises and nobody expects ends
the simulation.

Only what our agents and controllers use is here: timers, tasks, futures, a thread that is none.
"""

import asyncio
import contextvars
import itertools
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from tests.simulation.kernel import Clock, Kernel

from holdfast_agent.core.failures import VirtualMachineFailed
from holdfast_api.errors import Refused, Unavailable

EXPECTED = (Refused, Unavailable, OSError, VirtualMachineFailed, asyncio.CancelledError)


class CountedFuture(asyncio.Future[Any]):
    """A future whose place in a set does not depend on its address."""

    def __init__(self, *, loop: asyncio.AbstractEventLoop, number: int) -> None:
        super().__init__(loop=loop)
        self._number = number

    def __hash__(self) -> int:
        return self._number

    def __eq__(self, other: object) -> bool:
        return self is other


def new_loop(kernel: Kernel, name: str, clock: Clock) -> "SimulatedLoop":
    """Return the event loop of a new process."""
    return SimulatedLoop(kernel, name, clock)  # type: ignore[abstract]  # the rest is not asked for


class SimulatedLoop(asyncio.AbstractEventLoop):
    """The event loop of one process."""

    def __init__(self, kernel: Kernel, name: str, clock: Clock) -> None:
        self.kernel = kernel
        self.name = name
        self.is_alive = True
        self.frozen_until_ns = 0
        self.start_program: Callable[[tuple[str, ...]], Any] | None = None
        """Starts a program and returns its transport; see `subprocess_exec`."""
        self._clock = clock
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task[Any]] = set()

    def kill(self) -> None:
        self.is_alive = False

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """Start a task from outside of this loop."""
        asyncio._set_running_loop(self)
        try:
            return self.create_task(coroutine)
        finally:
            asyncio._set_running_loop(None)

    # --- what asyncio asks of a loop --------------------------------------------------------------

    def time(self) -> float:
        return self._clock.now_ns() / 1e9

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self.kernel.at(self.kernel.now_ns, partial(self._run_handle, handle))
        return handle

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self.kernel.at(self._clock.world_ns(int(when * 1e9) + 1), partial(self._run_handle, handle))
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def _run_handle(self, handle: asyncio.Handle) -> None:
        if not self.is_alive or handle.cancelled():
            return
        if self.kernel.now_ns < self.frozen_until_ns:
            self.kernel.at(self.frozen_until_ns, partial(self._run_handle, handle))
            return
        asyncio._set_running_loop(self)
        try:
            handle._run()
        finally:
            asyncio._set_running_loop(None)

    def create_future(self) -> asyncio.Future[Any]:
        return CountedFuture(loop=self, number=next(self._numbers))

    def create_task(  # type: ignore[override]
        self,
        coro: Coroutine[Any, Any, Any],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
    ) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, name=name, context=context)
        self._tasks.add(task)  # kept, so that nothing of a dead process is ever cleaned up early
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None and not isinstance(error, EXPECTED):
            self.kernel.log(self.name, f"a task failed: {error!r}")
            self.kernel.fail(error)

    def run_in_executor(  # type: ignore[override]
        self, _executor: Any, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        """Do it soon: what takes time on simulated hosts is not what runs in threads."""

        async def call() -> Any:
            return func(*args)

        return self.create_task(call())

    async def subprocess_exec(
        self, protocol_factory: Callable[[], Any], *args: str, **_: Any
    ) -> tuple[Any, Any]:
        assert self.start_program is not None
        return self.start_program(args), protocol_factory()

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """What asyncio complains of at the end of dead processes is no fault."""

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """A cancelled timer is passed over when its time comes."""
