"""A lab: several hosts on this machine, each in a namespace of its own. Start reading here.

Needs root; starts etcd, a controller, an agent for each host, and QEMUs; see `network` for what
connects them and `state` for what is remembered.

Everything a lab makes lies in its namespaces and in /run/holdfast-lab/NAME, and every process it
starts runs in one of those namespaces. So taking it down needs no memory of what was done: end
what runs in the namespaces, remove them, remove the folder. That is also how a lab is cleaned up
whose maker crashed; one with an owner (a test's) is removed by the next lab that comes up.
"""

import contextlib
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from holdfast_lab import namespaces, probes, processes, services, vm
from holdfast_lab.clients import REDIS_PORT, RedisConnection
from holdfast_lab.errors import LabError, LabRefused, LabTimedOut
from holdfast_lab.guest import ensure_image
from holdfast_lab.network import CLIENT, CONTROL, HOSTS_MAX, Network, party_address
from holdfast_lab.processes import Process
from holdfast_lab.services import COMPONENTS
from holdfast_lab.state import Folder, LabState, VmState, lab_names, lock

Result = TypeVar("Result")
Say = Callable[[str], None]

ETCD_DEADLINE_SECONDS = 30.0
CONTROLLER_DEADLINE_SECONDS = 60.0
HOSTS_DEADLINE_SECONDS = 60.0
BOOT_DEADLINE_SECONDS = 90.0
TAP_DEADLINE_SECONDS = 10.0
POLL_SECONDS = 0.05
GRACE_SECONDS = 10.0
LOG_TAIL_LINES = 15
POWER_OFF_PORT = 9
"""Of a guest: a connection powers it off; see `guest_files/init`."""


