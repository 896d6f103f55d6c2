"""Whole protections: real QEMU, etcd, agents and controllers in a lab of this test's own."""

import contextlib
import ctypes
import os
import resource
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from holdfast_api.client import HoldfastClient
from holdfast_api.errors import HoldfastError
from holdfast_api.records import Event, Policy, Protection
from holdfast_api.words import EventKind, Phase
from holdfast_lab.clients import CountingClient
from holdfast_lab.lab import Lab
from holdfast_lab.namespaces import open_socket, run_tool
from holdfast_lab.vm import VmOptions

SMALL = VmOptions(memory_mb=128, graphics=False)
PATIENT_SECONDS = 60.0
SO_ATTACH_FILTER = 26


class Cluster:
    """A lab and a client of its controller, with what tests ask again and again."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.client = HoldfastClient(lab.urls, timeout_seconds=10)
        self._clients: list[CountingClient] = []

    def close(self) -> None:
        for client in self._clients:
            client.stop(deadline_seconds=5)
        self.client.close()

    def wait_for(self, what: str, probe: Callable[[], bool], seconds: float = 60.0) -> None:
        """Poll until `probe` says yes; what the API refuses meanwhile is "not yet"."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                if probe():
                    return
            except HoldfastError:
                pass
            time.sleep(0.05)  # polling with a deadline
        raise AssertionError(f"{what}: not within {seconds} s; {self.story()}")

    def story(self) -> str:
        """Everything the control plane remembers, for a failed assertion."""
        try:
            return "\n".join(f"{e.position} {e.kind} {e.message}" for e in self.events())
        except HoldfastError as error:
            return f"no events: {error}"

    def events(self, kind: EventKind | None = None) -> list[Event]:
        return [e for e in self.client.events(0) if kind is None or e.kind is kind]

    def protection(self, vm: str = "vm") -> Protection:
        return self.client.protection(vm)

    def protect(self, policy: Policy | None = None, vm: str = "vm") -> Protection:
        self.client.protect(vm, policy=policy or Policy())
        return self.wait_protected(vm)

    def wait_protected(self, vm: str = "vm", *, primary: str | None = None) -> Protection:
        def ready() -> bool:
            now = self.protection(vm)
            return now.phase is Phase.PROTECTED and primary in (None, now.primary)

        self.wait_for(f"{vm} is protected", ready)
        return self.protection(vm)

    def wait_primary(self, host: str, vm: str = "vm") -> None:
        self.wait_for(f"{vm} runs on {host}", lambda: self.protection(vm).primary == host)

    def run_vm(self, host: str = "h1", options: VmOptions = SMALL, vm: str = "vm") -> None:
        self.lab.run_vm(vm, host, options)
        self.wait_for(f"{vm} is known", lambda: self.client.vm(vm).host == host)

    def counting(self, vm: str = "vm", *, rest_seconds: float = 0.0) -> CountingClient:
        client = CountingClient(
            self.lab.redis(vm, timeout_seconds=PATIENT_SECONDS), rest_seconds=rest_seconds
        )
        self._clients.append(client)
        client.start()
        return client

    def goes_on(self, client: CountingClient, more: int = 20) -> None:
        """Demand more replies: in order, none lost or repeated, over the same connection."""
        target = client.seen().replies + more
        counted = client.wait_for_count(target, PATIENT_SECONDS)
        seen = client.seen()
        assert seen.wrong == [], seen
        assert seen.fault is None, (seen, self.story())
        assert counted, (seen, self.story())

    def says_nothing(self, client: CountingClient, seconds: float) -> None:
        """Demand that no reply comes for a while; one that is on its way may still arrive."""
        client.wait_for_count(client.seen().replies + 1, 0.2)
        assert not client.wait_for_count(client.seen().replies + 1, seconds), client.seen()

    def count_qemus(self) -> int:
        """Count the QEMUs of all hosts."""
        return sum(self.has_qemu(host) for host in self.lab.state.hosts)

    def has_qemu(self, host: str, vm: str = "vm") -> bool:
        """Return whether a QEMU of the VM lives on a host."""
        return bool(self._pids(host, "qemu-system", vm))

    def pid_of_worker(self, host: str, vm: str = "vm") -> int:
        """Return the pid of the VM's worker on a host."""
        return self._pid(host, "holdfast_agent.worker", vm)

    def pid_of_qemu(self, host: str, vm: str = "vm") -> int:
        """Return the pid of the VM's QEMU on a host."""
        return self._pid(host, "qemu-system", vm)

    @contextlib.contextmanager
    def capture(self, address: str) -> "Iterator[Capture]":
        """Capture what the guest of this address sends, outside of all taps."""
        capture = Capture(self.lab, address)
        try:
            yield capture
        finally:
            capture.close()

    @contextlib.contextmanager
    def full_disk(self, host: str) -> Iterator[None]:
        """Let a host's agent, and what it starts, get no byte onto the disk for a while."""
        agent = self._pid(host, "holdfast_agent.main", "agent.toml")
        before = resource.prlimit(agent, resource.RLIMIT_FSIZE)
        resource.prlimit(agent, resource.RLIMIT_FSIZE, (0, before[1]))
        try:
            yield
        finally:
            resource.prlimit(agent, resource.RLIMIT_FSIZE, before)

    def _pid(self, host: str, program: str, vm: str) -> int:
        pids = self._pids(host, program, vm)
        assert pids, f"no {program} of {vm} on {host}"
        return pids[0]

    def _pids(self, host: str, program: str, vm: str) -> list[int]:
        if not self.lab.state.hosts[host]:
            return []
        namespace = self.lab.network.namespace(host)
        text = run_tool(["ip", "netns", "pids", namespace])
        pids: list[int] = []
        for pid in map(int, text.split()):
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if program in command and vm in command:
                pids.append(pid)
        return pids


