"""A VM whose memory tells its whole history, so that what the world saw can be held against it.

Page 0 says how many packets the guest has ever sent, page k their texts, one page each; the last
pages change with every tick of the guest's work. What the guest has in its registers is its device
state: memory of one moment and registers of another do not fit together, and that shows.

A device is at work on one page whenever it can do harm: a harvest that finds the guest running
finds this page pinned, and what the device puts there before the guest next stands is marked
nowhere.

`SimulatedVm` is the ports `VirtualMachine`, `MemoryCopier` and `DirtyTracker` in one.
"""

import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tests.scenarios.simulation import MS, World

from holdfast_agent.core.failures import (
    VirtualMachineFailed,
    VirtualMachineGone,
    VirtualMachineNotRunning,
)
from holdfast_agent.core.memory_map import PAGE_SIZE_BYTES, MemoryMap, PageIndexes, PageRows

PAGE_COUNT = 64
WORK_FIRST_PAGE = 48
STATIC_PAGES = 16
DEVICE_PAGE = WORK_FIRST_PAGE - 1
STOP_NS = 400_000
SAVE_NS = 600_000
RESUME_NS = 250_000
PROMOTE_NS = 8 * MS
TICK_NS = 10 * MS


@dataclass(frozen=True)
class Packet:
    """The guest's `index`-th packet, from 1."""

    index: int
    text: str


@dataclass(frozen=True)
class Event:
    """What QEMU says by itself."""

    name: str
    reason: str = ""


