"""The QEMU of a running VM, driven over QMP. Talks to its monitor socket; signals its process.

A capture is `stop`, `xen-save-devices-state` and `cont`. The last byte of each next command is kept
back until its turn, so that QEMU has read the rest when it matters (see `qmp.py` for why a byte
does); the save's is sent the moment `stop` is answered, and runs beside the harvest.

The state is saved into a memory file of ours: QEMU gets a descriptor of it (opened write-only, as
it asks for: access modes must match) and is told `/dev/fdset/N`, so neither a path nor a
permission is needed. QEMU truncates the file but keeps the shared position: we set that to 0.
`live: false` keeps QEMU from inactivating block devices, which it does after saving a stopped VM.

Whether the guest really ran is told by the `STOP` event: QEMU sends it only when a `stop` found
the guest running, and before it answers. No `query-status` is needed.

While attached, `set-action shutdown=pause`: a guest that powers off leaves QEMU behind in status
`shutdown` with an event, which tells a wanted end from a crash. `close` puts the action back.

Source: QEMU 7.2, `migration/savevm.c`, `softmmu/cpus.c`, `softmmu/runstate.c`.
"""

import contextlib
import os
import re
import select
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from holdfast_agent.core.failures import (
    VirtualMachineFailed,
    VirtualMachineNotRunning,
)
from holdfast_agent.core.memory_map import MemoryMap
from holdfast_agent.core.vm_spec import VmSpec
from holdfast_agent.hypervisor.device_state import check_saved
from holdfast_agent.hypervisor.holding import argv_of
from holdfast_agent.hypervisor.nics import read_nics
from holdfast_agent.hypervisor.qmp import QmpConnection, QmpEvent, Ticket

STATE_LIMIT_BYTES = 64 << 20
"""A device state is some 30 KiB, with many vCPUs a few MiB; more is a fault."""
QUIT_TIMEOUT_S = 3.0
KILL_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class MachineIdentity:
    """What a QEMU says it is."""

    pid: int
    qemu_version: str
    machine_type: str
    """As QEMU resolved it, for example `pc-q35-7.2`."""
    accelerator: str
    vcpus: int


def identify(qmp: QmpConnection) -> MachineIdentity:
    """Ask a QEMU what it is; changes nothing."""
    kind, kvm, cpus = (
        qmp.queue("qom-get", {"path": "/machine", "property": "type"}),
        qmp.queue("query-kvm"),
        qmp.queue("query-cpus-fast"),
    )
    return MachineIdentity(
        pid=qmp.peer_pid,
        qemu_version=qmp.version,
        machine_type=str(qmp.wait(kind)).removesuffix("-machine"),
        accelerator="kvm" if qmp.wait(kvm)["enabled"] else "tcg",
        vcpus=len(qmp.wait(cpus)),
    )


def shutdown_action_of(argv: Sequence[str]) -> str:
    """Return the action on shutdown that a command line asks for: `pause` or `poweroff`."""
    action = "poweroff"
    for i, word in enumerate(argv):
        if word in ("-no-shutdown", "--no-shutdown"):
            action = "pause"
        elif word in ("-action", "--action") and i + 1 < len(argv):
            found = re.search(r"(?:^|,)shutdown=(\w+)", argv[i + 1])
            action = found[1] if found else action
    return action


