"""Measures harvest and copy of guest memory against a plain numpy copy of as many pages.

Run: `python bench/memory.py [--epochs 60] [-o json]`. Needs root and 5 GB of memory; measures what
the kernel offers: scans with Linux 6.7, soft-dirty marks (private memory) where they are built in,
as in a booted host (`./dev booted --memory-mb 6144 .venv/bin/python bench/memory.py`).

Each case is a process with one RAM block, all of it populated, that writes to random pages between
the epochs and stands still while it is harvested, as a guest does. The anchor is `numpy.take` of
the same page numbers from an array of ours into aligned rows, measured in the same run beside each
epoch; `ratio` is (harvest + copy) / anchor. All figures are medians.
"""

import argparse
import importlib.util
import json
import mmap
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from holdfast_agent.core.memory_map import (
    PAGE_SIZE_BYTES,
    MemoryMap,
    PageIndexes,
    PageRows,
    empty_rows,
)
from holdfast_agent.memory import (
    BlockLocation,
    GuestMemory,
    PagemapScanTracker,
    SoftDirtyTracker,
    unavailable,
    zero_pages,
)
from holdfast_agent.memory.injection import run_in_process

CASES = ((256, 620), (2048, 4000))
TARGET = Path(__file__).parents[1] / "tests" / "integration" / "memory" / "target.py"


def load_target() -> Any:
    """Import the target process the tests use."""
    spec = importlib.util.spec_from_file_location("holdfast_memory_target", TARGET)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def plain_memory(size_bytes: int) -> PageRows:
    """Return an array of pages in small pages, as the kernel gives to a guest."""
    mapping = mmap.mmap(-1, size_bytes)
    pages: PageRows = np.frombuffer(mapping, dtype=np.uint8).reshape(-1, PAGE_SIZE_BYTES)
    pages[:, 0] = 1
    return pages


def timed_ms(call: Callable[[], object]) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def measure(
    target: Any,
    memory: GuestMemory,
    tracker: PagemapScanTracker | SoftDirtyTracker,
    dirty: int,
    epochs: int,
) -> dict[str, float]:
    """Return the medians over the epochs of one tracker on one target."""
    chance = np.random.default_rng(7)
    page_count = memory.memory_map.page_count
    anchor = plain_memory(memory.memory_map.size_bytes)
    rows = empty_rows(dirty + 64)
    found: list[PageIndexes] = []
    samples: dict[str, list[float]] = {
        name: [] for name in ("harvest", "copy_out", "copy_in", "zero_pages", "numpy")
    }
    for epoch in range(epochs + 3):
        pages = chance.choice(page_count, dirty, replace=False)
        target.run(do="write", block="ram", pages=pages.tolist(), value=epoch % 256)
        times = {"harvest": timed_ms(lambda: found.append(tracker.harvest()))}
        indexes = found[-1]
        assert len(indexes) >= dirty * 0.98, "the target did not write"
        part = rows[: len(indexes)]
        times["copy_out"] = timed_ms(lambda i=indexes, p=part: memory.copy_out(i, p))  # type: ignore[misc]
        times["numpy"] = timed_ms(
            lambda i=indexes, p=part: np.take(anchor, i, axis=0, out=p, mode="clip")  # type: ignore[misc]
        )
        times["zero_pages"] = timed_ms(lambda p=part: zero_pages(p))  # type: ignore[misc]
        memory.copy_out(indexes, part)
        times["copy_in"] = timed_ms(lambda i=indexes, p=part: memory.copy_in(i, p))  # type: ignore[misc]
        tracker.harvest()  # copying in counts as written
        if epoch >= 3:
            for name, value in times.items():
                samples[name].append(value)
    medians = {f"{name}_ms": statistics.median(values) for name, values in samples.items()}
    copied_bytes = dirty * PAGE_SIZE_BYTES
    medians["copy_out_gb_s"] = copied_bytes / medians["copy_out_ms"] / 1e6
    medians["numpy_gb_s"] = copied_bytes / medians["numpy_ms"] / 1e6
    medians["ratio"] = (medians["harvest_ms"] + medians["copy_out_ms"]) / medians["numpy_ms"]
    return medians


def run_case(module: Any, size_mib: int, dirty: int, kind: str, epochs: int) -> list[Any]:
    """Return one row per way to harvest."""
    page_count = (size_mib << 20) // PAGE_SIZE_BYTES
    results = []
    with module.Target([module.Block("ram", page_count, kind)]) as target:
        target.run(do="fill", block="ram")
        locations = [BlockLocation(**block) for block in target.blocks]
        memory_map = MemoryMap.of_sizes((it.name, it.size_bytes) for it in locations)
        memory = GuestMemory(target.pid, locations, memory_map)
        inject_ms = timed_ms(lambda: run_in_process(target.pid, lambda _: None, 5.0))
        given = (target.pid, locations, memory_map)
        ways: dict[str, PagemapScanTracker | SoftDirtyTracker] = {}
        if unavailable("pagemap-scan") is None:
            ways["one-step"] = PagemapScanTracker(*given)
            ways["two-step"] = PagemapScanTracker(*given, two_step=True)
        if unavailable("soft-dirty") is None and kind == "private":
            ways["soft-dirty"] = SoftDirtyTracker(*given)
        for way, tracker in ways.items():
            start_ms = timed_ms(tracker.start)
            row = measure(target, memory, tracker, dirty, epochs)
            close_ms = timed_ms(tracker.close)
            results.append(
                {"size_mib": size_mib, "dirty_pages": dirty, "kind": kind, "way": way}
                | {name: round(value, 3) for name, value in row.items()}
                | {"start_ms": round(start_ms, 1), "close_ms": round(close_ms, 1)}
                | {"inject_ms": round(inject_ms, 2)}
            )
        memory.close()
    return results


def main() -> None:
    """Run all cases and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table")
    options = parser.parse_args()
    module = load_target()
    rows = [
        row
        for size_mib, dirty in CASES
        for kind in ("shared", "private")
        for row in run_case(module, size_mib, dirty, kind, options.epochs)
    ]
    if options.output == "json":
        print(json.dumps(rows, indent=1))
        return
    names = list(rows[0])
    print("  ".join(names))
    for row in rows:
        print("  ".join(str(row[name]).rjust(len(name)) for name in names))


if __name__ == "__main__":
    main()
