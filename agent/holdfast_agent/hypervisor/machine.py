"""The QEMU of a running VM, driven over QMP. Talks to its monitor socket; signals its process.

A capture is one command, `xen-save-devices-state`: QEMU stops the guest, saves its devices into a
pipe of ours and lets the guest run again. It is sent beforehand but for its last byte (see `qmp.py`
for why a byte matters). The pipe has too little room for the state, so QEMU, and the guest with
it, stands until we read (`state_pipe.py`): that is when the dirty pages are harvested and copied.
The first bytes in the pipe say that the guest stands *and* that its disk requests are drained; the
`STOP` event comes before QEMU drains them, which is too early for a harvest.

A capture that is final, the guest standing afterwards, has a `stop` before it: QEMU lets run again
only what it stopped for the save. A QEMU that can not open the pipe (confined more narrowly) saves
into a memory file through `/dev/fdset/N` instead, between a `stop` and a `cont`.

`live: false` keeps QEMU from inactivating block devices, which it does after saving a stopped VM.

Whether the guest really ran is told by the `STOP` event: QEMU sends it only when a `stop` found
the guest running, and before it answers. No `query-status` is needed.

While attached, `set-action shutdown=pause`: a guest that powers off leaves QEMU behind in status
`shutdown` with an event, which tells a wanted end from a crash. `close` puts the action back.

Source: QEMU 7.2, `migration/savevm.c`, `softmmu/cpus.c`, `softmmu/runstate.c`.
"""

import contextlib
import logging
import os
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from holdfast_agent.core.failures import VirtualMachineFailed
from holdfast_agent.core.memory_map import MemoryMap
from holdfast_agent.core.vm_spec import VmSpec
from holdfast_agent.host.processes import wait_for_end
from holdfast_agent.hypervisor.holding import argv_of
from holdfast_agent.hypervisor.nics import read_nics
from holdfast_agent.hypervisor.qmp import QmpConnection, QmpEvent
from holdfast_agent.hypervisor.saving import FileSaving, PipeSaving, resume, status_of

LOGGER = logging.getLogger(__name__)
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

    def __init__(self, qmp: QmpConnection, *, through_pipe: bool = True) -> None:
        """Attach to a QEMU; the guest is left as it is.

        Without `through_pipe` the device state goes through a memory file from the start. Raises
        VirtualMachineFailed; the connection is then still the caller's.
        """
        self.qmp = qmp
        self.identity = identify(qmp)
        self._argv = argv_of(self.identity.pid)
        self._pidfd = os.pidfd_open(self.identity.pid)
        self._closed = False
        self._saving: PipeSaving | FileSaving | None = None
        try:
            self._saving = PipeSaving(qmp) if through_pipe else FileSaving(qmp)
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

    def prepare(self) -> None:
        """Have QEMU read all of the next capture's command but its last byte, beforehand."""
        self._way().prepare()

    def begin_capture(self, *, final: bool) -> None:
        """Let QEMU stop the guest and save its devices; returns at once."""
        self._way().begin(final=final)

    def wait_standing(self) -> None:
        """Return when the guest stands still and its disk requests are drained.

        Raises VirtualMachineNotRunning when it stood already, else VirtualMachineFailed; the guest
        is then left as it was.
        """
        try:
            self._way().wait_standing()
        except VirtualMachineFailed as error:
            self._leave_pipe(error)
            raise

    def finish_capture(self) -> bytes:
        """Return the device state; the guest runs again unless the capture was final.

        Raises VirtualMachineFailed: there is no checkpoint; the guest runs if QEMU lets it.
        """
        try:
            return self._way().finish()
        except VirtualMachineFailed as error:
            self.abandon_capture()
            self._leave_pipe(error)
            raise

    def abandon_capture(self) -> None:
        """End a capture that will be no checkpoint: the guest runs again if it did before it."""
        self._way().abandon()

    def resume(self) -> None:
        """Let the guest run; returns when QEMU has said so."""
        resume(self.qmp)

    def resume_if_ours(self) -> None:
        """Let a guest run that a worker left stopped when it died.

        QEMU's status is `paused` then. One that ended (`shutdown`) or failed is left alone.
        """
        if status_of(self.qmp) == "paused":
            self.resume()

    def stop(self) -> bool:
        """Stop the guest outside of a capture; its requests are drained then.

        Returns whether it ran: one that somebody else stopped is not ours to resume.
        """
        self.qmp.take_events("STOP")
        self.qmp.wait(self.qmp.queue("stop", brief=True))
        return self.qmp.saw_event("STOP")

    def _way(self) -> PipeSaving | FileSaving:
        assert self._saving is not None, "closed"
        return self._saving

    def _leave_pipe(self, error: VirtualMachineFailed) -> None:
        """Use the file from now on if QEMU may not open the pipe."""
        if isinstance(self._saving, PipeSaving) and self._saving.path in str(error):
            LOGGER.warning("the device state goes through a memory file: %s", error)
            self._saving.close()
            self._saving = FileSaving(self.qmp)

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
        if not wait_for_end(self._pidfd, KILL_TIMEOUT_S):
            raise VirtualMachineFailed(
                f"process {self.pid} did not end within {KILL_TIMEOUT_S} s of SIGKILL"
            )
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)
        self._close_descriptors()
        self.qmp.close()

    def close(self) -> None:
        """Let go of QEMU and leave it running as it is. Idempotent."""
        if self._closed:
            return
        with contextlib.suppress(VirtualMachineFailed):
            self._way().close()
            self.qmp.execute("set-action", {"shutdown": shutdown_action_of(self._argv)})
        self.qmp.close()
        self._close_descriptors()

    def _close_descriptors(self) -> None:
        if not self._closed:
            self._closed = True
            if self._saving is not None:
                self._saving.close()
            os.close(self._pidfd)