class QemuMachine:
    """Port `VirtualMachine`: one running QEMU; owns the connection it is given."""

    def __init__(self, qmp: QmpConnection) -> None:
        """Attach to a QEMU; the guest is left as it is.

        Raises VirtualMachineFailed; the connection is then still the caller's.
        """
        self.qmp = qmp
        self.identity = identify(qmp)
        self._argv = argv_of(self.identity.pid)
        self._pidfd = os.pidfd_open(self.identity.pid)
        self._state = os.memfd_create("holdfast-device-state", os.MFD_CLOEXEC)
        self._position = -1
        self._fdset = -1
        self._stop: Ticket | None = None
        self._save: Ticket | None = None
        self._cont_is_prepared = False
        self._closed = False
        try:
            self._position = os.open(f"/proc/self/fd/{self._state}", os.O_WRONLY | os.O_CLOEXEC)
            self._fdset = qmp.execute("add-fd", fds=(self._position,))["fdset-id"]
            self._save_arguments = {"filename": f"/dev/fdset/{self._fdset}", "live": False}
            qmp.execute("set-action", {"shutdown": "pause"})
        except BaseException:
            self._close_descriptors()
            raise

    @classmethod
    def attach(cls, qmp_path: str | Path) -> Self:
        """Connect to the monitor at `qmp_path` and attach.

        Raises MonitorBusy, VirtualMachineGone, VirtualMachineFailed; nothing is left open.
        """
        qmp = QmpConnection.connect(qmp_path)
        try:
            return cls(qmp)
        except VirtualMachineFailed:
            qmp.close()
            raise

    @property
    def pid(self) -> int:
        """Process id of QEMU."""
        return self.identity.pid

    @property
    def accelerator(self) -> str:
        """`kvm` or `tcg`."""
        return self.identity.accelerator

    def netdev_ids(self) -> tuple[str, ...]:
        """Return the ids of the taps whose output is to be held."""
        return tuple(nic.netdev_id for nic in read_nics(self.qmp))

    def spec(self, vm: str, memory_map: MemoryMap) -> VmSpec:
        """Return what a backup builds the standby from."""
        sizes = self.qmp.execute("query-memory-size-summary")
        return VmSpec(
            vm=vm,
            argv=self._argv,
            machine_type=self.identity.machine_type,
            qemu_version=self.identity.qemu_version,
            accelerator=self.identity.accelerator,
            vcpus=self.identity.vcpus,
            memory_bytes=sizes["base-memory"] + sizes.get("plugged-memory", 0),
            blocks=tuple((block.name, block.size_bytes) for block in memory_map.blocks),
            nics=read_nics(self.qmp),
        )

    # --- the capture ------------------------------------------------------------------------------

    def begin_stop(self) -> None:
        """Queue stop, and the save but for its last byte; nothing is sent yet."""
        assert self._stop is None, "a capture is under way"
        assert self._save is None, "a capture is under way"
        os.lseek(self._position, 0, os.SEEK_SET)
        self.qmp.take_events("STOP")
        self._stop = self.qmp.queue("stop", brief=True)
        self.qmp.arm("xen-save-devices-state", self._save_arguments)

    def wait_stopped(self) -> None:
        """Send what is queued and return when the guest stands still.

        Raises VirtualMachineNotRunning when it stood already (it is left so), else
        VirtualMachineFailed; the guest may then stand or run.
        """
        assert self._stop is not None, "begin_stop comes first"
        stop, self._stop = self._stop, None
        self.qmp.wait(stop)
        if not self.qmp.saw_event("STOP"):
            self._give_up_capture()
            raise VirtualMachineNotRunning(self._status())

    def begin_save(self) -> None:
        """Let the prepared save begin; returns at once. Then `cont` is prepared the same way."""
        self._save = self.qmp.fire()
        assert self._save is not None, "begin_stop and wait_stopped come first"
        self.qmp.arm("cont")
        self._cont_is_prepared = True
        self.qmp.flush()

    def wait_saved(self) -> bytes:
        """Return the device state saved since `begin_save`.

        Raises VirtualMachineFailed; the guest still stands.
        """
        assert self._save is not None, "begin_save comes first"
        save, self._save = self._save, None
        self.qmp.wait(save)
        size_bytes = os.lseek(self._position, 0, os.SEEK_CUR)
        if size_bytes > STATE_LIMIT_BYTES:
            raise VirtualMachineFailed(f"QEMU saved {size_bytes} bytes of device state")
        saved = os.pread(self._state, size_bytes, 0)
        try:
            check_saved(saved)
        except ValueError as error:
            raise VirtualMachineFailed(f"QEMU saved no sound device state: {error}") from error
        return saved

    def resume(self) -> None:
        """Let the guest run; returns when QEMU has said so."""
        if self._save is not None:
            self.qmp.forget(self._save)
            self._save = None
        if not self._cont_is_prepared:  # what is prepared then is a save that nobody wants
            self.qmp.disarm()
        self._cont_is_prepared = False
        armed = self.qmp.fire()
        self.qmp.wait(self.qmp.queue("cont", brief=True) if armed is None else armed)

    def resume_if_ours(self) -> None:
        """Let a guest run that a worker left stopped when it died.

        QEMU's status is `paused` then. One that ended (`shutdown`) or failed is left alone.
        """
        if self._status() == "paused":
            self.resume()

    def stop(self) -> None:
        """Stop the guest outside of a capture (for a handover, or while a claim is undecided)."""
        self._give_up_capture()
        self.qmp.execute("stop")

    def _give_up_capture(self) -> None:
        """Forget a capture's save; the `cont` that was armed for it must never be sent."""
        for ticket in (self._stop, self._save):
            if ticket is not None:
                self.qmp.forget(ticket)
        self.qmp.disarm()
        self._cont_is_prepared = False
        self._stop = self._save = None

    def _status(self) -> str:
        return str(self.qmp.execute("query-status")["status"])

    # --- the rest of a VM's life ------------------------------------------------------------------

    def poll_events(self) -> list[QmpEvent]:
        """Return the events QEMU sent meanwhile, without waiting."""
        return self.qmp.poll_events()

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when events (or the end) arrive."""
        return self.qmp.fileno()

    def kill(self) -> None:
        """End QEMU by SIGKILL; returns when the process is gone. Idempotent.

        Never by `quit`: an orderly exit may flush what is held. Raises VirtualMachineFailed when
        the process survives.
        """
        if self._closed:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        end_process(self._pidfd, self.identity.pid)
        self.qmp.close()
        self._close_descriptors()

    def close(self) -> None:
        """Let go of QEMU and leave it running as it is. Idempotent."""
        if self._closed:
            return
        with contextlib.suppress(VirtualMachineFailed):
            self._give_up_capture()
            self.qmp.execute("remove-fd", {"fdset-id": self._fdset})
            self.qmp.execute("set-action", {"shutdown": shutdown_action_of(self._argv)})
        self.qmp.close()
        self._close_descriptors()

    def _close_descriptors(self) -> None:
        if not self._closed:
            self._closed = True
            for descriptor in (self._pidfd, self._state, self._position):
                if descriptor >= 0:
                    os.close(descriptor)


def end_process(pidfd: int, pid: int) -> None:
    """Kill the process behind `pidfd` unless it ends by itself; returns when it is gone.

    Reaps it when it is our child. Raises VirtualMachineFailed when SIGKILL does not end it in time.
    """
    for timeout_s, signal_number in ((QUIT_TIMEOUT_S, signal.SIGKILL), (KILL_TIMEOUT_S, None)):
        if _ended(pidfd, timeout_s):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            return
        if signal_number is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal_number)
    raise VirtualMachineFailed(f"process {pid} did not end within {KILL_TIMEOUT_S} s of SIGKILL")


def _ended(pidfd: int, timeout_s: float) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(timeout_s * 1000))
