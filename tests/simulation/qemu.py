"""The QEMU processes of all hosts: by pid, as supervisors and finders know them."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from tests.simulation.guest import GuestVm, TrackedPlug
from tests.simulation.kernel import SimulatedProcess

from holdfast_agent.hypervisor.preflight import disk_issues
from holdfast_api.records import VmFacts

MEMORY_BYTES = 128 << 20


@dataclass(eq=False)
class Qemu:
    """One QEMU process with the VM in it and the plug around it."""

    pid: int
    host: str
    vm_name: str
    vm: GuestVm
    plug: TrackedPlug
    incarnation: int
    is_standby: bool = False
    is_ours: bool = False
    """Holdfast started it, as a standby."""
    is_managed: bool = False
    """It was in a protection. What an operator starts a second time elsewhere is not."""
    user: SimulatedProcess | None = None
    """The worker that has the monitor."""
    failing_saves_total: int = 0
    """So many saves were made to fail; after enough in a row its worker gives the VM up."""

    @property
    def is_alive(self) -> bool:
        return self.vm.is_alive

    @property
    def is_busy(self) -> bool:
        return self.user is not None and not self.user.has_ended

    def facts(self) -> VmFacts:
        """Return what an agent finds out."""
        drive = {"device": "disk", "inserted": {"ro": not self.vm.has_disk}}
        return VmFacts(
            vm=self.vm_name,
            running=self.vm.is_running,
            memory_bytes=MEMORY_BYTES,
            vcpus=1,
            machine_type="pc-q35-7.2",
            qemu_version="7.2.22",
            accelerator="tcg",
            issues=tuple(disk_issues([drive])),
            pid=self.pid,
            start_ticks=self.pid,
        )


class Qemus:
    """All that live, anywhere."""

    def __init__(self) -> None:
        self._by_pid: dict[int, Qemu] = {}
        self._pids = itertools.count(100)

    def new_pid(self) -> int:
        return next(self._pids)

    def add(self, qemu: Qemu) -> None:
        self._by_pid[qemu.pid] = qemu

    def alive(self) -> Iterator[Qemu]:
        """Yield those that live; forgets the dead."""
        self._by_pid = {pid: qemu for pid, qemu in self._by_pid.items() if qemu.is_alive}
        yield from list(self._by_pid.values())

    def find(self, pid: int) -> Qemu | None:
        qemu = self._by_pid.get(pid)
        return qemu if qemu is not None and qemu.is_alive else None

    def on(self, host: str, vm_name: str | None = None) -> list[Qemu]:
        return [
            q for q in self.alive() if q.host == host and (vm_name is None or q.vm_name == vm_name)
        ]

    def guest_on(self, host: str, vm_name: str) -> Qemu | None:
        """Return the VM that is no standby any more, if this host has it."""
        return next((q for q in self.on(host, vm_name) if not q.is_standby), None)
