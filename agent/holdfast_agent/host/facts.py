"""What this host is and has: memory, QEMU, machine types, bridges, trackers.

Reads /proc and /sys, and asks the distribution's QEMU once at the agent's start.
"""

import os
import re
import subprocess
from pathlib import Path
from typing import Literal

from holdfast_agent.config import AgentConfig
from holdfast_agent.memory import TRACKERS, unavailable
from holdfast_agent.network.selection import outlook_of
from holdfast_agent.transport.rdma.binding import missing
from holdfast_api import __version__
from holdfast_api.records import HostFacts

QEMU = "qemu-system-x86_64"
QEMU_TIMEOUT_SECONDS = 20.0
KIBIBYTE = 1024


class HostProbe:
    """Facts that do not change while the agent runs, and a look at those that do."""

    def __init__(self, config: AgentConfig) -> None:
        """Ask QEMU for its version and machine types. Raises HostUnfit if it cannot be asked."""
        self._config = config
        self._qemu_version = _match(r"version (.+)", _qemu("--version"))
        types = _qemu("-machine", "help")
        self._machine_types = tuple(
            line.split()[0] for line in types.splitlines()[1:] if line.strip()
        )
        self._accelerators = _accelerators(config.accelerator)
        self._trackers = tuple(name for name in TRACKERS if unavailable(name) is None)

    def look(self) -> HostFacts:
        """Return the host's facts as of now."""
        memory = _memory_bytes()
        total = memory["MemTotal"]
        available = memory["MemAvailable"]
        if self._config.memory_total_bytes is not None:
            available = max(0, min(available, self._config.memory_total_bytes))
            total = self._config.memory_total_bytes
        return HostFacts(
            peer_address=self._config.peer_listen,
            memory_total_bytes=total,
            memory_available_bytes=available,
            qemu_version=self._qemu_version,
            machine_types=self._machine_types,
            accelerators=self._accelerators,
            trackers=self._trackers,
            plugs=outlook_of(self._config.plug).usable,
            transports=_transports(self._config.rdma_address),
            bridges=_bridges(),
            agent_version=__version__,
        )


class HostUnfit(Exception):  # noqa: N818 - reads as a sentence where it is raised
    """This host lacks something that no agent can do without."""


def _qemu(*arguments: str) -> str:
    try:
        done = subprocess.run(
            [QEMU, *arguments],
            capture_output=True,
            text=True,
            timeout=QEMU_TIMEOUT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise HostUnfit(f"{QEMU} can not be run, install qemu-system-x86: {error}") from error
    return done.stdout


def _match(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise HostUnfit(f"{QEMU} says no version: {text[:200]!r}")
    return found[1]


def _memory_bytes() -> dict[str, int]:
    values = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, rest = line.split(":", 1)
        values[name] = int(rest.split()[0]) * KIBIBYTE
    return values


def _bridges() -> tuple[str, ...]:
    """Return the bridges of this network namespace; /sys may show another one's."""
    from pyroute2 import IPRoute  # noqa: PLC0415 - half a second of imports, needed only here

    with IPRoute() as route:
        links = route.get_links(kind="bridge")
    return tuple(sorted(link.get_attr("IFLA_IFNAME") for link in links))


def _transports(rdma_address: str) -> tuple[str, ...]:
    return ("rdma", "tcp") if rdma_address and missing() is None else ("tcp",)


def _accelerators(wanted: Literal["auto", "kvm", "tcg"]) -> tuple[str, ...]:
    if wanted == "auto":
        return ("kvm", "tcg") if os.access("/dev/kvm", os.R_OK | os.W_OK) else ("tcg",)
    return (wanted,)
