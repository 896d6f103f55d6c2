"""The standby QEMU of a backup: started waiting, filled from outside, promoted. Starts processes.

It is the primary's machine with `-incoming defer`: it has its memory and devices and runs nothing.
Whoever holds it writes memory from outside; `promote` gives it the devices' state as an incoming
migration. What can be done before is done before: taps made (and down), the descriptor of the
state passed to QEMU. At promotion QEMU loads, announces each NIC on the network (five RARP
frames, the first at once), and runs; the event RESUME says so.

QEMU lives in a session of its own, in the folder of its holding, and outlives us.
"""

import contextlib
import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast_agent.core.failures import (
    MonitorBusy,
    VirtualMachineFailed,
    VirtualMachineGone,
)
from holdfast_agent.core.vm_spec import VmSpec
from holdfast_agent.hypervisor.command_line import UnsuitableCommandLine, standby_argv
from holdfast_agent.hypervisor.device_state import incoming_stream
from holdfast_agent.hypervisor.guest_memory import MemoryNotFound, locate_named_blocks
from holdfast_agent.hypervisor.holding import (
    SOCKET_PATH_BYTES_MAX,
    QemuHolding,
    remove_remains,
)
from holdfast_agent.hypervisor.machine import QemuMachine, identify
from holdfast_agent.hypervisor.qmp import QmpConnection
from holdfast_agent.memory.location import BlockLocation
from holdfast_agent.network.taps import TapFailed, TapSwitch, create_tap

if TYPE_CHECKING:
    from holdfast_agent.checkpoint.ports import MemoryCopier

START_TIMEOUT_S = 20.0
PROMOTE_TIMEOUT_S = 20.0
STDERR_LIMIT_BYTES = 1 << 16
F_ADD_SEALS = 1033
F_SEAL_SHRINK_AND_GROW = 0x2 | 0x4
STATE_NAME = "hf-state"


MemoryFactory = Callable[[int, Sequence[BlockLocation]], "MemoryCopier"]
"""Opens the memory of the QEMU of a pid, given its blocks in the order of the VM's map."""


