"""Runs seeds of the simulation and prints what happened.

    python -m tests.simulation --seed 7 [--steps 6000] [--log]
    python -m tests.simulation --seeds 0:2000 --jobs 2

One seed is the same run every time, and its last lines are printed (with `--log` all of them). Many
seeds end with totals. Exits 1 if a rule was broken, or if nothing ever failed over, or a kind of
fault never happened: such a set shows nothing.
"""

import argparse
import os
import sys
import time
from collections import Counter

from tests.simulation.cluster import STEPS, run_seed
from tests.simulation.faults import COUNTED
from tests.simulation.many import results

NEEDED = ("wins", "losses", "failovers", "switchovers", "re-protections", "VMs ended or lost")
FEW_SEEDS = 30
"""So few need not have seen every kind of fault."""
LINES_SHOWN = 60


def main() -> int:
    """Run what is asked for; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("--seed", type=int, help="run this one and print its log")
    parser.add_argument("--seeds", help="run FROM:TO and print totals")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps until all faults end")
    parser.add_argument("--jobs", type=int, default=1, help="processes that run seeds")
    parser.add_argument("--log", action="store_true", help="print every line of one seed")
    parser.add_argument("--stop", action="store_true", help="stop at the first seed that fails")
    options = parser.parse_args()
    _want_the_same_hashes()
    if options.seeds is None:
        return _one(options.seed or 0, options.steps, all_lines=options.log)
    first, _, end = options.seeds.partition(":")
    seeds = range(int(first), int(end))
    return _many(seeds, options.steps, options.jobs, stop=options.stop)


def _want_the_same_hashes() -> None:
    """Start again with hashes that are the same in every process: sets of words have an order."""
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]])


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _one(seed: int, steps: int, *, all_lines: bool) -> int:
    result = run_seed(seed, steps=steps, keeps_all_lines=all_lines)
    lines = result.lines if all_lines else result.lines[-LINES_SHOWN:]
    _say("\n".join(lines))
    _say_counts("happened", result.totals)
    _say_counts("faults", result.happened)
    _say(
        f"seed {seed}: {result.steps} steps, {result.simulated_seconds:.1f} simulated seconds, "
        f"settled after {result.settled_seconds:.1f} s"
    )
    if result.broken:
        _say(f"{result.trace}\nseed {seed} BROKEN: {result.broken}")
    return 1 if result.broken else 0


def _many(seeds: range, steps: int, jobs: int, *, stop: bool) -> int:
    began = time.monotonic()
    totals: Counter[str] = Counter()
    happened: Counter[str] = Counter()
    count = step_count = 0
    longest, broken = 0.0, []
    for result in results(seeds, steps, jobs):
        count, step_count = count + 1, step_count + result.steps
        totals += result.totals
        happened += result.happened
        longest = max(longest, result.settled_seconds)
        if result.broken:
            broken.append(result.seed)
            _say(f"seed {result.seed} BROKEN: {result.broken[:600]}")
            if stop:
                break
    _say_counts("happened", totals)
    _say_counts("faults", happened)
    _say(
        f"{count} seeds, {step_count} steps, longest settling {longest:.1f} simulated seconds, "
        f"{time.monotonic() - began:.0f} s"
    )
    _say(f"{len(broken)} broken" + (f": {broken}" if broken else ""))
    return 1 if broken or _shows_nothing(count, totals, happened) else 0


def _shows_nothing(count: int, totals: Counter[str], happened: Counter[str]) -> bool:
    """Whether something that must be seen was not; says what."""
    missing = [] if totals["failovers"] else ["failovers"]
    if count >= FEW_SEEDS:
        missing += [name for name in NEEDED if not totals[name] and name not in missing]
        missing += [name for name in COUNTED if not happened[name]]
    if missing:
        _say(f"never happened, so this shows nothing: {', '.join(missing)}")
    return bool(missing)


def _say_counts(title: str, counts: Counter[str]) -> None:
    _say(f"{title}: " + ", ".join(f"{name} {number}" for name, number in sorted(counts.items())))


if __name__ == "__main__":
    sys.exit(main())