class Lab:
    """A lab that is up. As a context manager it takes the lab down at the end."""

    def __init__(self, folder: Folder, say: Say = lambda _: None) -> None:
        """Use `up` or `attach` instead."""
        self.folder = folder
        self.network = Network(folder.name)
        self._say = say

    # --- coming up, going down ---------------------------------------------------------------

    @classmethod
    def up(
        cls,
        hosts: int = 3,
        name: str = "lab",
        *,
        components: Sequence[str] = COMPONENTS,
        accelerator: str = "tcg",
        memory_total_bytes: int | None = None,
        owned: bool = True,
        say: Say = lambda _: None,
    ) -> Self:
        """Make a lab, in the place of one with the same name, and wait until it works.

        An `owned` lab ends with the calling process, at the latest when another comes up. Leaves
        nothing behind when it fails: raises LabRefused for what cannot be, LabTimedOut (with the
        end of the log) when a service does not come up.
        """
        folder = Folder(name)
        if not 1 <= hosts <= HOSTS_MAX:
            raise LabRefused(f"a lab has 1 to {HOSTS_MAX} hosts, not {hosts}")
        services.check_components(tuple(components))
        cls.remove_orphans()
        cls.remove(name)
        state = LabState(
            name=name,
            components=tuple(components),
            accelerator=accelerator,
            memory_total_bytes=memory_total_bytes,
            owner=processes.this_process() if owned else None,
            hosts={f"h{number}": True for number in range(1, hosts + 1)},
        )
        lab = cls(folder, say)
        try:
            with lock():
                folder.create(state)
            lab._bring_up(state)
        except BaseException:
            lab.down()
            raise
        return lab

    @classmethod
    def attach(cls, name: str = "lab", say: Say = lambda _: None) -> Self:
        """Return the lab of this name that is up already. Raises LabRefused if there is none."""
        folder = Folder(name)
        if not folder.read().complete:
            raise LabRefused(f"lab {name} did not come up: `holdfast lab up --name {name}` again")
        return cls(folder, say)

    @classmethod
    def is_healthy(cls, name: str) -> bool:
        """Tell whether a lab came up and all it started for its living hosts still runs."""
        try:
            state = Folder(name).read()
        except LabRefused:
            return False
        return state.complete and all(map(processes.is_alive, state.processes.values()))

    @classmethod
    def remove(cls, name: str) -> None:
        """Remove whatever there is of a lab, however it was left. Idempotent."""
        folder = Folder(name)
        recorded: list[Process] = []
        with contextlib.suppress(LabRefused):
            recorded = list(folder.read().processes.values())
        Network(name).remove()
        # They ran in the namespaces, so they are gone; unless someone removed a namespace by hand.
        for process in recorded:
            processes.end(process, grace_seconds=0)
        with lock():
            folder.remove()

    @classmethod
    def remove_orphans(cls) -> None:
        """Remove the labs whose owner has ended without taking them down."""
        for name in lab_names():
            with contextlib.suppress(LabRefused):
                owner = Folder(name).read().owner
                if owner is not None and not processes.is_alive(owner):
                    cls.remove(name)

    def down(self) -> None:
        """End everything and remove it. Idempotent."""
        self.remove(self.folder.name)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the lab down."""
        self.down()

    def _bring_up(self, state: LabState) -> None:
        self._say(f"network: a switch, {', '.join(state.hosts)}")
        self.network.create_switch()
        for party in (CONTROL, CLIENT, *state.hosts):
            self.network.attach(party)
        if "etcd" in state.components:
            self._say("etcd")
            control = self.network.namespace(CONTROL)
            self.start("etcd")
            self._wait("etcd", ETCD_DEADLINE_SECONDS, lambda: probes.etcd_answers(control))
        if "controller" in state.components:
            self._say("controller")
            self._start_forwarder()
            self.start("controller")
            self._wait(
                "controller",
                CONTROLLER_DEADLINE_SECONDS,
                lambda: probes.controller_is_ready(self.url),
            )
        if "agents" in state.components:
            self._say("agents")
            for host in state.hosts:
                self.start(f"agent {host}")
            if "controller" in state.components:
                self.wait_for_hosts(*state.hosts)
        with self.folder.change() as changed:
            changed.complete = True

    def _start_forwarder(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            target = services.controller_url().removeprefix("http://")
            process = processes.spawn(
                services.forwarder_argv(target),
                log=self.folder.log("forwarder"),
                namespace=self.network.namespace(CLIENT),
                inherit=[listening.fileno()],
            )
            with self.folder.change() as state:
                state.processes["forwarder"] = process
                state.port = listening.getsockname()[1]

    # --- what a client needs -----------------------------------------------------------------

    @property
    def state(self) -> LabState:
        """What is recorded of the lab at this moment."""
        return self.folder.read()

    @property
    def url(self) -> str:
        """Where the controller answers, seen from outside the lab."""
        port = self.state.port
        if not port:
            raise LabRefused(f"lab {self.folder.name} was made without a controller")
        return f"http://127.0.0.1:{port}"

    def powered_namespace(self, party: str) -> str:
        """Return the namespace of a party that has power. Raises LabRefused."""
        self._check_party(self.state, party)
        return self.network.namespace(party)

    def in_namespace(self, party: str, function: Callable[[], Result]) -> Result:
        """Call a function as if on that party's machine; sockets made there stay there."""
        return namespaces.enter(self.powered_namespace(party), function)

    def execute(self, party: str, argv: Sequence[str]) -> str:
        """Run a program on that party's machine and return its output; LabError if it fails."""
        return namespaces.run_tool(["ip", "netns", "exec", self.powered_namespace(party), *argv])

    def open_socket(
        self,
        party: str,
        family: int = socket.AF_INET,
        kind: int = socket.SOCK_STREAM,
        protocol: int = 0,
    ) -> socket.socket:
        """Return a socket of that party's machine; the caller closes it."""
        return namespaces.open_socket(self.powered_namespace(party), family, kind, protocol)

    def connect(
        self, address: str, port: int, *, party: str = CLIENT, timeout_seconds: float = 10.0
    ) -> socket.socket:
        """Return a TCP connection from a party to an address in the lab. Raises OSError."""
        connected = self.open_socket(party)
        try:
            connected.settimeout(timeout_seconds)
            connected.connect((address, port))
        except OSError:
            connected.close()
            raise
        return connected

    def redis(self, name: str, *, timeout_seconds: float = 10.0) -> RedisConnection:
        """Return a connection to the Redis of a VM, wherever it runs by now."""
        address = self._vm_state(name).addresses[0]
        return RedisConnection(self.connect(address, REDIS_PORT, timeout_seconds=timeout_seconds))

    # --- VMs ---------------------------------------------------------------------------------

    def run_vm(
        self,
        name: str,
        host: str,
        options: vm.VmOptions | None = None,
        *,
        wait: bool = True,
    ) -> VmState:
        """Start a VM on a host and, with `wait`, return when its Redis answers.

        A VM that has ended may be started again. Raises LabRefused, LabTimedOut.
        """
        options = options or vm.VmOptions()
        vm.check(name, options)
        image = ensure_image()
        service = f"vm {name} on {host}"
        with self.folder.change() as state:
            self._check_powered(state, host)
            self._check_vm_is_free(state, name)
            state.guests_started += 1
            plan = vm.VmPlan(
                name=name,
                number=state.guests_started,
                options=options,
                qmp=self.folder.run(host) / "vms" / f"{name}.qmp",
                console=self._console(name),
                accelerator=state.accelerator,
            )
            plan.qmp.parent.mkdir(parents=True, exist_ok=True)
            plan.console.unlink(missing_ok=True)
            state.processes[service] = processes.spawn(
                vm.qemu_argv(plan, image),
                log=self.folder.log(service),
                namespace=self.network.namespace(host),
            )
            state.vms[name] = VmState(
                name=name, started_on=host, addresses=plan.addresses, macs=plan.macs
            )
        for tap in plan.taps:
            self._wait(service, TAP_DEADLINE_SECONDS, self._tap_appears(host, tap))
            self.network.plug_tap(host, tap)
        if wait:
            self._wait(service, BOOT_DEADLINE_SECONDS, lambda: self._redis_answers(name))
        return self._vm_state(name)

    def power_off_vm(self, name: str) -> None:
        """Ask the guest to shut itself down from inside, as its owner would."""
        with self.connect(self._vm_state(name).addresses[0], POWER_OFF_PORT):
            pass

    # --- failures ----------------------------------------------------------------------------

    def kill(self, target: str) -> float:
        """Let a host lose its power, or end a service without a chance to say goodbye.

        A host (`h1`): nothing leaves it from this moment on, all its processes die, its interfaces
        and its run folder vanish; its state folder stays. A service (`agent h1`, `etcd`): SIGKILL.
        Returns when the order was given, in seconds of the monotonic clock.
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

    def revive(self, host: str) -> None:
        """Give a host its power back: network, then agent. Cuts that were made still hold."""
        with self.folder.change() as state:
            self._check_party(state, host, powered=False)
            if host not in state.hosts or state.hosts[host]:
                raise LabRefused(f"{host} is running; only a killed host can be revived")
            self.network.attach(host)
            for sender, receiver in state.cuts:
                if sender == host:
                    self.network.cut(sender, receiver)
            state.hosts[host] = True
        if "agents" in state.components:
            self.start(f"agent {host}")

    def cut(self, first: str, second: str, *, one_way: bool = False) -> None:
        """Let all that two parties send to each other vanish; `one_way`: only first to second."""
        with self.folder.change() as state:
            for party in (first, second):
                self._check_party(state, party, powered=False)
            if first == second:
                raise LabRefused(f"a cut is between two parties, not {first} and itself")
            pairs = [(first, second)] if one_way else [(first, second), (second, first)]
            for pair in pairs:
                if pair not in state.cuts:
                    state.cuts = (*state.cuts, pair)
                    if state.hosts.get(pair[0], True):
                        self.network.cut(*pair)

    def heal(self, first: str | None = None, second: str | None = None) -> None:
        """Take back the cuts between two parties, both ways; without parties, all of them."""
        with self.folder.change() as state:
            for party in (first, second):
                if party is not None:
                    self._check_party(state, party, powered=False)
            for pair in state.cuts:
                if first is None or set(pair) == {first, second}:
                    state.cuts = tuple(other for other in state.cuts if other != pair)
                    if state.hosts.get(pair[0], True):
                        self.network.heal(*pair)

    # --- services ----------------------------------------------------------------------------

    def start(self, service: str) -> None:
        """Start `etcd`, `controller` or `agent hN`; does not wait for it."""
        with self.folder.change() as state:
            plan = services.describe(self.folder, state, service)
            self._check_party(state, plan.party)
            running = state.processes.get(service)
            if running is not None and processes.is_alive(running):
                raise LabRefused(f"{service} is running")
            state.processes[service] = processes.spawn(
                plan.argv,
                log=self.folder.log(service),
                namespace=self.network.namespace(plan.party),
            )

    def stop(self, service: str) -> None:
        """End a service as an administrator would: SIGTERM, and SIGKILL if it stays."""
        processes.end(self._service_process(service), grace_seconds=GRACE_SECONDS)

    def restart(self, service: str) -> None:
        """Stop a service and start it again."""
        self.stop(service)
        self.start(service)

    def wait_for_hosts(self, *hosts: str) -> None:
        """Wait until the controller hears from these hosts. Raises LabTimedOut."""

        def alive() -> bool:
            return set(hosts) <= probes.hosts_alive(self.url)

        for host in hosts:
            self._wait(f"agent {host}", HOSTS_DEADLINE_SECONDS, alive)

    def log(self, service: str) -> Path:
        """Return the file with the output of a service, of `vm NAME on HOST` or a console."""
        return self.folder.log(service)

    def status(self) -> dict[str, Any]:
        """Return what runs, as plain data."""
        state = self.state
        alive = {name: processes.is_alive(process) for name, process in state.processes.items()}
        return {
            "name": state.name,
            "url": f"http://127.0.0.1:{state.port}" if state.port else None,
            "hosts": [
                {
                    "host": host,
                    "address": party_address(host),
                    "namespace": self.network.namespace(host),
                    "powered": powered,
                    "agent": alive.get(f"agent {host}", False),
                }
                for host, powered in state.hosts.items()
            ],
            "services": {name: alive.get(name, False) for name in ("etcd", "controller")},
            "vms": [
                {
                    "vm": known.name,
                    "addresses": known.addresses,
                    "started_on": known.started_on,
                    "still_there": alive.get(f"vm {known.name} on {known.started_on}", False),
                }
                for known in state.vms.values()
            ],
            "cuts": [{"from": sender, "to": receiver} for sender, receiver in state.cuts],
        }

    # --- checks and probes -------------------------------------------------------------------

    def _check_party(self, state: LabState, party: str, *, powered: bool = True) -> None:
        parties = [*state.hosts, CONTROL, CLIENT]
        if party not in parties:
            raise LabRefused(f"there is no {party} in lab {state.name}: {', '.join(parties)}")
        if powered and not state.hosts.get(party, True):
            raise LabRefused(f"{party} has no power: `holdfast lab revive {party}` first")

    def _check_powered(self, state: LabState, host: str) -> None:
        if host not in state.hosts:
            raise LabRefused(f"there is no host {host}: {', '.join(state.hosts)}")
        self._check_party(state, host)

    def _check_vm_is_free(self, state: LabState, name: str) -> None:
        for host, powered in state.hosts.items():
            process = state.processes.get(f"vm {name} on {host}")
            if powered and process is not None and processes.is_alive(process):
                raise LabRefused(f"a VM named {name} runs already, on {host}")

    def _vm_state(self, name: str) -> VmState:
        state = self.state
        if name not in state.vms:
            raise LabRefused(f"lab {state.name} has no VM {name}: {', '.join(state.vms) or 'none'}")
        return state.vms[name]

    def _service_process(self, service: str) -> Process:
        state = self.state
        if service not in state.processes or not processes.is_alive(state.processes[service]):
            known = [*state.hosts, *services.service_names(state)]
            raise LabRefused(f"{service} does not run; there are {', '.join(known)}")
        return state.processes[service]

    def _console(self, name: str) -> Path:
        return self.folder.log(f"console {name}")

    def _wait(self, service: str, seconds: float, probe: Callable[[], bool]) -> None:
        """Poll until `probe` holds, as long as the service lives."""
        deadline = time.monotonic() + seconds
        while not probe():
            process = self.state.processes.get(service)
            if process is None or not processes.is_alive(process):
                raise LabError(f"{service} ended by itself{self._tail(service)}")
            if time.monotonic() > deadline:
                raise LabTimedOut(
                    f"{service} was not ready within {seconds:.0f} s{self._tail(service)}"
                )
            time.sleep(POLL_SECONDS)

    def _tail(self, service: str) -> str:
        """Return the end of a service's log, and of a guest's console, for a message."""
        words = service.split()
        logs = [self.folder.log(service)] + ([self._console(words[1])] if words[0] == "vm" else [])
        texts = [path.read_text(errors="replace") for path in logs if path.exists()]
        lines = [line for text in texts for line in text.splitlines()[-LOG_TAIL_LINES:]]
        return "; its log ends:\n" + "\n".join(lines) if lines else " without a word"

    def _redis_answers(self, name: str) -> bool:
        seconds = probes.PROBE_DEADLINE_SECONDS
        return probes.redis_answers(lambda: self.redis(name, timeout_seconds=seconds))

    def _tap_appears(self, host: str, tap: str) -> Callable[[], bool]:
        return lambda: self.network.has_interface(host, tap)
