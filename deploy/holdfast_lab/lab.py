"""A lab: several hosts on this machine, each in a namespace of its own. Start reading here.

Needs root; starts etcd and controllers (`control_plane`), an agent for each host, and QEMUs; see
`network` for what connects them and `state` for what is remembered.

Everything a lab makes lies in its namespaces and in /run/holdfast-lab/NAME, and every process it
starts runs in one of those namespaces. So taking it down needs no memory of what was done: end
what runs in the namespaces, remove them, remove the folder. That is also how a lab is cleaned up
whose maker crashed; one with an owner (a test's) is removed by the next lab that comes up.
"""

import contextlib
import socket
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from holdfast_lab import control_plane, namespaces, probes, processes, services, vm
from holdfast_lab.clients import REDIS_PORT, RedisConnection
from holdfast_lab.errors import LabRefused
from holdfast_lab.faults import THAW, Faults
from holdfast_lab.guest import ensure_image
from holdfast_lab.network import CLIENT, HOSTS_MAX, Network
from holdfast_lab.running import Say
from holdfast_lab.services import COMPONENTS
from holdfast_lab.state import Folder, LabState, VmState, lab_names, lock
from holdfast_lab.status import status_of

Result = TypeVar("Result")

ETCD_DEADLINE_SECONDS = 30.0
CONTROLLER_DEADLINE_SECONDS = 60.0
BOOT_DEADLINE_SECONDS = 90.0
TAP_DEADLINE_SECONDS = 10.0
POWER_OFF_PORT = 9
"""Of a guest: a connection powers it off; see `guest_files/init`."""


class Lab(Faults):
    """A lab that is up. Made by `up` or `attach`; as a context manager it goes down at the end.

    What can be done with its services is in `Running`, what can be broken in `Faults`.
    """

    # --- coming up, going down ---------------------------------------------------------------

    @classmethod
    def up(
        cls,
        hosts: int = 3,
        name: str = "lab",
        *,
        controllers: int = 1,
        etcd: int = 1,
        components: Sequence[str] = COMPONENTS,
        accelerator: str = "tcg",
        memory_total_bytes: int | None = None,
        clocks: bool = False,
        tls: bool = True,
        owned: bool = True,
        say: Say = lambda _: None,
    ) -> Self:
        """Make a lab, in the place of one with the same name, and wait until it works.

        `controllers`, `etcd`: how many replicas, how many members; several have a machine each.
        `clocks`: the hosts' clocks can be stopped. `tls`: hosts speak by it to each other. An
        `owned` lab ends with the calling process, at the latest when another comes up. Leaves
        nothing behind when it fails: raises LabRefused for what cannot be, LabTimedOut (with the
        end of the log) when a service does not come up.
        """
        folder = Folder(name)
        if not 1 <= hosts <= HOSTS_MAX:
            raise LabRefused(f"a lab has 1 to {HOSTS_MAX} hosts, not {hosts}")
        services.check_components(tuple(components))
        replicas = {control_plane.ETCD: etcd, control_plane.CONTROLLER: controllers}
        control_plane.check_counts(replicas)
        cls.remove_orphans()
        cls.remove(name)
        state = LabState(
            name=name,
            components=tuple(components),
            accelerator=accelerator,
            memory_total_bytes=memory_total_bytes,
            clocks=clocks,
            tls=tls,
            owner=processes.this_process() if owned else None,
            hosts={f"h{number}": True for number in range(1, hosts + 1)},
            replicas=replicas,
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
        return state.complete and all(
            processes.is_alive(process)
            for name, process in state.processes.items()
            if not name.startswith(THAW)
        )

    @classmethod
    def remove(cls, name: str) -> None:
        """Remove whatever there is of a lab, however it was left. Idempotent."""
        folder = Folder(name)
        recorded: list[processes.Process] = []
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
        if state.tls and "agents" in state.components:
            services.make_certificates(self.folder, state)
        self._say(f"network: a switch, {', '.join(state.hosts)}")
        self.network.create_switch()
        for party in (*control_plane.parties(state), *state.hosts):
            self.network.attach(party)
        members = control_plane.names_of(state, control_plane.ETCD)
        for name in members:
            self._say(name)
            self.start(name)
        for name in members:  # none of several answers before most of them run
            inside = self.network.namespace(control_plane.party_of(name))
            self._wait(name, ETCD_DEADLINE_SECONDS, partial(probes.etcd_answers, inside))
        names = control_plane.names_of(state, control_plane.CONTROLLER)
        for name in names:
            self._say(name)
            self._start_forwarder(name)
            self.start(name)
        for name, url in zip(names, self.urls, strict=True):
            answers = partial(probes.controller_is_ready, url)
            self._wait(name, CONTROLLER_DEADLINE_SECONDS, answers)
        if "agents" in state.components:
            self._say("agents")
            for host in state.hosts:
                self.start(f"agent {host}")
            if names:
                self.wait_for_hosts(*state.hosts)
        with self.folder.change() as changed:
            changed.complete = True

    def _start_forwarder(self, controller: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            process = processes.spawn(
                services.forwarder_argv(services.controller_target(controller)),
                log=self.folder.log(f"forwarder {controller}"),
                namespace=self.network.namespace(CLIENT),
                inherit=[listening.fileno()],
            )
            with self.folder.change() as state:
                state.processes[f"forwarder {controller}"] = process
                state.ports = (*state.ports, listening.getsockname()[1])

    # --- what a client needs -----------------------------------------------------------------

    @property
    def url(self) -> str:
        """Where the controller answers, or the first of several, seen from outside the lab."""
        urls = self.urls
        if not urls:
            raise LabRefused(f"lab {self.folder.name} was made without a controller")
        return urls[0]

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

    def status(self) -> dict[str, Any]:
        """Return what runs, as plain data."""
        return status_of(self.state, self.network)

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

    def _redis_answers(self, name: str) -> bool:
        seconds = probes.PROBE_DEADLINE_SECONDS
        return probes.redis_answers(lambda: self.redis(name, timeout_seconds=seconds))

    def _tap_appears(self, host: str, tap: str) -> Callable[[], bool]:
        return lambda: self.network.has_interface(host, tap)
