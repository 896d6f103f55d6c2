"""Where pyverbs comes in: imported late, its errors turned into OSError, its descriptors found.

Pure but for imports and a look at /proc and /sys. pyverbs is a package of the distribution (Debian:
python3-pyverbs) and not of PyPI, so a host may lack it; nothing else of this package imports it.

It hides the descriptors of its channels. They are found as those that exist after a channel was
made and did not before, by where /proc says they lead.

Source: rdma-core 44, pyverbs/*.pyx.
"""

import contextlib
import errno
import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

DISTRIBUTION_PACKAGES = "/usr/lib/python3/dist-packages"
"""Where Debian puts pyverbs; an interpreter of a virtual environment does not look there."""
DEVICES = "/sys/class/infiniband"
MODULES = ("device", "enums", "cm_enums", "cmid", "qp", "cq", "mr", "wr", "pyverbs_error")


class RdmaMissing(Exception):  # noqa: N818 - reads as a sentence where it is raised
    """This host can not do RDMA; the message says what is missing."""


def missing() -> str | None:
    """Say what this host lacks for RDMA, as far as can be seen without opening a device."""
    if not Path(DEVICES).is_dir() or not any(Path(DEVICES).iterdir()):
        return "there is no RDMA device: load its driver, or `rdma link add` one"
    try:
        load()
    except RdmaMissing as error:
        return str(error)
    return None


@functools.cache
def load() -> Any:
    """Return pyverbs' modules by name. Raises RdmaMissing."""
    if "pyverbs" not in sys.modules and DISTRIBUTION_PACKAGES not in sys.path:
        sys.path.append(DISTRIBUTION_PACKAGES)  # behind everything of our own
    try:
        return SimpleNamespace(
            **{name: importlib.import_module(f"pyverbs.{name}") for name in MODULES}
        )
    except ImportError as error:
        raise RdmaMissing(
            f"pyverbs can not be imported ({error}): install the package python3-pyverbs"
        ) from error


@contextlib.contextmanager
def as_os_error(doing: str) -> Iterator[None]:
    """Turn pyverbs' errors into OSError."""
    module = load()
    try:
        yield
    except module.pyverbs_error.PyverbsError as error:
        number = getattr(error, "error_code", None) or errno.EIO
        raise OSError(number, f"RDMA: {doing}: {error}") from error


def with_descriptor(make: Callable[[], Any], leads_to: str) -> tuple[Any, int]:
    """Return what `make` makes, and the one descriptor it opened that leads to `leads_to`."""
    before = set(_descriptors(leads_to))
    made = make()
    new = set(_descriptors(leads_to)) - before
    if len(new) != 1:
        made.close()
        raise OSError(errno.ENOTSUP, f"RDMA: {len(new)} descriptors lead to {leads_to}, not one")
    return made, new.pop()


def _descriptors(leads_to: str) -> Sequence[int]:
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one that lists is gone again
            if str(entry.readlink()).endswith(leads_to):
                found.append(int(entry.name))
    return found
