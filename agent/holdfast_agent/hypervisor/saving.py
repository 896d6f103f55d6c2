"""The two ways to have a QEMU stop, save its devices and go on. Talks QMP; owns pipe and file.

`PipeSaving` is one command and its last byte; `FileSaving` is three commands, for a QEMU that may
not open our pipe. Both stand in `wait_standing` until the guest does not run any more and its disk
requests are drained, and both leave a guest alone that stood already (VirtualMachineNotRunning).

`prepare` sends all of the next capture's first command but its last byte; any other command calls
that off, and `begin` then sends it whole.

Source: QEMU 7.2, `migration/savevm.c` (qmp_xen_save_devices_state), `softmmu/cpus.c` (do_vm_stop).
"""

import contextlib
import os
from pathlib import Path

from holdfast_agent.core.failures import VirtualMachineFailed, VirtualMachineNotRunning
from holdfast_agent.hypervisor.device_state import check_saved
from holdfast_agent.hypervisor.qmp import QmpConnection, Ticket
from holdfast_agent.hypervisor.state_pipe import StatePipe

SAVE = "xen-save-devices-state"
OURS = "holdfast-device-state"
"""Marks our descriptors in QEMU."""
STATE_LIMIT_BYTES = 64 << 20
"""A device state is some 30 KiB, with many vCPUs a few MiB; more is a fault."""


class PipeSaving:
    """QEMU stands while we do not read (see `state_pipe`), and then goes on by itself."""

    def __init__(self, qmp: QmpConnection) -> None:
        """Give QEMU the pipe. Raises VirtualMachineFailed; nothing is left open then."""
        self._qmp = qmp
        self._stop: Ticket | None = None
        self._save: Ticket | None = None
        self._final = False
        self._pipe = StatePipe(STATE_LIMIT_BYTES)
        try:
            added = _give(qmp, self._pipe.writing)
        except BaseException:
            self._pipe.close()
            raise
        self._pipe.hand_over(_owner_of(qmp.peer_pid))
        self._fdset = added["fdset-id"]
        self.path = f"/proc/self/fd/{added['fd']}"
        self._arguments = {"filename": self.path, "live": False}

    def prepare(self) -> None:
        """Send the save but for its last byte, unless it was."""
        self._qmp.arm_once(SAVE, self._arguments)
        self._qmp.flush()

    def begin(self, *, final: bool) -> None:
        """Let QEMU stop the guest and save; after a `final` save the guest goes on standing."""
        assert self._save is None, "a capture is under way"
        self._final = final
        self._pipe.begin()
        if final:
            self._stop = self._qmp.queue("stop", brief=True)
        self._qmp.take_events("STOP")
        self._qmp.arm_once(SAVE, self._arguments)
        self._save = self._qmp.fire()
        self._qmp.flush()

    def wait_standing(self) -> None:
        """Return when the guest stands and all its requests are drained.

        Raises VirtualMachineNotRunning when it stood already, else VirtualMachineFailed; the guest
        is then as it was, as far as QEMU lets it be.
        """
        assert self._save is not None, "begin comes first"
        try:
            if self._stop is not None:
                stop, self._stop = self._stop, None
                self._qmp.wait(stop)
            if not self._qmp.wait_beside(self._save, self._pipe.fileno()):
                self._end_save()  # raises: a save that ends without a byte has failed
        except VirtualMachineFailed:
            self.abandon()
            raise
        self._qmp.take_in()
        if not self._qmp.saw_event("STOP"):
            self._final = False
            self.abandon()
            raise VirtualMachineNotRunning(status_of(self._qmp))

    def finish(self) -> bytes:
        """Let QEMU end the save, and the guest run unless it was final; return the device state.

        Raises VirtualMachineFailed: what was copied meanwhile is no checkpoint.
        """
        assert self._save is not None, "begin comes first"
        self._end_save()
        if not (self._pipe.held_back or self._final):
            raise VirtualMachineFailed(
                f"the device state shrank to {self._pipe.received_bytes} bytes: the guest may have "
                f"run before it was copied"
            )
        return _checked(self._pipe.state(), self._pipe.received_bytes)

    def abandon(self) -> None:
        """End a capture without a result: the guest runs again if it did before. Idempotent."""
        if self._stop is not None:
            self._qmp.forget(self._stop)
            self._stop = None
        if self._save is not None:
            with contextlib.suppress(VirtualMachineFailed):
                self._end_save()
        if self._final:
            self._final = False
            resume(self._qmp)

    def close(self) -> None:
        """Take the pipe from QEMU as far as it listens, and close it. Idempotent."""
        if self._fdset >= 0:
            with contextlib.suppress(VirtualMachineFailed):
                _take_back(self._qmp, self._fdset)
            self._fdset = -1
        self._pipe.close()

    def _end_save(self) -> None:
        """Read until QEMU has answered."""
        assert self._save is not None, "begin comes first"
        save, self._save = self._save, None
        self._qmp.attend(self._pipe.fileno(), self._pipe.drain)
        try:
            self._qmp.wait(save)
        finally:
            self._qmp.neglect(self._pipe.fileno())
        self._pipe.drain()