class SimulatedVm:
    """One QEMU with one guest."""

    def __init__(self, world: World, host: str, nic: Callable[[Packet], None]) -> None:
        self._world = world
        self._host = host
        self.nic = nic
        self.memory = np.zeros((PAGE_COUNT, PAGE_SIZE_BYTES), dtype=np.uint8)
        self.is_alive = True
        self.is_running = False
        self.has_shut_down = False
        self.failing_saves = 0
        self._is_final = self._is_capturing = False
        self.work = 0
        self.stood_with = self.memory.copy()
        """Memory when the guest last stood still for a checkpoint."""
        self._dirty = np.zeros(PAGE_COUNT, dtype=np.bool_)
        self._pinned_times = 0
        self._is_pinned = False
        self._waiting: deque[str] = deque()
        self._events: list[Event] = []
        self._descriptor = world.descriptor(lambda: bool(self._events))
        self.name = "simulated"
        self.can_harvest_running = True

    # --- the guest --------------------------------------------------------------------------------

    def boot(self) -> None:
        """Begin to run; the guest works from now on whenever it may."""
        if not self.work:
            for page in range(WORK_FIRST_PAGE - STATIC_PAGES, PAGE_COUNT):
                self._write(page, f"page {page} as it was at boot")
        self.is_running = True
        self._tick()

    def _tick(self) -> None:
        if not self.is_alive:
            return
        if self.is_running:
            self.work += 1
            page = WORK_FIRST_PAGE + self.work % (PAGE_COUNT - WORK_FIRST_PAGE)
            self._write(page, str(self.work))
        self._world.after(TICK_NS, self._tick)

    def say(self, text: str) -> None:
        """Have the guest send `text` as soon as it runs."""
        self._waiting.append(text)
        self._speak()

    def _speak(self) -> None:
        while self._waiting and self.is_running and self.is_alive:
            packet = Packet(self.packet_count + 1, self._waiting.popleft())
            self._write(packet.index, packet.text)
            self._write(0, str(packet.index))
            self.nic(packet)

    def shut_down(self) -> None:
        """Let the guest power itself off."""
        assert self.is_running
        self.is_running = False
        self.has_shut_down = True
        self._events.append(Event("SHUTDOWN", "guest-shutdown"))

    def crash(self) -> None:
        """End QEMU."""
        self.is_alive = self.is_running = False
        self._events.append(Event("GONE"))

    def pause(self) -> None:
        """Stop the guest behind everybody's back, as an operator may."""
        self.is_running = False

    def unpause(self) -> None:
        self.is_running = True
        self._speak()

    @property
    def packet_count(self) -> int:
        return int(self.text_of(0) or 0)

    def text_of(self, page: int) -> str:
        return bytes(self.memory[page]).rstrip(b"\0").decode()

    def _write(self, page: int, text: str, *, is_seen: bool = True) -> None:
        data = np.frombuffer(text.encode(), dtype=np.uint8)
        self.memory[page] = 0
        self.memory[page, : len(data)] = data
        self._dirty[page] |= is_seen

    # --- port VirtualMachine ----------------------------------------------------------------------

    def prepare(self) -> None:
        """Nothing is sent beforehand."""

    def begin_capture(self, *, final: bool) -> None:
        self._must_live()
        self._is_final = final

    def wait_standing(self) -> None:
        if not self.stop():
            raise VirtualMachineNotRunning("shutdown" if self.has_shut_down else "paused")
        self._is_capturing = True
        self.stood_with = self.memory.copy()

    def finish_capture(self) -> bytes:
        assert not self.is_running, "devices are saved while the guest stands"
        state = json.dumps({"work": self.work, "packets": self.packet_count}).encode()
        self._take(SAVE_NS)
        if self.failing_saves:
            self.failing_saves -= 1
            self._world.log(self._host, "QEMU can not save its devices")
            self.abandon_capture()
            raise VirtualMachineFailed("can not save", command="xen-save-devices-state")
        self._is_capturing = False
        if not self._is_final:
            self.resume()
        return state

    def abandon_capture(self) -> None:
        if self._is_capturing:
            self._is_capturing = False
            self.resume()

    def resume(self) -> None:
        self._take(RESUME_NS)
        if not self.has_shut_down:
            self.is_running = True
            self._speak()

    def stop(self) -> bool:
        was_running = self.is_running
        self._take(STOP_NS)
        self.is_running = False
        if self._is_pinned:
            self._is_pinned = False
            self._write(DEVICE_PAGE, f"read from the disk, {self._pinned_times}", is_seen=False)
        return was_running

    def poll_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def fileno(self) -> int:
        return self._descriptor

    def kill(self) -> None:
        self.is_alive = self.is_running = False

    def close(self) -> None:
        """Nothing is open."""

    def _take(self, duration_ns: int) -> None:
        self._must_live()
        self._world.sleep(duration_ns)
        self._must_live()

    def _must_live(self) -> None:
        if not self.is_alive:
            raise VirtualMachineGone("QEMU is gone")

    # --- ports MemoryCopier and DirtyTracker ------------------------------------------------------

    @property
    def memory_map(self) -> MemoryMap:
        return MemoryMap.of_sizes([("ram", PAGE_COUNT * PAGE_SIZE_BYTES)])

    def copy_out(self, indexes: PageIndexes, out: PageRows) -> None:
        out[: len(indexes)] = self.memory[indexes]

    def copy_in(self, indexes: PageIndexes, rows: PageRows) -> None:
        self._must_live()
        self.memory[indexes] = rows

    def populated(self) -> PageIndexes:
        return np.flatnonzero(self.memory.any(axis=1))

    def harvest(self) -> PageIndexes:
        self._must_live()
        if self.is_running:
            self._is_pinned = self._dirty[DEVICE_PAGE] = True
            self._pinned_times += 1
        dirty = np.flatnonzero(self._dirty)
        self._dirty[:] = False
        return dirty

    def copied(self, indexes: PageIndexes, rows: PageRows) -> None:
        """A tracker by marks learns nothing from copies."""


class SimulatedStandby:
    """Port `Standby`: a VM that does not run yet."""

    def __init__(self, world: World, host: str, vm: SimulatedVm) -> None:
        self._world = world
        self._host = host
        self.vm = vm
        self.memory = vm
        self.was_promoted = False
        self.on_promote: Callable[[], None] = lambda: None

    def fileno(self) -> int:
        return self.vm.fileno()

    def has_ended(self) -> bool:
        self.vm.poll_events()
        return not self.vm.is_alive

    def promote(self, device_state: bytes) -> None:
        self._world.sleep(PROMOTE_NS)
        if not self.vm.is_alive:
            raise VirtualMachineGone("the standby's QEMU is gone")
        registers = json.loads(device_state)
        assert registers["packets"] == self.vm.packet_count, "memory and registers do not fit"
        self.vm.work = registers["work"]
        self.on_promote()
        self.was_promoted = True
        self._world.log(self._host, "the standby runs")
        self.vm.boot()

    def destroy(self) -> None:
        if self.vm.is_alive:
            self._world.log(self._host, "the standby is destroyed")
        self.vm.kill()
