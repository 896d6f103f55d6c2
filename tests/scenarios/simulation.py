"""A simulated clock, processes that run one at a time, and descriptors that are no descriptors.

Pure but for threads: each process has one, and exactly one thread of them all runs at any moment.
A process gives the turn back in `sleep` and `wait` only, so a run is the same every time. Killing
a process raises `Killed` where it stands, as power that fails does.
"""

import heapq
import itertools
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from holdfast_agent.checkpoint.waiting import FOREVER_NS

MS = 1_000_000
LONGEST_WAIT_NS = 1_000 * MS
TURNS_AT_ONCE_MAX = 2_000
TURN_SECONDS_MAX = 30.0
PROCESSES_MAX = 8


class Killed(BaseException):
    """This process was killed; nothing may catch it."""


class Process:
    """One worker: a body that runs in a thread of its own until it returns or is killed."""

    def __init__(self, world: "World", name: str, body: Callable[[], None]) -> None:
        self.name = name
        self.is_killed = False
        self.has_ended = False
        self.deadline_ns = world.now_ns
        self.descriptors: tuple[int, ...] = ()
        self.turn = threading.Lock()
        self.turn.acquire()
        self._world = world
        self._body = body
        self._ending = world.threads.submit(self._main)

    def _main(self) -> None:
        self.turn.acquire()
        try:
            if not self.is_killed:
                self._body()
        finally:
            self.has_ended = True
            self._world.back.release()

    def give_back_turn(self) -> None:
        """Stand still until the next turn. Raises Killed if that is the last one."""
        self._world.back.release()
        self.turn.acquire()
        if self.is_killed:
            raise Killed

    def error(self) -> BaseException | None:
        """Return what ended this process against its will; None if it was killed or returned."""
        error = self._ending.exception(TURN_SECONDS_MAX)
        return None if isinstance(error, Killed) else error


class World:
    """Time, its events, and whose turn it is."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.lines: list[str] = []
        self.threads = ThreadPoolExecutor(PROCESSES_MAX)
        self.back = threading.Lock()
        self.back.acquire()
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._processes: list[Process] = []
        self._current: Process | None = None
        self._ready: dict[int, Callable[[], bool]] = {}

    def now(self) -> int:
        return self.now_ns

    def log(self, who: str, text: str) -> None:
        self.lines.append(f"{self.now_ns / MS:8.2f} {who:<8} {text}")

    # --- what events and fakes use ----------------------------------------------------------------

    def at(self, time_ns: int, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (max(time_ns, self.now_ns), next(self._count), event))

    def after(self, delay_ns: int, event: Callable[[], None]) -> None:
        self.at(self.now_ns + delay_ns, event)

    def descriptor(self, is_ready: Callable[[], bool]) -> int:
        number = 1000 + len(self._ready)
        self._ready[number] = is_ready
        return number

    def start(self, name: str, body: Callable[[], None]) -> Process:
        process = Process(self, name, body)
        self._processes.append(process)
        return process

    def kill(self, process: Process) -> None:
        assert process is not self._current
        if not process.has_ended:
            process.is_killed = True
            self._give_turn(process)
            assert process.has_ended, f"{process.name} does not die"

    # --- what a process uses ----------------------------------------------------------------------

    def sleep(self, duration_ns: int) -> None:
        """Let time pass for the process whose turn it is."""
        self._pause((), self.now_ns + duration_ns)

    def wait(self, descriptors: Iterable[int], timeout_ns: int) -> frozenset[int]:
        """Stand in for `checkpoint.waiting.wait_readable`."""
        watched = tuple(descriptors)
        self._pause(watched, self.now_ns + min(max(0, timeout_ns), LONGEST_WAIT_NS))
        return frozenset(d for d in watched if self._ready[d]())

    def _pause(self, descriptors: tuple[int, ...], deadline_ns: int) -> None:
        process = self._current
        assert process is not None, "only a process can wait"
        if process.is_killed:
            raise Killed
        process.descriptors, process.deadline_ns = descriptors, deadline_ns
        process.give_back_turn()

    # --- the scheduler ----------------------------------------------------------------------------

    def run(self, until_ns: int) -> None:
        """Let everything happen up to and including `until_ns`."""
        turns = 0
        while True:
            runnable = next((p for p in self._processes if self._is_runnable(p)), None)
            if runnable is not None:
                turns += 1
                assert turns < TURNS_AT_ONCE_MAX, f"{runnable.name} spins at {self.now_ns / MS} ms"
                self._give_turn(runnable)
                continue
            next_ns = min(
                self._events[0][0] if self._events else FOREVER_NS,
                *(p.deadline_ns for p in self._processes if not p.has_ended),
                FOREVER_NS,
            )
            if next_ns > until_ns:
                self.now_ns = until_ns
                return
            if next_ns > self.now_ns:
                turns = 0
            self.now_ns = max(self.now_ns, next_ns)
            while self._events and self._events[0][0] <= self.now_ns:
                heapq.heappop(self._events)[2]()

    def close(self) -> None:
        """End every thread."""
        for process in self._processes:
            self.kill(process)
        self.threads.shutdown()

    def _is_runnable(self, process: Process) -> bool:
        if process.has_ended:
            return False
        if self.now_ns >= process.deadline_ns:
            return True
        return any(self._ready[d]() for d in process.descriptors)

    def _give_turn(self, process: Process) -> None:
        self._current = process
        process.turn.release()
        assert self.back.acquire(timeout=TURN_SECONDS_MAX), f"{process.name} waits for real"
        self._current = None
        error = process.error() if process.has_ended else None
        if error is not None:
            raise AssertionError(f"{process.name} died: {error!r}") from error
