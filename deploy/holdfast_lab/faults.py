"""What can be broken in a lab on purpose, and mended. Between `running.Running` and `lab.Lab`.

Sends signals; changes the lab's network. Nothing here outlives the lab: a frozen process is thawed
by a process of the lab after a while, and a lab that goes down ends also what is frozen.
"""

import shutil
import signal
import sys
import time

from holdfast_lab import clocks, control_plane, processes, services, thawer
from holdfast_lab.errors import LabRefused
from holdfast_lab.network import CLIENT
from holdfast_lab.running import Running
from holdfast_lab.state import LabState

FROZEN_SECONDS = 120.0
"""Longer than any test waits for what a frozen service brings about."""
THAW = "thaw "
"""Before the name of what a process of the lab will thaw."""


class Faults(Running):
    """Power losses, dead and frozen services, cut links."""

    def kill(self, target: str) -> float:
        """Let a host lose its power, or end a service without a chance to say goodbye.

        A host (`h1`): nothing leaves it from this moment on, all its processes die, its interfaces
        and its run folder vanish; its state folder stays. A service (`agent h1`, `etcd 2`):
        SIGKILL. Returns when the order was given, in seconds of the monotonic clock.
        """
        if target not in self.state.hosts:
            ordered_at = time.monotonic()
            processes.end(self._service_process(target), grace_seconds=0)
            return ordered_at
        with self.folder.change() as state:
            self._check_powered(state, target)
            ordered_at = self.network.power_off(target)
            for service in [name for name in state.processes if name.split()[-1] == target]:
                processes.end(state.processes.pop(service), grace_seconds=0)
            state.hosts[target] = False
        shutil.rmtree(self.folder.run(target), ignore_errors=True)
        return ordered_at

    def revive(self, target: str) -> None:
        """Give a host its power back: network, then agent. Or start a killed service again.

        Cuts that were made still hold.
        """
        if control_plane.canonical(self.state, target) in services.service_names(self.state):
            self.start(target)
            return
        with self.folder.change() as state:
            self._check_party(state, target, powered=False)
            if target not in state.hosts or state.hosts[target]:
                raise LabRefused(f"{target} is running; only a killed host can be revived")
            self.network.attach(target)
            for sender, receiver in state.cuts:
                if sender == target:
                    self.network.cut(sender, receiver)
            state.hosts[target] = True
        if "agents" in state.components:
            self.start(f"agent {target}")

    def freeze(self, service: str, *, seconds: float = FROZEN_SECONDS) -> float:
        """Stop a process where it is (SIGSTOP), until `thaw`, at the latest after `seconds`.

        Any that the lab started: a service, or `vm NAME on h1`. Returns, when it stands, when the
        order was given, in seconds of the monotonic clock. Raises LabTimedOut.
        """
        process = self._service_process(service)
        with self.folder.change() as state:
            name = control_plane.canonical(state, service)
            self._end_thawer(state, name)
            state.processes[f"{THAW}{name}"] = processes.spawn(
                thawer.argv_of(sys.executable, process, seconds),
                log=self.folder.log(f"{THAW}{name}"),
                namespace=self.network.namespace(_party_of(name)),
            )
            ordered_at = time.monotonic()
            processes.stop(process)
        return ordered_at

    def thaw(self, service: str) -> None:
        """Let a frozen process run again (SIGCONT)."""
        process = self._service_process(service)
        processes.send_signal(process, signal.SIGCONT)
        with self.folder.change() as state:
            self._end_thawer(state, control_plane.canonical(state, service))

    def stop_clock(self, host: str) -> None:
        """Let the monotonic clock of a host's agent and workers stand still, until `run_clock`.

        Raises LabRefused in a lab that was made without such clocks.
        """
        self._check_clock(host)
        clocks.stop(self.folder, host)

    def run_clock(self, host: str) -> None:
        """Let a stopped clock show the time again."""
        self._check_clock(host)
        clocks.run(self.folder, host)

    def _check_clock(self, host: str) -> None:
        state = self.state
        if not state.clocks:
            raise LabRefused(f"the clocks of lab {state.name} can not be stopped: clocks=True")
        if host not in state.hosts:
            raise LabRefused(f"there is no host {host}: {', '.join(state.hosts)}")

    def _end_thawer(self, state: LabState, name: str) -> None:
        known = state.processes.pop(f"{THAW}{name}", None)
        if known is not None:
            processes.end(known, grace_seconds=0)

    def cut(self, first: str, second: str, *, one_way: bool = False) -> None:
        """Let all that two parties send to each other vanish; `one_way`: only first to second.

        A party is a host, a service with a machine of its own (`etcd 1`), or `control`: all of
        these together.
        """
        with self.folder.change() as state:
            pairs = self._pairs(state, first, second)
            for pair in pairs if one_way else [*pairs, *(pair[::-1] for pair in pairs)]:
                if pair not in state.cuts:
                    state.cuts = (*state.cuts, pair)
                    if state.hosts.get(pair[0], True):
                        self.network.cut(*pair)

    def heal(self, first: str | None = None, second: str | None = None) -> None:
        """Take back the cuts between two parties, both ways; without parties, all of them."""
        with self.folder.change() as state:
            healed = state.cuts
            if first is not None or second is not None:
                if first is None or second is None:
                    raise LabRefused("name two parties, or none to heal all cuts")
                wanted = [set(pair) for pair in self._pairs(state, first, second)]
                healed = tuple(pair for pair in state.cuts if set(pair) in wanted)
            for pair in healed:
                state.cuts = tuple(other for other in state.cuts if other != pair)
                if state.hosts.get(pair[0], True):
                    self.network.heal(*pair)

    def _pairs(self, state: LabState, first: str, second: str) -> list[tuple[str, str]]:
        """Return the pairs of parties that two words mean. Raises LabRefused."""
        firsts, seconds = (control_plane.parties_named(state, word) for word in (first, second))
        for party in (*firsts, *seconds):
            self._check_party(state, party, powered=False)
        if set(firsts) & set(seconds):
            raise LabRefused(f"a cut is between two parties, not {first} and itself")
        return [(one, other) for one in firsts for other in seconds]


def _party_of(name: str) -> str:
    """Return where a process of the lab runs."""
    match name.split(maxsplit=1)[0]:
        case "agent" | "vm":
            return name.rsplit(maxsplit=1)[-1]
        case "forwarder":
            return CLIENT
        case _:
            return control_plane.party_of(name)
