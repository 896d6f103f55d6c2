"""Break the code on purpose, one line at a time: every mutant must be killed by its tests.

    python tests/mutation/run.py [WORD] [--seed N] [--every-suite | --simulation]

Runs the mutants whose name, rule or file contains WORD, two at a time, each in a copy of the tree
in a temporary folder; the tree itself is never written to. The suites of a mutant are asked in
turn until one fails; with `--every-suite` each is asked. With `--simulation` nothing is asked but
the simulator, which says the first seed that catches the mutant. On unbroken code all must pass.
Exits 1 if a mutant lives, no longer applies or is not decided by its deadline. Ctrl-C ends
all tests and removes the copies.
"""

import argparse
import contextlib
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.mutation.mutants import MUTANTS, SIMULATION, Mutant  # noqa: E402 - found from here on

ROOMS = ("api", "controller", "agent", "deploy")
COPIES = 2
SECONDS_MAX = 180.0
"""For one mutant and all its suites; unbroken code takes a quarter of it when the machine is idle.
Unbroken code itself, which is asked all suites there are, has as long for each of them."""

SIMULATION_SECONDS_MAX = 900.0
SIMULATION_SEEDS = 200
SIMULATION_STEPS = 2500

CAUGHT = re.compile(r"^(seed \d+) BROKEN: (.*)$", re.MULTILINE)
FAILED = re.compile(r"^FAILED (\S+?)(?: - (.*))?$", re.MULTILINE)


class Stopped(Exception):  # noqa: N818 - reads as a sentence where it is raised
    """Nothing is started any more."""


@dataclass(frozen=True)
class Verdict:
    """What became of one mutant."""

    word: str
    reasons: tuple[str, ...] = ()


