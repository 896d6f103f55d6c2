"""One simulation: hosts, controllers, a store and VMs, made from a seed, run, and judged.

First everything goes wrong for a number of steps. Then all faults end, and what is to be protected
must be protected again within `SETTLE_NS`: every VM runs once or is said to be gone.
"""

import gc
import itertools
import logging
import os
import shutil
import tempfile
import traceback
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from unittest.mock import patch

from tests.simulation.control_plane import Controller
from tests.simulation.faults import Faults
from tests.simulation.guest import History
from tests.simulation.host import Cluster, SimulatedHost, in_place_of_the_machine
from tests.simulation.kernel import SECOND, Clock, Kernel, RuleBroken
from tests.simulation.network import Network
from tests.simulation.operating import Operator
from tests.simulation.qemu import Qemus
from tests.simulation.rules import Rules
from tests.simulation.store import STORE, SimulatedStore

from holdfast_api.words import Phase

STEPS = 6_000
QUIET_NS = 4 * SECOND
SETTLE_NS = 420 * SECOND
BEATS_PER_SECOND = (1, 2, 200)
"""With the first, every host is asked to beat only each few seconds, as a thousand hosts are."""
SHARED_MEMORY = Path("/dev/shm")
PREFIX = "holdfast-simulation-"


@dataclass
class Result:
    """What one seed gave."""

    seed: int
    steps: int = 0
    simulated_seconds: float = 0.0
    settled_seconds: float = 0.0
    totals: Counter[str] = field(default_factory=Counter)
    happened: Counter[str] = field(default_factory=Counter)
    broken: str = ""
    """What was broken, in one line; empty if nothing was."""
    lines: tuple[str, ...] = ()
    trace: str = ""


