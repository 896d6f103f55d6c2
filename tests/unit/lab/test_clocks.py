"""A clock that stands still for one program, while the program runs."""

import sys
from pathlib import Path

from tests.unit.lab.test_processes import eventually

from holdfast_lab import clocks
from holdfast_lab.processes import end, spawn
from holdfast_lab.state import Folder

PROGRAM = "import time\nwhile True: print(time.monotonic_ns(), flush=True); time.sleep(0.005)"


def test_a_stopped_clock_stands_still_and_then_shows_the_time_again(tmp_path: Path) -> None:
    folder = Folder("clocks")
    folder.path = tmp_path
    log = tmp_path / "log"
    process = spawn(
        [sys.executable, "-c", PROGRAM], log=log, environment=clocks.environment(folder, "h1")
    )

    def shown() -> list[int]:
        return [int(line) for line in log.read_text().split("\n")[:-1]]

    def changes() -> bool:
        return len(set(shown()[-5:])) == 5

    try:
        assert eventually(changes), "it runs at first"
        clocks.stop(folder, "h1")
        assert eventually(lambda: len(set(shown()[-5:])) == 1), "it stands"
        stood = shown()[-1]
        clocks.run(folder, "h1")
        assert eventually(changes), "it runs again"
        assert shown()[-1] > stood
        assert shown() == sorted(shown())
    finally:
        end(process, grace_seconds=0)