class Tests:
    """Runs pytest in copies of the tree; every process is in its own group and ends with us."""

    def __init__(self, seed: int | None) -> None:
        self._seed = seed
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._is_stopped = False

    def run(self, tree: Path, suite: str, seconds: float) -> Verdict:
        """Return `passes`, `killed`, `TIMEOUT` or `BROKEN` for one suite."""
        command = _simulation() if suite == SIMULATION else self._pytest(suite)
        paths = os.pathsep.join(str(tree / room) for room in (*ROOMS, "."))
        with self._lock:
            if self._is_stopped:
                raise Stopped
            process = subprocess.Popen(
                command,
                cwd=tree,
                env=os.environ
                | {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "300"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            self._running.add(process)
        try:
            output, _ = process.communicate(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            return Verdict("TIMEOUT", (f"{suite} took longer than was left",))
        finally:
            self._end(process)
        return _read(suite, process.returncode, output)

    def _pytest(self, suite: str) -> list[str]:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-p", "no:cacheprovider"]
        command += ["-p", "tests.mutation.first_failure", suite]
        if self._seed is not None:
            command.append(f"--hypothesis-seed={self._seed}")
        return command

    def stop(self) -> None:
        """End what runs and start nothing more."""
        with self._lock:
            self._is_stopped = True
            for process in self._running:
                _kill_group(process)

    def _end(self, process: "subprocess.Popen[str]") -> None:
        _kill_group(process)
        process.communicate()
        with self._lock:
            self._running.discard(process)


def _simulation() -> list[str]:
    """Return the command that runs seeds until one is broken."""
    seeds, steps = f"0:{SIMULATION_SEEDS}", str(SIMULATION_STEPS)
    command = [sys.executable, "-W", "ignore", "-m", "tests.simulation"]
    return [*command, "--seeds", seeds, "--steps", steps, "--stop"]


def _kill_group(process: "subprocess.Popen[str]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _read(suite: str, code: int, output: str) -> Verdict:
    """Only a test that failed kills; a suite that can not even be collected says nothing."""
    if code == 0:
        return Verdict("passes")
    failed = CAUGHT.search(output) if suite == SIMULATION else FAILED.search(output)
    if code == 1 and failed is not None:
        return Verdict("killed", (f"{failed[1]}: {failed[2] or 'failed'}",))
    return Verdict("BROKEN", (f"{suite}: exit code {code}\n{output[-2000:]}",))


def _ask(
    tests: Tests, tree: Path, suites: tuple[str, ...], seconds: float, *, every: bool
) -> Verdict:
    """Ask one suite after the other until one fails, or each; return what they say together."""
    deadline = time.monotonic() + seconds
    verdicts: list[Verdict] = []
    for suite in suites:
        verdict = tests.run(tree, suite, deadline - time.monotonic())
        if verdict.word == "passes" and every:
            verdict = Verdict("passes", (f"{suite} passes",))
        verdicts.append(verdict)
        if verdict.word in ("TIMEOUT", "BROKEN") or (verdict.word == "killed" and not every):
            break
    words = [verdict.word for verdict in verdicts]
    word = next((word for word in ("BROKEN", "TIMEOUT", "killed") if word in words), "LIVES")
    return Verdict(word, tuple(reason for verdict in verdicts for reason in verdict.reasons))


def _seconds(suites: tuple[str, ...]) -> float:
    return SIMULATION_SECONDS_MAX if SIMULATION in suites else SECONDS_MAX


def judge(
    tests: Tests, mutant: Mutant, suites: tuple[str, ...], tree: Path, *, every: bool
) -> Verdict:
    """Return what becomes of one mutant; the copy is as before afterwards."""
    path = tree / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        return Verdict("GONE", (f"its text is {text.count(mutant.old)} times in {mutant.file}",))
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        return _ask(tests, tree, suites, _seconds(suites), every=every)
    finally:
        path.write_text(text)


def _copy_tree(folder: Path) -> Path:
    ignored = shutil.ignore_patterns("__pycache__", ".hypothesis")
    for name in (*ROOMS, "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


@contextlib.contextmanager
def _trees() -> Iterator["queue.Queue[Path]"]:
    """Lend copies of the tree to whoever takes one out of the queue and puts it back."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trees: queue.Queue[Path] = queue.Queue()
        for number in range(COPIES):
            trees.put(_copy_tree(Path(folder) / str(number)))
        yield trees


def _say(rule: str, name: str, verdict: Verdict) -> None:
    reasons = "".join(f"\n{'':16}{reason}" for reason in verdict.reasons)
    sys.stdout.write(f"{verdict.word:8}{rule:7} {name}{reasons}\n")
    sys.stdout.flush()


def _run(tests: Tests, chosen: list[Mutant], *, every: bool, only_simulation: bool) -> int:
    asked = {m.name: (SIMULATION,) if only_simulation else m.suites for m in chosen}
    suites = tuple(dict.fromkeys(suite for mutant in chosen for suite in asked[mutant.name]))
    with _trees() as trees, ThreadPoolExecutor(COPIES) as threads:

        def unbroken() -> Verdict:
            tree = trees.get()
            try:
                return _ask(tests, tree, suites, _seconds(suites) * len(suites), every=False)
            finally:
                trees.put(tree)

        def one(mutant: Mutant) -> Verdict:
            tree = trees.get()
            try:
                return judge(tests, mutant, asked[mutant.name], tree, every=every)
            finally:
                trees.put(tree)

        first = threads.submit(unbroken)
        futures: dict[Future[Verdict], Mutant] = {threads.submit(one, m): m for m in chosen}
        try:
            bad = 0
            for future in as_completed(futures):
                mutant = futures[future]
                verdict = future.result()
                bad += verdict.word != "killed"
                _say(mutant.rule, mutant.name, verdict)
            if first.result().word != "LIVES":
                _say("-", "the unbroken code fails: nothing above means anything", first.result())
                bad += 1
            sys.stdout.write(f"{len(chosen)} mutants, {bad} not killed\n")
        except BaseException:
            tests.stop()
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    return 1 if bad else 0


def _interrupt(_number: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Run the chosen mutants; return 1 if one is not killed."""
    parser = argparse.ArgumentParser(description="Break the code; every mutant must be killed.")
    parser.add_argument("word", nargs="?", default="", help="part of a name, rule or file")
    parser.add_argument("--seed", type=int, help="hypothesis' seed, to run the same again")
    parser.add_argument("--every-suite", action="store_true", help="do not stop at the first kill")
    parser.add_argument("--simulation", action="store_true", help="ask the simulator alone")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if options.word in f"{m.name} {m.rule} {m.file}"]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        return _run(
            Tests(options.seed),
            chosen,
            every=options.every_suite,
            only_simulation=options.simulation,
        )
    except KeyboardInterrupt:
        sys.stdout.write("stopped; the copies are removed\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
