"""A fixed set of seeds and some fresh ones; each is one simulated cluster with everything wrong.

The seeds run in processes of their own, as `python -m tests.simulation` runs them: there a seed
gives the same run every time, which the hashes of this process would not allow.
"""

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.scenarios.guest import Packet
from tests.simulation.faults import COUNTED
from tests.simulation.guest import History, TrackedPlug
from tests.simulation.kernel import Kernel, RuleBroken

ROOT = Path(__file__).resolve().parents[2]
SECONDS_MAX = 280
FIXED_SEEDS = 200
"""So many that each kind of fault happens, whatever a change of the code makes of a seed."""
FRESH_SEEDS = 20
STEPS = 2_000


def simulate(*arguments: str) -> str:
    """Run the command; return what it printed. A broken rule fails the test with the seed."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.simulation", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-20_000:]
    return ended.stdout


def test_a_fixed_set_of_seeds_breaks_no_rule_and_reaches_every_fault() -> None:
    printed = simulate("--seeds", f"0:{FIXED_SEEDS}", "--steps", str(STEPS), "--jobs", "2")
    counted = dict(re.findall(r"([A-Za-z][\w, -]*?) (\d+)(?:, |$)", printed, re.MULTILINE))
    assert int(counted["failovers"]) > 0
    assert f"{FIXED_SEEDS} seeds" in printed
    assert len(COUNTED) > 20


def test_fresh_seeds_break_no_rule() -> None:
    first = random.SystemRandom().randrange(10_000, 1 << 40)
    seeds = f"{first}:{first + FRESH_SEEDS}"
    sys.stdout.write(f"fresh seeds: {seeds} with --steps {STEPS}\n")
    simulate("--seeds", seeds, "--steps", str(STEPS), "--jobs", "2")


def test_a_seed_is_the_same_run_every_time() -> None:
    once, again = (simulate("--seed", "5", "--steps", "1500", "--log") for _ in range(2))
    assert len(once.splitlines()) > 100
    assert once == again


def test_a_history_takes_late_packets_of_its_own_path_and_no_others() -> None:
    history = History("vm")
    root = history.begin(1)
    first = history.extend(root, 1, "a")
    second = history.extend(first, 2, "b")
    other = history.extend(root, 1, "c")
    history.hear(second, "h1")
    history.hear(first, "h1")
    with pytest.raises(RuleBroken, match="contradicts"):
        history.hear(other, "h2")


def test_a_plug_that_is_not_holding_can_not_close_an_epoch() -> None:
    kernel = Kernel(random.Random(1))
    plug = TrackedPlug(kernel, "h1")
    heard: list[Packet] = []
    plug.on_leave = heard.append
    plug.nic(Packet(1, "flows"))
    assert [packet.text for packet in heard] == ["flows"]
    with pytest.raises(RuleBroken, match="INV-7"):
        plug.close_epoch()
    kernel.close()
