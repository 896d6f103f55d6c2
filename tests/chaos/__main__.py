"""`./dev chaos --minutes N --seed S`: break a real lab at random and hold it to its word.

    ./dev chaos [--minutes 5] [--seed N] [--report FILE]

Prints a line for each episode and the report at its end, which is also written to FILE (by default
below .cache/chaos), with all timelines as JSON beside it. Exits 1 when anything was violated; the
lab's logs are then kept beside the report. Ctrl-C ends the campaign and removes the lab.
"""

import argparse
import os
import secrets
import shutil
import signal
import sys
import time
from pathlib import Path

from tests.chaos.campaign import CONTROLLERS, HOSTS, MEMBERS, Campaign
from tests.chaos.report import Report
from tests.chaos.witness import Witness

from holdfast_lab.errors import LabError
from holdfast_lab.lab import Lab
from holdfast_lab.network import SWITCH

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".cache" / "chaos"
MINUTES_MAX = 24 * 60


def say(text: str) -> None:
    """Print a line at once: a campaign is long."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def run(seed: int, seconds: float, path: Path) -> Report:
    """Run one campaign; the report is also written to `path`. The lab is gone at the end."""
    report = Report(seed)
    name = f"chaos{os.getpid()}"
    began = time.monotonic()
    with Lab.up(
        HOSTS,
        name,
        controllers=CONTROLLERS,
        etcd=MEMBERS,
        clocks=True,
        tls=False,  # the witness reads what passes
        say=say,
    ) as lab:
        try:
            with Witness(lab.network.namespace(SWITCH), lab.folder.path) as witness:
                try:
                    Campaign(lab, witness, seed, report, say).run(seconds)
                finally:
                    testimony = witness.close()
                    report.wire = {**testimony.summary, "dropped": testimony.kernel_drops}
            report.violations += [
                f"on the wire: {v}"
                for v in testimony.violations
                if f"on the wire: {v}" not in report.violations
            ]
        except LabError as error:
            report.violations.append(f"the campaign could not go on: {error}")
        finally:
            report.seconds = time.monotonic() - began
            report.write(path)
            if report.violations:
                kept = path.with_suffix(".logs")
                shutil.copytree(lab.folder.path / "logs", kept, dirs_exist_ok=True)
                say(f"the lab's logs are kept in {kept}")
    return report


def main() -> int:
    """Run what is asked for; return the exit status."""
    parser = argparse.ArgumentParser(prog="./dev chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000))
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    if not 0 < options.minutes <= MINUTES_MAX:
        parser.error(f"--minutes must be above 0 and at most {MINUTES_MAX}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    path = options.report or FOLDER / f"seed-{options.seed}-{os.getpid()}.txt"
    say(f"seed {options.seed}, {options.minutes:g} minutes, report in {path}")
    try:
        report = run(options.seed, options.minutes * 60, path)
    except KeyboardInterrupt:
        say("interrupted; the lab is removed")
        return 130
    except LabError as error:
        say(f"error: {error}")
        return 2
    say(report.text())
    return 1 if report.violations or not report.failovers else 0


if __name__ == "__main__":
    sys.exit(main())
