"""The lab under the campaign: who runs where, what was broken, and how it is mended.

Signals processes of the lab, by pid; changes their limits; calls the API. What was broken is kept
as a list of ways to mend it, and `mend` uses them all.
"""

import contextlib
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.chaos.standing import Standing

from holdfast_api.client import HoldfastClient
from holdfast_api.errors import HoldfastError
from holdfast_api.records import Protection
from holdfast_api.words import Phase
from holdfast_lab import control_plane, processes, services
from holdfast_lab.errors import LabRefused
from holdfast_lab.lab import Lab
from holdfast_lab.namespaces import processes_in

POLL_SECONDS = 0.1
AGENT, WORKER, QEMU = "holdfast_agent.main", "holdfast_agent.worker", "qemu-system"
UNLIMITED = resource.RLIM_INFINITY


class Scene:
    """A lab, its API, and what is broken at the moment."""

    def __init__(self, lab: Lab, random: Random) -> None:
        """Break this lab by what `random` says."""
        self.lab = lab
        self.random = random
        self.api = HoldfastClient(lab.urls, timeout_seconds=5)
        self.standings: dict[str, Standing] = {}
        self.said: list[str] = []
        """What was done in this episode, in order."""
        self.began = time.monotonic()
        self._mending: list[tuple[str, Callable[[], None]]] = []

    def close(self) -> None:
        """Close the client."""
        self.api.close()

    # --- where things are -------------------------------------------------------------------------

    @property
    def hosts(self) -> list[str]:
        """All hosts with power."""
        return [host for host, powered in self.lab.state.hosts.items() if powered]

    def services(self, kind: str) -> list[str]:
        """Return the services of a kind of the control plane."""
        return control_plane.names_of(self.lab.state, kind)

    def dead_services(self) -> list[str]:
        """Return the services that should run and do not; VMs are none."""
        state = self.lab.state
        return [
            name
            for name in services.service_names(state)
            if name not in state.processes or not processes.is_alive(state.processes[name])
        ]

    def protection(self, vm: str) -> Protection | None:
        """Return how a VM stands; None if nobody can say now."""
        try:
            return self.api.protection(vm)
        except HoldfastError:
            return None

    def pids(self, host: str, program: str, vm: str = "") -> list[int]:
        """Return the processes of a program on a host, of one VM or of all."""
        if host not in self.hosts:
            return []
        return [
            pid
            for pid in processes_in(self.lab.network.namespace(host))
            if _is(pid, program) and vm in _command(pid)
        ]

    def count_qemus(self, vm: str) -> int:
        """Return how many QEMUs of a VM there are on all hosts."""
        return sum(len(self.pids(host, QEMU, vm)) for host in self.hosts)

    # --- breaking things --------------------------------------------------------------------------

    def begin(self, vms: list[str]) -> None:
        """Begin an episode."""
        self.said = []
        self.began = time.monotonic()
        self.standings = {vm: Standing() for vm in vms}
        for vm in vms:
            self._look(vm)

    def act(self, text: str, *hosts: str, vm: str | None = None, destroys: bool = False) -> None:
        """Note what is about to be done to hosts: to one VM on them, or to all of them."""
        seconds = time.monotonic() - self.began
        self.said.append(f"{seconds:.2f} {text}")
        for name in self.standings if vm is None else [vm]:
            self._look(name)
            for host in hosts:
                self.standings[name].act(host, destroys=destroys)

    def _look(self, vm: str) -> None:
        now = self.protection(vm)
        if now is not None and now.phase is Phase.PROTECTED and now.backup is not None:
            self.standings[vm].look((now.primary, now.backup))
        elif now is not None:
            self.standings[vm].look((now.primary,))

    def to_mend(self, text: str, way: Callable[[], None]) -> None:
        """Remember how something is mended that is broken now."""
        self._mending.append((text, way))

    def mend(self) -> None:
        """Mend all that is broken, in the order in which it broke."""
        mending, self._mending = self._mending, []
        for text, way in mending:
            self.said.append(f"{time.monotonic() - self.began:.2f} {text}")
            with contextlib.suppress(LabRefused):  # another fault mended or ended it
                way()

    def signal(self, pids: list[int], number: signal.Signals) -> None:
        """Send a signal to processes of the lab, as far as they still live."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def limit_files(self, host: str, size_bytes: int) -> None:
        """Let no process of a host write files beyond so many bytes: a full disk.

        Of a host without power nothing runs that could.
        """
        if host not in self.hosts:
            return
        for pid in processes_in(self.lab.network.namespace(host)):
            with contextlib.suppress(ProcessLookupError):
                hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (size_bytes, hard))


def until(seconds: float, condition: Callable[[], bool]) -> bool:
    """Poll; return whether it came true in time. What the API refuses is "not yet"."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(HoldfastError):
            if condition():
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)


def _is(pid: int, program: str) -> bool:
    """Tell whether a process runs a program: the command itself or a module of Python."""
    words = _command(pid).split()
    return bool(words) and (program in words[0] or program in words[1:3])


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""
