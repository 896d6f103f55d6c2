"""Clocks of a lab's hosts that can be stopped, and jump to the right time when they run again.

Compiles one C file into the cache; writes 8 bytes for each host. A lab that wants such clocks loads
the library into its agents, and so into their workers, with LD_PRELOAD (`clock_files/clock.c`).
Only readings of the monotonic clock stand still: a process that sleeps wakes up all the same, and
finds that no time has passed.
"""

import hashlib
import os
import struct
import time
from pathlib import Path

from holdfast_lab.compiling import compiled
from holdfast_lab.paths import cache_folder
from holdfast_lab.state import Folder

SOURCE = Path(__file__).parent / "clock_files" / "clock.c"
_STOPPED_AT = struct.Struct("=q")


def environment(folder: Folder, host: str) -> dict[str, str]:
    """Return what an agent on this host needs in its environment; its clock runs."""
    path = _path(folder, host)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        _set(path, 0)
    return {"LD_PRELOAD": str(_library()), "HOLDFAST_LAB_CLOCK": str(path)}


def stop(folder: Folder, host: str) -> None:
    """Let the clock of a host stand still at this moment."""
    _set(_path(folder, host), time.monotonic_ns())


def run(folder: Folder, host: str) -> None:
    """Let the clock of a host show the time again."""
    _set(_path(folder, host), 0)


def _path(folder: Folder, host: str) -> Path:
    return folder.path / "hosts" / host / "clock"


def _set(path: Path, stopped_at_ns: int) -> None:
    """Write in place: the file is mapped by those who read it."""
    mode = "r+b" if path.exists() else "w+b"
    with path.open(mode) as file:
        file.write(_STOPPED_AT.pack(stopped_at_ns))


def _library() -> Path:
    """Return the library, compiled if its source is new. Raises LabRefused."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    target = cache_folder() / "clock" / f"clock-{digest}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f"{target.name}.{os.getpid()}")
    draft.write_bytes(compiled(SOURCE, "-shared", "-fPIC", "-ldl"))
    draft.rename(target)
    return target
