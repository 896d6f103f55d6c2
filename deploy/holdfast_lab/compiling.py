"""Compiles the lab's own C files, one at a time. Runs gcc; leaves nothing behind."""

import subprocess
import tempfile
from pathlib import Path

from holdfast_lab.errors import LabRefused

COMPILE_SECONDS_MAX = 120.0


def compiled(source: Path, *options: str) -> bytes:
    """Return what gcc makes of a file. Raises LabRefused with its complaints."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "made"
        done = subprocess.run(
            ["gcc", "-O2", "-Wall", *options, "-o", str(target), str(source)],
            capture_output=True,
            text=True,
            check=False,
            timeout=COMPILE_SECONDS_MAX,
        )
        if done.returncode != 0:
            raise LabRefused(f"the lab's {source.name} does not compile:\n{done.stderr}")
        return target.read_bytes()