class Simulation:
    """Everything of one seed."""

    def __init__(self, seed: int, folder: Path, *, keeps_all_lines: bool) -> None:
        random = Random(seed)
        self.kernel = kernel = Kernel(random, keeps_all_lines=keeps_all_lines)
        self.happened: Counter[str] = Counter()
        self.network = Network(kernel, self.happened)
        self.qemus = Qemus()
        self.vms = [f"vm{number}" for number in range(1, 1 + random.choice((1, 1, 2, 3)))]
        histories = {vm: History(vm) for vm in self.vms}
        self.rules = Rules(kernel, self.qemus, histories)
        kernel.after_step = self.rules.after_step
        self.store = SimulatedStore(kernel, self.network, self.happened)
        self.store.on_change = self.rules.store_changed
        beats_per_second_max = kernel.random.choice(BEATS_PER_SECOND)
        self.controllers = [
            Controller(kernel, self.store, name, self._clock(), self.happened, beats_per_second_max)
            for name in ("c1", "c2")
        ]
        self.cluster = Cluster(
            kernel,
            self.network,
            self.qemus,
            self.rules,
            self.controllers,
            folder,
            histories,
            random.choice((0.05, 0.3, 0.7)),
        )
        for number in range(1, 1 + random.choice((3, 3, 4))):
            name = f"h{number}"
            self.cluster.hosts[name] = SimulatedHost(self.cluster, name, self._clock())
        self.hosts = list(self.cluster.hosts.values())
        self._incarnations = itertools.count(1)
        self.operator = Operator(self)
        for vm in self.vms:
            self._boot(vm, has_disk=random.random() < 0.1)
            self.operator.want(vm)

    def _clock(self) -> Clock:
        random = self.kernel.random
        return Clock(self.kernel, random.randint(SECOND, 10**6 * SECOND), random.randint(-400, 400))

    def parties(self) -> list[str]:
        return [*self.cluster.hosts, *(c.name for c in self.controllers), STORE]

    def _boot(self, vm: str, *, has_disk: bool) -> None:
        number = next(self._incarnations)
        self.rules.incarnations[vm] = number
        host = self.kernel.random.choice([host for host in self.hosts if host.has_power])
        self.kernel.log("operator", f"boots {vm} on {host.name}")
        host.boot_vm(vm, number, has_disk=has_disk)

    def boot_again(self, vm: str) -> bool:
        """Boot a VM of which nothing is left anywhere; return whether that was done."""
        left = [qemu for qemu in self.qemus.alive() if qemu.vm_name == vm]
        if left and not all(qemu.vm.has_shut_down for qemu in left):
            return False
        for qemu in left:
            qemu.vm.crash()
        if all(host.has_power for host in self.hosts):
            self._boot(vm, has_disk=False)
        return True

    # --- the run ----------------------------------------------------------------------------------

    def run(self, steps: int) -> float:
        """Let things go wrong for so many steps, then settle; return the seconds that took."""
        kernel = self.kernel
        kernel.run(QUIET_NS)
        pause_ns = kernel.random.choice((SECOND // 4, SECOND, 3 * SECOND))
        faults = Faults(self, pause_ns=pause_ns)
        kernel.run(1 << 62, steps_max=kernel.steps + steps)
        faults.stop()
        kernel.log("FAULT", "all faults have ended")
        began_ns = kernel.now_ns
        while (unsettled := self._unsettled()) and kernel.now_ns < began_ns + SETTLE_NS:
            # Not in step with checkpoints: a guest that is looked at in each capture never runs.
            kernel.run(kernel.now_ns + kernel.random.randint(SECOND // 4, SECOND))
        if unsettled:
            raise RuleBroken(
                f"not settled {SETTLE_NS / SECOND:.0f} s after all faults: {unsettled}"
            )
        return (kernel.now_ns - began_ns) / SECOND

    def _unsettled(self) -> str:
        """Return what is not as it should be; empty when all is well."""
        for vm in self.vms:
            record = self.rules.records.get(vm)
            guests = [q for q in self.qemus.alive() if q.vm_name == vm and not q.is_standby]
            places = [q.host for q in guests]
            if len(guests) != 1:
                return f"{vm} is on {places}, record {record}"
            if vm not in self.operator.wanted:
                self.operator.want(vm)
                return f"{vm} is not wanted yet"
            if guests[0].vm.has_disk:
                if record is not None:
                    return f"{vm} has a disk and a record {record}"
            elif record is None or record.phase is not Phase.PROTECTED:
                return f"{vm} is not protected: {record}"
            elif record.primary != places[0] or not guests[0].vm.is_running:
                return f"{vm} stands or is elsewhere ({places}): {record}"
        return ""


def run_seed(seed: int, *, steps: int = STEPS, keeps_all_lines: bool = False) -> Result:
    """Run one seed; what is broken is in the result."""
    result = Result(seed)
    logging.disable(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited")  # of processes that died
    names = (f"{number:032x}" for number in itertools.count())
    place = SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
    _remove_leftovers(place)
    gc.disable()
    with (
        tempfile.TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}-", dir=place) as folder,
        patch("secrets.token_hex", lambda _=None: next(names)),
    ):
        simulation = Simulation(seed, Path(folder), keeps_all_lines=keeps_all_lines)
        try:
            with in_place_of_the_machine(simulation.cluster), ThreadPoolExecutor(1) as thread:
                running = thread.submit(simulation.run, steps)
                error = running.exception()
            if error is None:
                result.settled_seconds = running.result()
            else:
                result.broken = f"{type(error).__name__}: {error}"
                result.trace = "".join(traceback.format_exception(error))
        finally:
            kernel = simulation.kernel
            with in_place_of_the_machine(simulation.cluster):
                kernel.close()
    result.steps, result.simulated_seconds = kernel.steps, kernel.now_ns / SECOND
    result.totals, result.happened = simulation.rules.totals, simulation.happened
    result.lines = tuple(kernel.kept)
    gc.enable()
    gc.collect()
    logging.disable(logging.NOTSET)
    return result


def _remove_leftovers(place: Path) -> None:
    """Remove the folders of simulations that were killed."""
    for path in place.glob(f"{PREFIX}*"):
        pid = path.name.removeprefix(PREFIX).partition("-")[0]
        if not Path("/proc", pid).exists():
            shutil.rmtree(path, ignore_errors=True)
