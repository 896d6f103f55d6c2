"""What a host keeps of a QEMU that Holdfast started: a note, a socket, a folder. Reads /proc.

The note is written before taps and process are made and completed right after, so that at any
moment a restarted agent can find the process, its taps and its files and adopt or destroy them. A
process is known by its pid and its start time together: a pid alone is used again. If we died
between start and note, the process is found by its monitor socket on its command line.

    RUN_DIR/vms/VM.qmp       monitor socket
    RUN_DIR/vms/VM.json      the note
    STATE_DIR/standbys/VM/   console output and sockets of the guest's ports
"""

import os
import shutil
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from holdfast_agent.core.failures import VirtualMachineFailed
from holdfast_agent.host.processes import is_alive, kill_and_wait, start_ticks_of
from holdfast_agent.network.qdisc_links import remove_plugs_of
from holdfast_agent.network.taps import remove_tap

SOCKET_PATH_BYTES_MAX = 107


class QemuHolding(BaseModel):
    """The note about one QEMU of ours."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vm: str
    note_path: Path
    qmp_path: Path
    folder: Path
    taps: tuple[str, ...] = ()
    argv: tuple[str, ...] = ()
    pid: int = 0
    """0 until QEMU was started."""
    start_ticks: int = 0

    @classmethod
    def planned(cls, vm: str, run_dir: Path, state_dir: Path, taps: tuple[str, ...]) -> Self:
        """Return the note about a QEMU that is to be started."""
        return cls(
            vm=vm,
            note_path=note_path_of(vm, run_dir),
            qmp_path=qmp_path_of(vm, run_dir),
            folder=state_dir / "standbys" / vm,
            taps=taps,
        )

    @classmethod
    def read(cls, vm: str, run_dir: Path) -> Self | None:
        """Read the note about `vm`; None when there is none that can be read."""
        try:
            return cls.model_validate_json(note_path_of(vm, run_dir).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValidationError):
            return None

    def started(self, pid: int, argv: tuple[str, ...]) -> Self:
        """Return the note completed with the process."""
        ticks = start_ticks_of(pid)
        return self.model_copy(update={"pid": pid, "argv": argv, "start_ticks": ticks})

    def write(self) -> None:
        """Store the note, whole or not at all."""
        draft = self.note_path.with_suffix(".new")
        with draft.open("w", encoding="utf-8") as file:
            file.write(self.model_dump_json())
            file.flush()
            os.fsync(file.fileno())
        draft.rename(self.note_path)

    def process(self) -> tuple[int, int] | None:
        """Return (pid, start ticks) of the living QEMU; None when there is none."""
        if self.pid:
            return (self.pid, self.start_ticks) if is_alive(self.pid, self.start_ticks) else None
        return _process_with_argument(str(self.qmp_path))


def qmp_path_of(vm: str, run_dir: Path) -> Path:
    """Return where the monitor socket of a QEMU of ours is."""
    return run_dir / "vms" / f"{vm}.qmp"


def note_path_of(vm: str, run_dir: Path) -> Path:
    """Return where the note about a QEMU of ours is."""
    return run_dir / "vms" / f"{vm}.json"


def argv_of(pid: int) -> tuple[str, ...]:
    """Return the command line of a process; empty when it does not live."""
    try:
        text = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return ()
    return tuple(os.fsdecode(word) for word in text.split(b"\0")[:-1])


def remove_remains(vm: str, run_dir: Path) -> None:
    """End the QEMU noted for `vm`, and remove its taps, files and note. Idempotent.

    Without a note only a socket that is left of the VM goes. Raises VirtualMachineFailed when the
    process survives SIGKILL, TapFailed when a tap cannot be removed; the note is then still there.
    """
    holding = QemuHolding.read(vm, run_dir)
    if holding is not None:
        process = holding.process()
        if process is not None and not kill_and_wait(*process):
            raise VirtualMachineFailed(f"process {process[0]} of {vm} survives SIGKILL")
        for tap in holding.taps:
            remove_tap(tap)
            remove_plugs_of(tap)
        shutil.rmtree(holding.folder, ignore_errors=True)
    qmp_path_of(vm, run_dir).unlink(missing_ok=True)
    note_path_of(vm, run_dir).unlink(missing_ok=True)


def _process_with_argument(part: str) -> tuple[int, int] | None:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and any(part in word for word in argv_of(int(entry.name))[1:]):
            pid = int(entry.name)
            return pid, start_ticks_of(pid)
    return None
