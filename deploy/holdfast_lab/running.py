"""A lab's services: started, ended, waited for. The base of `lab.Lab`.

Starts and signals processes; asks the services over the network whether they work yet.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

from holdfast_lab import control_plane, probes, processes, services
from holdfast_lab.errors import LabError, LabRefused, LabTimedOut
from holdfast_lab.network import Network
from holdfast_lab.processes import Process
from holdfast_lab.state import Folder, LabState
from holdfast_lab.status import url_of

Say = Callable[[str], None]

HOSTS_DEADLINE_SECONDS = 60.0
POLL_SECONDS = 0.05
GRACE_SECONDS = 10.0
LOG_TAIL_LINES = 15
PATIENCE = "HOLDFAST_LAB_PATIENCE"
"""An environment variable: how many times as long as usual to wait, for machines that are slow."""


class Running:
    """The services of a lab, by name: `etcd`, `controller 2`, `agent h1`."""

    def __init__(self, folder: Folder, say: Say = lambda _: None) -> None:
        """Speak of the lab in this folder; `say` is told what goes on."""
        self.folder = folder
        self.network = Network(folder.name)
        self._say = say

    @property
    def state(self) -> LabState:
        """What is recorded of the lab at this moment."""
        return self.folder.read()

    @property
    def urls(self) -> tuple[str, ...]:
        """Where each controller answers, in the order of their numbers, seen from outside."""
        return tuple(map(url_of, self.state.ports))

    def start(self, service: str) -> None:
        """Start `etcd`, `controller 2` or `agent hN`; does not wait for it."""
        with self.folder.change() as state:
            plan = services.describe(self.folder, state, control_plane.canonical(state, service))
            self._check_party(state, plan.party)
            running = state.processes.get(plan.name)
            if running is not None and processes.is_alive(running):
                raise LabRefused(f"{plan.name} is running")
            state.processes[plan.name] = processes.spawn(
                plan.argv,
                log=self.folder.log(plan.name),
                namespace=self.network.namespace(plan.party),
                environment=plan.environment,
            )

    def stop(self, service: str) -> None:
        """End a service as an administrator would: SIGTERM, and SIGKILL if it stays."""
        processes.end(self._service_process(service), grace_seconds=GRACE_SECONDS)

    def restart(self, service: str) -> None:
        """Stop a service and start it again."""
        self.stop(service)
        self.start(service)

    def wait_for_hosts(self, *hosts: str) -> None:
        """Wait until a controller knows that these hosts live. Raises LabTimedOut."""

        def alive() -> bool:
            return any(set(hosts) <= probes.hosts_alive(url) for url in self.urls)

        for host in hosts:
            self._wait(f"agent {host}", HOSTS_DEADLINE_SECONDS, alive)

    def log(self, service: str) -> Path:
        """Return the file with the output of a service, of `vm NAME on HOST` or a console."""
        return self.folder.log(service)

    def _check_party(self, state: LabState, party: str, *, powered: bool = True) -> None:
        parties = [*state.hosts, *control_plane.parties(state)]
        if party not in parties:
            raise LabRefused(f"there is no {party} in lab {state.name}: {', '.join(parties)}")
        if powered and not state.hosts.get(party, True):
            raise LabRefused(f"{party} has no power: `holdfast lab revive {party}` first")

    def _check_powered(self, state: LabState, host: str) -> None:
        if host not in state.hosts:
            raise LabRefused(f"there is no host {host}: {', '.join(state.hosts)}")
        self._check_party(state, host)

    def _service_process(self, service: str) -> Process:
        state = self.state
        process = state.processes.get(control_plane.canonical(state, service))
        if process is None or not processes.is_alive(process):
            known = [*state.hosts, *services.service_names(state)]
            raise LabRefused(f"{service} does not run; there are {', '.join(known)}")
        return process

    def _console(self, name: str) -> Path:
        return self.folder.log(f"console {name}")

    def _wait(self, service: str, seconds: float, probe: Callable[[], bool]) -> None:
        """Poll until `probe` holds, as long as the service lives."""
        patience = float(os.environ.get(PATIENCE, "1"))
        seconds *= patience
        deadline = time.monotonic() + seconds
        while not probe():
            process = self.state.processes.get(service)
            if process is None or not processes.is_alive(process):
                raise LabError(f"{service} ended by itself{self._tail(service)}")
            if time.monotonic() > deadline:
                raise LabTimedOut(
                    f"{service} was not ready within {seconds:.0f} s{self._tail(service)}"
                )
            time.sleep(POLL_SECONDS * patience)  # asking costs what the service lacks

    def _tail(self, service: str) -> str:
        """Return the end of a service's log, and of a guest's console, for a message."""
        words = service.split()
        logs = [self.folder.log(service)] + ([self._console(words[1])] if words[0] == "vm" else [])
        texts = [path.read_text(errors="replace") for path in logs if path.exists()]
        lines = [line for text in texts for line in text.splitlines()[-LOG_TAIL_LINES:]]
        return "; its log ends:\n" + "\n".join(lines) if lines else " without a word"
