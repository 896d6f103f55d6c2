"""Where the lab finds its tools and keeps its files. Reads the environment and the file system.

    .cache/packages/root/   unpacked Debian packages: etcd, redis, a kernel, busybox (made by ./dev)
    .cache/guest/           the guest image made from them
    /run/holdfast-lab/NAME/ one running lab

`HOLDFAST_CACHE` moves the first two.
"""

import os
import shutil
from pathlib import Path

from holdfast_lab.errors import LabRefused

RUN_FOLDER = Path("/run/holdfast-lab")
"""On tmpfs: a lab does not outlive a reboot of the machine, and neither do its namespaces."""


def cache_folder() -> Path:
    """Return the folder of everything that was downloaded or built."""
    given = os.environ.get("HOLDFAST_CACHE")
    if given:
        return Path(given)
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "pyproject.toml").exists():
        return checkout / ".cache"
    return Path("/var/cache/holdfast")


def packages_folder() -> Path:
    """Return the root under which the Debian packages were unpacked."""
    return cache_folder() / "packages" / "root"


def guest_folder() -> Path:
    """Return the folder of the guest image."""
    return cache_folder() / "guest"


def find_tool(name: str) -> str:
    """Return the path of a program: from the unpacked packages, else from PATH.

    Raises LabRefused when it is in neither.
    """
    for folder in ("usr/bin", "usr/sbin", "bin", "sbin"):
        candidate = packages_folder() / folder / name
        if candidate.exists():
            return str(candidate)
    found = shutil.which(name)
    if found is None:
        raise LabRefused(f"the program {name} is missing: run ./dev setup")
    return found
