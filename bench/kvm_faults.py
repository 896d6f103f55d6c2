"""Counts what each way of harvesting costs a KVM guest in page faults, by KVM's own counter.

Run inside a booted host (`./dev booted --kernel 6.12 --memory-mb 3072 --modules kvm_amd,kvm
.venv/bin/python bench/kvm_faults.py`) or on any host with KVM, as root. The guest reads 8,000 pages
and writes 200 of them in each round, without end (`kvm_faults_guest.S`). An epoch is at least one
whole round; then the guest is stopped and harvested. `faults` is how much `pf_fixed` of
/sys/kernel/debug/kvm rose from a harvest to the next stop: a count that no noise can blur. All
figures are medians over the epochs.
"""

import argparse
import json
import socket
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from holdfast_agent.core.memory_map import MemoryMap, empty_rows
from holdfast_agent.hypervisor.guest_memory import locate_blocks
from holdfast_agent.hypervisor.qmp import QmpConnection
from holdfast_agent.memory import GuestMemory, PagemapScanTracker, SoftDirtyTracker, unavailable

GUEST = Path(__file__).with_name("kvm_faults_guest.S")
PF_FIXED = Path("/sys/kernel/debug/kvm/pf_fixed")
COUNTER_PAGE = 0x80000 // 4096
READS, WRITES = 8000, 200
FIRST_PAGE = 0x1000000 // 4096
PATIENCE_SECONDS = 300.0


class Guest:
    """The running guest and its memory."""

    def __init__(self, folder: Path, *, reads: int = READS, writes: int = WRITES) -> None:
        """Compile and start it; waits until it has gone around once."""
        image, qmp = folder / "guest.elf", folder / "qmp"
        subprocess.run(
            [
                *("gcc", "-m32", "-nostdlib", "-static", "-Wl,-Ttext=0x100000,--build-id=none"),
                *(f"-DREADS={reads}", f"-DWRITES={writes}", "-o", str(image), str(GUEST)),
            ],
            check=True,
        )
        self.process = subprocess.Popen(
            [
                *("qemu-system-x86_64", "-accel", "kvm", "-cpu", "max,cx16=off", "-m", "64"),
                *("-nodefaults", "-display", "none", "-vga", "none", "-kernel", str(image)),
                *("-qmp", f"unix:{qmp},server=on,wait=off"),
            ]
        )
        wait_until(lambda: listens(qmp), "QEMU's monitor")
        self.qmp = QmpConnection.connect(qmp)
        self.blocks = locate_blocks(self.qmp, self.process.pid)
        self.memory_map = MemoryMap.of_sizes((it.name, it.size_bytes) for it in self.blocks)
        self.memory = GuestMemory(self.process.pid, self.blocks, self.memory_map)
        self._page = empty_rows(1)
        self._counter = np.array([self._first_page_of_ram() + COUNTER_PAGE])
        wait_until(lambda: self.rounds() > 0, "the guest's first round")

    def rounds(self) -> int:
        """Return how often the guest has gone around."""
        self.memory.copy_out(self._counter, self._page)
        return int(self._page.view(np.uint32)[0, 0])

    def run_an_epoch(self) -> None:
        """Let it run for some rounds and stop it."""
        begin = self.rounds()
        self.qmp.execute("cont")
        # The first one may have begun before.
        wait_until(lambda: self.rounds() >= begin + 2, "a whole round of the guest")
        self.qmp.execute("stop")

    def end(self) -> None:
        """End QEMU and let go of it."""
        self.memory.close()
        self.qmp.close()
        self.process.kill()
        self.process.wait()

    def _first_page_of_ram(self) -> int:
        return next(block.first_page for block in self.memory_map.blocks if "ram" in block.name)


def listens(path: Path) -> bool:
    """Return whether the socket takes connections; QEMU makes its file a little before."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def wait_until(condition: Any, what: str) -> None:
    """Poll until `condition` holds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.002)


def trackers(guest: Guest) -> dict[str, Any]:
    """Return the ways to harvest that this kernel offers."""
    given = (guest.process.pid, guest.blocks, guest.memory_map)
    found: dict[str, Any] = {}
    if unavailable("pagemap-scan") is None:
        found["one-step"] = PagemapScanTracker(*given)
        found["two-step"] = PagemapScanTracker(*given, two_step=True)
    if unavailable("soft-dirty") is None:
        found["soft-dirty"] = SoftDirtyTracker(*given)
    return found


def measure(guest: Guest, tracker: Any, epochs: int) -> dict[str, float]:
    """Return the medians of one tracker; the guest stands before and after."""
    tracker.start()
    samples: dict[str, list[float]] = {"faults": [], "pages": [], "harvest_ms": []}
    try:
        for epoch in range(epochs + 2):
            before = int(PF_FIXED.read_text())
            guest.run_an_epoch()
            faults = int(PF_FIXED.read_text()) - before
            began = time.perf_counter()
            pages = tracker.harvest()
            harvest_ms = (time.perf_counter() - began) * 1e3
            assert len(pages) >= WRITES, "writes under KVM were not seen"
            if epoch >= 2:  # huge pages are split in the first ones
                samples["faults"].append(faults)
                samples["pages"].append(len(pages))
                samples["harvest_ms"].append(harvest_ms)
    finally:
        tracker.close()
    return {name: round(statistics.median(values), 2) for name, values in samples.items()}


def main() -> None:
    """Measure all ways side by side and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        guest = Guest(Path(folder))
        try:
            guest.qmp.execute("stop")
            rows = {
                name: measure(guest, tracker, options.epochs)
                for name, tracker in trackers(guest).items()
            }
        finally:
            guest.end()
    if options.output == "json":
        print(json.dumps(rows, indent=1))
        return
    for name, row in rows.items():
        print(name.ljust(12), "  ".join(f"{key} {value:g}" for key, value in row.items()))


if __name__ == "__main__":
    main()