class QemuStandby:
    """Port `Standby`: owns a QEMU, its taps and its files until it was handed over."""

    def __init__(
        self,
        spec: VmSpec,
        *,
        run_dir: Path,
        state_dir: Path,
        taps: Mapping[str, str] | None = None,
    ) -> None:
        """Plan a standby of `spec`; `taps` renames taps, by netdev id. Nothing is made yet."""
        self._spec = spec
        self._run_dir = run_dir
        self._taps = {nic.netdev_id: (taps or {}).get(nic.netdev_id, nic.tap) for nic in spec.nics}
        names = tuple(self._taps.values())
        self._holding = QemuHolding.planned(spec.vm, run_dir, state_dir, names)
        self._qmp: QmpConnection | None = None
        self._memory: MemoryCopier | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._switch: TapSwitch | None = None
        self._errors = self._state = -1
        self._owned = False

    # --- starting ---------------------------------------------------------------------------------

    def start(self, memory_factory: MemoryFactory) -> None:
        """Start QEMU and wait until it can be filled.

        What an earlier holder left of this VM is removed first. Raises VirtualMachineFailed, and
        nothing is left behind.
        """
        assert not self._owned, "started already"
        remove_remains(self._spec.vm, self._run_dir)
        self._owned = True
        try:
            self._switch = TapSwitch()
            self._errors = _bounded_file("holdfast-stderr", STDERR_LIMIT_BYTES)
            self._state = os.memfd_create("holdfast-incoming", os.MFD_CLOEXEC)
            self._spawn()
            qmp = self._attach()
            self._check(qmp)
            self._memory = memory_factory(qmp.peer_pid, self._locate(qmp))
        except (UnsuitableCommandLine, MemoryNotFound, OSError) as error:
            self.destroy()
            raise VirtualMachineFailed(f"no standby of {self._spec.vm}: {error}") from error
        except BaseException:
            self.destroy()
            raise

    def _spawn(self) -> None:
        holding = self._holding
        if len(os.fsencode(holding.qmp_path)) > SOCKET_PATH_BYTES_MAX:
            raise VirtualMachineFailed(
                f"{holding.qmp_path}: longer than a socket's path may be "
                f"({SOCKET_PATH_BYTES_MAX} bytes); use a shorter run_dir"
            )
        argv = standby_argv(
            self._spec.argv,
            folder=str(holding.folder),
            qmp_path=str(holding.qmp_path),
            machine_type=self._spec.machine_type,
            taps=self._taps,
        )
        if shutil.which(argv[0]) is None:
            raise VirtualMachineFailed(
                f"{argv[0]} is not on this host: install the same QEMU as on the primary"
            )
        shutil.rmtree(holding.folder, ignore_errors=True)
        holding.folder.mkdir(mode=0o700, parents=True)
        holding.qmp_path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        holding.write()
        for nic in self._spec.nics:
            create_tap(self._taps[nic.netdev_id], nic.bridge)
        self._process = subprocess.Popen(
            argv,
            cwd=holding.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            start_new_session=True,
        )
        self._holding = holding.started(self._process.pid, argv)
        self._holding.write()

    def _attach(self) -> QmpConnection:
        """Wait for QEMU's monitor and connect."""
        assert self._process is not None, "started"
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise VirtualMachineFailed(
                    f"the standby of {self._spec.vm} ended at once: {self.errors_tail()}"
                )
            try:
                self._qmp = QmpConnection.connect(self._holding.qmp_path)
            except (VirtualMachineGone, MonitorBusy):
                time.sleep(0.01)
                continue
            return self._qmp
        raise VirtualMachineFailed(
            f"the standby of {self._spec.vm} did not open its monitor within "
            f"{START_TIMEOUT_S:.0f} s: {self.errors_tail()}"
        )

    def _check(self, qmp: QmpConnection) -> None:
        """Refuse a machine that the primary's device state would not fit."""
        found, spec = identify(qmp), self._spec
        wanted = (spec.machine_type, spec.qemu_version, spec.accelerator)
        got = (found.machine_type, found.qemu_version, found.accelerator)
        if wanted != got:
            raise VirtualMachineFailed(
                f"this host makes machine type, QEMU version and accelerator {got}; the primary "
                f"of {spec.vm} has {wanted}: they must be the same"
            )
        status = qmp.execute("query-status")["status"]
        if status != "inmigrate":
            raise VirtualMachineFailed(f"the standby of {spec.vm} is {status}, not waiting")
        qmp.execute("getfd", {"fdname": STATE_NAME}, fds=(self._state,))

    def _locate(self, qmp: QmpConnection) -> list[BlockLocation]:
        blocks = locate_named_blocks(qmp, qmp.peer_pid, [name for name, _ in self._spec.blocks])
        sizes = [(block.name, block.size_bytes) for block in blocks]
        if sizes != list(self._spec.blocks):
            raise VirtualMachineFailed(
                f"the standby of {self._spec.vm} has memory {sizes}, "
                f"its primary {list(self._spec.blocks)}"
            )
        return blocks

    # --- the port ---------------------------------------------------------------------------------

    @property
    def memory(self) -> "MemoryCopier":
        """Its memory, in the primary's numbering."""
        assert self._memory is not None, "only a standby that was started has memory"
        return self._memory

    @property
    def pid(self) -> int:
        """Process id of its QEMU; 0 before the start."""
        return self._holding.pid

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when the standby's QEMU says something."""
        assert self._qmp is not None, "only a standby that was started speaks"
        return self._qmp.fileno()

    def has_ended(self) -> bool:
        """Return whether the standby's QEMU is gone; reads what it said meanwhile."""
        if self._qmp is None:
            return True
        self._qmp.poll_events()
        return self._qmp.gone

    def promote(self, device_state: bytes) -> None:
        """Load the device state and run; returns when the guest runs and has announced itself.

        Raises VirtualMachineFailed; the standby is then good for nothing.
        """
        assert self._qmp is not None, "only a standby that was started can be promoted"
        assert self._switch is not None, "opened with the start"
        try:
            stream = incoming_stream(device_state, self._spec.machine_type)
            os.pwrite(self._state, stream, 0)
            for tap in self._taps.values():
                self._switch.raise_up(tap)
        except (ValueError, TapFailed, OSError) as error:
            raise VirtualMachineFailed(f"cannot promote {self._spec.vm}: {error}") from error
        self._qmp.take_events("RESUME")
        started = self._qmp.queue("migrate-incoming", {"uri": f"fd:{STATE_NAME}"})
        self._qmp.wait(started, timeout_s=PROMOTE_TIMEOUT_S)
        event = self._qmp.wait_event(("RESUME",), timeout_s=PROMOTE_TIMEOUT_S)
        if event is None or event.name != "RESUME":
            raise VirtualMachineFailed(
                f"{self._spec.vm} did not run after its device state was loaded: "
                f"{self.errors_tail() or 'QEMU says nothing'}"
            )

    def into_machine(self) -> QemuMachine:
        """Hand the promoted VM over: QEMU, its taps and its folder are then no longer ours.

        Raises VirtualMachineFailed; the standby then still owns all of it.
        """
        assert self._qmp is not None, "promote first"
        machine = QemuMachine(self._qmp)
        self._qmp = None
        if self._process is not None:
            self._process.returncode = 0  # it outlives us on purpose: Popen need not warn of it
        self._let_go()
        return machine

    def destroy(self) -> None:
        """End the QEMU and remove its taps and files. Idempotent; nothing after a handover.

        Raises VirtualMachineFailed or TapFailed when something cannot be removed; it is then still
        noted for `remove_remains`.
        """
        if not self._owned:
            return
        self._let_go()
        remove_remains(self._spec.vm, self._run_dir)
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=1)

    def errors_tail(self) -> str:
        """Return the end of what QEMU wrote to its standard error."""
        if self._errors < 0:
            return ""
        written = os.lseek(self._errors, 0, os.SEEK_CUR)
        start = max(0, written - 2000)
        return os.pread(self._errors, written - start, start).decode(errors="replace").strip()

    def _let_go(self) -> None:
        """Close what is on our side."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None
        if self._switch is not None:
            self._switch.close()
        self._owned = False
        for descriptor in (self._errors, self._state):
            if descriptor >= 0:
                os.close(descriptor)
        self._errors = self._state = -1


def _bounded_file(name: str, size_bytes: int) -> int:
    """Return a memory file that takes `size_bytes` and refuses more: QEMU then just goes on."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size_bytes)
    fcntl.fcntl(descriptor, F_ADD_SEALS, F_SEAL_SHRINK_AND_GROW)
    return descriptor