class Capture:
    """Frames from a guest, seen on the lab's switch: outside of every host."""

    def __init__(self, lab: Lab, address: str) -> None:
        self._socket = open_socket(
            lab.network.namespace("switch"), socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)
        )
        # The hosts' own traffic would fill the socket: only the guest's IPv4 and ARP come in.
        (guest,) = struct.unpack("!I", socket.inet_aton(address))
        program = b"".join(
            struct.pack("HBBI", *instruction)
            for instruction in (
                (0x28, 0, 0, 12),  # ldh [12]: ether type
                (0x15, 0, 2, 0x0800),
                (0x20, 0, 0, 26),  # ld [26]: IPv4 source
                (0x15, 3, 4, guest),
                (0x15, 0, 3, 0x0806),
                (0x20, 0, 0, 28),  # ld [28]: ARP sender
                (0x15, 0, 1, guest),
                (0x06, 0, 0, 0xFFFF),  # accept
                (0x06, 0, 0, 0),
            )
        )
        buffer = ctypes.create_string_buffer(program)
        attached = struct.pack("HL", len(program) // 8, ctypes.addressof(buffer))
        self._socket.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, attached)
        self._socket.settimeout(0)
        self._count = 0

    def count(self) -> int:
        """Return how many frames of the guest were seen since the last `clear`."""
        while True:
            try:
                self._socket.recv(65536)
            except BlockingIOError:
                return self._count
            self._count += 1

    def clear(self) -> None:
        """Forget what was seen."""
        self.count()
        self._count = 0

    def close(self) -> None:
        """Stop capturing."""
        self._socket.close()


@pytest.fixture
def make_cluster() -> Iterator[Callable[..., Cluster]]:
    """Return a function that brings a lab up; all of them go down at the end."""
    clusters: list[Cluster] = []

    def make(hosts: int = 3, **options: object) -> Cluster:
        name = f"w{os.getpid() % 10000}{len(clusters)}"
        cluster = Cluster(Lab.up(hosts=hosts, name=name, **options))  # type: ignore[arg-type]
        clusters.append(cluster)
        return cluster

    yield make
    for cluster in clusters:
        cluster.close()
        cluster.lab.down()


@pytest.fixture
def cluster(make_cluster: Callable[..., Cluster]) -> Cluster:
    """A lab of three hosts with a VM on the first, seen by the controller."""
    made = make_cluster(3)
    made.run_vm()
    return made
