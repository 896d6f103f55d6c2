"""Lets a frozen process run again after a while, in case that nobody else does.

Sends SIGCONT. The lab starts one for each freeze; see `Lab.freeze`.
"""

import argparse
import signal
import time

from holdfast_lab import processes


def argv_of(executable: str, process: processes.Process, seconds: float) -> list[str]:
    """Return the command that thaws `process` after so long."""
    words = [str(process.pid), str(process.started_ticks), str(seconds)]
    return [executable, "-m", "holdfast_lab.thawer", *words]


def main() -> None:
    """Wait, then thaw, if it is still the same process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pid", type=int)
    parser.add_argument("started_ticks", type=int)
    parser.add_argument("seconds", type=float)
    arguments = parser.parse_args()
    time.sleep(arguments.seconds)
    frozen = processes.Process(pid=arguments.pid, started_ticks=arguments.started_ticks)
    processes.send_signal(frozen, signal.SIGCONT)


if __name__ == "__main__":
    main()
