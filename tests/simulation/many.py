"""Runs seeds in several processes."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context, parent_process

from tests.simulation.cluster import Result, run_seed

SEEDS_PER_POOL = 400


def results(seeds: range, steps: int, jobs: int) -> Iterator[Result]:
    """Yield what each seed gave, in order; ends its processes when it ends."""
    run = partial(run_seed, steps=steps)
    if jobs == 1:
        yield from map(run, seeds)
        return
    for first in range(seeds.start, seeds.stop, SEEDS_PER_POOL):  # old processes grow fat
        with ProcessPoolExecutor(
            jobs, mp_context=get_context("spawn"), initializer=end_with_parent
        ) as processes:
            try:
                yield from processes.map(run, range(first, min(first + SEEDS_PER_POOL, seeds.stop)))
            finally:
                processes.shutdown(wait=False, cancel_futures=True)


def end_with_parent() -> None:
    """End this process when the one that started it has died, however it died."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