class FileSaving:
    """QEMU saves into a memory file between a `stop` and a `cont`.

    QEMU gets a descriptor of it (opened write-only, as it asks for: access modes must match), so
    neither a path nor a permission is needed. It truncates the file but keeps the shared position:
    we set that to 0.
    """

    def __init__(self, qmp: QmpConnection) -> None:
        """Give QEMU the file. Raises VirtualMachineFailed; nothing is left open then."""
        self._qmp = qmp
        self._stop: Ticket | None = None
        self._save: Ticket | None = None
        self._stands = False
        self._final = False
        self._fdset = self._position = -1
        self._state = os.memfd_create(OURS, os.MFD_CLOEXEC)
        try:
            self._position = os.open(f"/proc/self/fd/{self._state}", os.O_WRONLY | os.O_CLOEXEC)
            self._fdset = _give(qmp, self._position)["fdset-id"]
        except BaseException:
            self.close()
            raise
        self._arguments = {"filename": f"/dev/fdset/{self._fdset}", "live": False}

    def prepare(self) -> None:
        """Send `stop` but for its last byte, unless it was."""
        self._qmp.arm_once("stop")
        self._qmp.flush()

    def begin(self, *, final: bool) -> None:
        """Let QEMU stop the guest."""
        assert self._stop is None, "a capture is under way"
        self._final = final
        os.lseek(self._position, 0, os.SEEK_SET)
        self._qmp.take_events("STOP")
        self._qmp.arm_once("stop")
        self._stop = self._qmp.fire()
        self._qmp.flush()

    def wait_standing(self) -> None:
        """Return when the guest stands, and QEMU saves. Raises as `PipeSaving` does."""
        assert self._stop is not None, "begin comes first"
        stop, self._stop = self._stop, None
        self._qmp.wait(stop)
        if not self._qmp.saw_event("STOP"):
            raise VirtualMachineNotRunning(status_of(self._qmp))
        self._stands = True
        self._save = self._qmp.queue(SAVE, self._arguments, brief=True)
        self._qmp.flush()

    def finish(self) -> bytes:
        """Return the device state; the guest runs unless it was final. Raises as `PipeSaving`."""
        assert self._save is not None, "wait_standing comes first"
        save, self._save = self._save, None
        self._qmp.wait(save)
        size_bytes = os.lseek(self._position, 0, os.SEEK_CUR)
        saved = os.pread(self._state, min(size_bytes, STATE_LIMIT_BYTES), 0)
        if not self._final:
            resume(self._qmp)
        self._stands = False
        return _checked(saved, size_bytes)

    def abandon(self) -> None:
        """End a capture without a result: the guest runs again if it did before. Idempotent."""
        for ticket in (self._stop, self._save):
            if ticket is not None:
                self._qmp.forget(ticket)
        self._stop = self._save = None
        if self._stands:
            self._stands = False
            resume(self._qmp)

    def close(self) -> None:
        """Take the file from QEMU as far as it listens, and close it. Idempotent."""
        if self._fdset >= 0:
            with contextlib.suppress(VirtualMachineFailed):
                _take_back(self._qmp, self._fdset)
        for descriptor in (self._position, self._state):
            if descriptor >= 0:
                os.close(descriptor)
        self._fdset = self._position = self._state = -1


def _give(qmp: QmpConnection, descriptor: int) -> dict[str, int]:
    """Give QEMU a descriptor, and take back what a worker that died left there.

    QEMU forgets descriptors when its last monitor client goes, but not if the next one comes first.
    """
    for fdset in qmp.execute("query-fdsets"):
        if any(one.get("opaque") == OURS for one in fdset["fds"]):
            _take_back(qmp, fdset["fdset-id"])
    added: dict[str, int] = qmp.execute("add-fd", {"opaque": OURS}, fds=(descriptor,))
    return added


def _take_back(qmp: QmpConnection, fdset: int) -> None:
    qmp.execute("remove-fd", {"fdset-id": fdset})


def resume(qmp: QmpConnection) -> None:
    """Let the guest run; returns when QEMU has said so."""
    qmp.wait(qmp.queue("cont", brief=True))


def status_of(qmp: QmpConnection) -> str:
    """Return QEMU's run state: `running`, `paused`, `shutdown`, ..."""
    return str(qmp.execute("query-status")["status"])


def _checked(saved: bytes, size_bytes: int) -> bytes:
    """Return `saved`. Raises VirtualMachineFailed when it is no whole device state."""
    if size_bytes > STATE_LIMIT_BYTES:
        raise VirtualMachineFailed(f"QEMU saved {size_bytes} bytes of device state")
    try:
        check_saved(saved)
    except ValueError as error:
        raise VirtualMachineFailed(f"QEMU saved no sound device state: {error}") from error
    return saved


def _owner_of(pid: int) -> int:
    """Return the user a process runs as."""
    return Path(f"/proc/{pid}").stat().st_uid
