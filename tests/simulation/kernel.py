"""Simulated time for everybody: threads that take turns, and event loops that share one clock.

A worker is a thread that runs only when it is given the turn, and gives it back in `sleep` and
`wait`; an agent or a controller is an asyncio loop (`simulated_loop`) whose callbacks are events of
this clock. Exactly one of all of them runs at any moment. Who is next among those that could be
is drawn from the seed, so every order that can happen, happens for some seed.

A process can be killed (it stands wherever it last gave up its turn) and frozen, as by SIGSTOP: it
then finds its clock far ahead. Every host has a monotonic clock of its own, with an offset and a
rate; nobody compares two of them.
"""

import heapq
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from random import Random

from tests.scenarios.simulation import LONGEST_WAIT_NS, MS, Killed, Process, World

SECOND = 1_000 * MS
TURNS_AT_ONCE_MAX = 200
TURN_SECONDS_MAX = 60.0
LINES_KEPT = 600
THREADS_MAX = 64


class RuleBroken(AssertionError):  # noqa: N818 - reads as a sentence where it is raised
    """One of the rules of docs/invariants.md does not hold."""


class Clock:
    """A host's monotonic clock: starts anywhere and goes a little wrong."""

    def __init__(self, kernel: "Kernel", offset_ns: int, drift_ppm: int) -> None:
        self._kernel = kernel
        self._offset_ns = offset_ns
        self._rate = 1_000_000 + drift_ppm

    def now_ns(self) -> int:
        return self._offset_ns + self._kernel.now_ns * self._rate // 1_000_000

    def world_ns(self, time_ns: int) -> int:
        """Return when, in the world's time, this clock will show `time_ns`, or just after."""
        return -(-(time_ns - self._offset_ns) * 1_000_000 // self._rate)


class SimulatedProcess(Process):
    """A worker on a host, whose clock it reads; it can be frozen."""

    def __init__(self, kernel: "Kernel", name: str, clock: Clock, body: Callable[[], None]) -> None:
        self.clock = clock
        self.frozen_until_ns = 0
        self.checks: tuple[Callable[[], bool], ...] = ()
        super().__init__(kernel, name, body)

    def is_runnable(self, now_ns: int) -> bool:
        if now_ns < self.frozen_until_ns:
            return False
        if now_ns >= self.deadline_ns:
            return True
        return any(check() for check in self.checks)

    def due_ns(self) -> int:
        return max(self.deadline_ns, self.frozen_until_ns)


class Kernel(World):
    """The clock, its events, and whose turn it is."""

    def __init__(self, random: Random, *, keeps_all_lines: bool = False) -> None:
        self.random = random
        self.now_ns = 0
        self.threads = ThreadPoolExecutor(THREADS_MAX)
        self.steps = 0
        self.kept: deque[str] = deque(maxlen=None if keeps_all_lines else LINES_KEPT)
        self.after_step: Callable[[], None] = lambda: None
        self.back = threading.Lock()
        self.back.acquire()
        self.error: BaseException | None = None
        self.slowness: float = 1.0
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._event_count = 0
        self._alive: list[SimulatedProcess] = []
        self._running: SimulatedProcess | None = None
        self._checks: dict[int, Callable[[], bool]] = {}

    def log(self, who: str, text: str) -> None:
        self.kept.append(f"{self.now_ns / MS:11.3f} {who:<9} {text}")

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def between_ns(self, least_ns: int, most_ns: int) -> int:
        """Draw a duration, stretched while everything is slow."""
        return int(self.random.randint(least_ns, most_ns) * self.slowness)

    def fail(self, error: BaseException) -> None:
        """Have `run` raise this error when the present step is over."""
        self.error = self.error or error

    # --- events and descriptors -------------------------------------------------------------------

    def at(self, time_ns: int, event: Callable[[], None]) -> None:
        self._event_count += 1
        heapq.heappush(self._events, (max(time_ns, self.now_ns), self._event_count, event))

    def descriptor(self, is_ready: Callable[[], bool]) -> int:
        number = 1000 + len(self._checks)
        self._checks[number] = is_ready
        return number

    def is_ready(self, number: int) -> bool:
        return self._checks[number]()

    # --- processes --------------------------------------------------------------------------------

    def spawn(self, name: str, clock: Clock, body: Callable[[], None]) -> SimulatedProcess:
        process = SimulatedProcess(self, name, clock, body)
        self._alive.append(process)
        return process

    def end(self, process: SimulatedProcess) -> None:
        """Kill a process where it stands. A process that kills itself ends at its next wait."""
        if process.has_ended or process.is_killed:
            return
        process.is_killed = True
        if process is not self._running:
            self._give_turn_to(process)
            assert process.has_ended, f"{process.name} does not die"

    def sleep(self, duration_ns: int) -> None:
        """Let time pass for the process whose turn it is; more of it while all is slow."""
        self._wait_for((), self.now_ns + int(duration_ns * self.slowness))

    def hesitate(self) -> None:
        """Perhaps give the turn away: at any such place a process may be killed or frozen."""
        if self._running is not None and self.random.random() < 0.2:
            self.sleep(self.random.randint(0, 60_000))

    def wait(self, descriptors: Iterable[int], timeout_ns: int) -> frozenset[int]:
        watched = tuple(descriptors)
        process = self._running
        assert process is not None, "only a process can wait"
        timeout_ns = min(max(0, timeout_ns), LONGEST_WAIT_NS)
        deadline_ns = process.clock.world_ns(process.clock.now_ns() + timeout_ns)
        checks = tuple(self._checks[d] for d in watched)
        self._wait_for(checks, max(self.now_ns, deadline_ns))
        return frozenset(d for d, check in zip(watched, checks, strict=True) if check())

    def _wait_for(self, checks: tuple[Callable[[], bool], ...], deadline_ns: int) -> None:
        process = self._running
        assert process is not None, "only a process can wait"
        if process.is_killed:
            raise Killed
        process.checks, process.deadline_ns = checks, deadline_ns
        process.give_back_turn()

    # --- the scheduler ----------------------------------------------------------------------------

    def run(self, until_ns: int, *, steps_max: int = 1 << 60) -> None:
        """Let everything happen up to `until_ns`, or so many steps. Raises what went wrong."""
        turns, turned_ns = 0, self.now_ns
        while self.steps < steps_max:
            ready = [p for p in self._alive if p.is_runnable(self.now_ns)]
            is_due = bool(self._events) and self._events[0][0] <= self.now_ns
            if is_due and (not ready or self.random.random() < 0.7):
                self._step(heapq.heappop(self._events)[2])
                continue
            if ready:
                turns = turns + 1 if turned_ns == self.now_ns else 1
                turned_ns = self.now_ns
                process = ready[0] if len(ready) == 1 else self.random.choice(ready)
                self._step(lambda p=process: self._give_turn_to(p))  # type: ignore[misc]
                if turns > TURNS_AT_ONCE_MAX:
                    raise RuleBroken(f"{process.name} waits busily at {self.now_ns / MS} ms")
                continue
            next_ns = min(
                self._events[0][0] if self._events else until_ns + 1,
                *(p.due_ns() for p in self._alive),
                until_ns + 1,
            )
            if next_ns > until_ns:
                self.now_ns = until_ns
                return
            self.now_ns = max(next_ns, self.now_ns)

    def _step(self, what: Callable[[], None]) -> None:
        self.steps += 1
        what()
        self.after_step()
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def close(self) -> None:
        """End every thread."""
        for process in list(self._alive):
            self.end(process)
        self._events.clear()
        self.threads.shutdown()

    def _give_turn_to(self, process: SimulatedProcess) -> None:
        if process.has_ended:
            return
        before, self._running = self._running, process
        process.turn.release()
        assert self.back.acquire(timeout=TURN_SECONDS_MAX), f"{process.name} waits for real"
        self._running = before
        if process.has_ended:
            self._alive.remove(process)
            error = process.error()
            if error is not None:
                self.log(process.name, f"died: {error!r}")
                self.fail(error)
