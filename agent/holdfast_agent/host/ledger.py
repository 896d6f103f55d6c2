"""What this host has been ordered and what it holds, on disk, one small file for each VM.

Touches its folder only. Written before the deed and kept through crashes and reboots, so that

* an order of an older generation is refused, and so is the same generation with other content;
* a worker is started at most once in a generation for each role (a backup that stopped
  acknowledging must never begin again in that generation, INV-3);
* a loser finds and destroys its VM also after a restart (INV-6).
"""

import json
import os
from pathlib import Path

from pydantic import Field, ValidationError

from holdfast_api.records import Model
from holdfast_api.words import Generation, Role, VmId


class LedgerEntry(Model):
    """One VM as this host knows it."""

    vm: VmId
    generation: Generation = 0
    """Newest generation ordered."""
    content: str = Field(default="", max_length=256)
    """Role and peer of that order: the same generation must not say otherwise."""
    worker_generation: Generation = 0
    """Newest generation that a worker was started for."""
    role: Role = Role.NONE
    """What this host holds; NONE when nothing."""
    is_plugged: bool = False
    """A primary's worker was started and has not said that it took its plugs out."""
    is_standby: bool = False
    """What is held was started as a standby, and no worker has said that it runs."""
    qemu_pid: int = 0
    qemu_start_ticks: int = 0


class Ledger:
    """All entries, in memory and on disk; one writer."""

    def __init__(self, folder: Path) -> None:
        """Read the folder; a file that cannot be read is an error, never silently forgotten."""
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._entries: dict[VmId, LedgerEntry] = {}
        for path in sorted(folder.glob("*.json")):
            try:
                entry = LedgerEntry.model_validate(json.loads(path.read_text()))
            except (ValueError, ValidationError) as error:
                raise LedgerBroken(
                    f"{path} is not a ledger entry; move it away: {error}"
                ) from error
            if path.stem != entry.vm:  # a copy somebody made; it may be older than the entry
                raise LedgerBroken(f"{path} speaks of {entry.vm}; move it away")
            self._entries[entry.vm] = entry

    def entry(self, vm: VmId) -> LedgerEntry:
        """Return the entry of `vm`, an empty one if there is none."""
        return self._entries.get(vm, LedgerEntry(vm=vm))

    def entries(self) -> list[LedgerEntry]:
        """Return all entries."""
        return list(self._entries.values())

    def update(self, vm: VmId, **changes: object) -> LedgerEntry:
        """Change fields of an entry; on disk before this returns. Unchanged writes nothing."""
        before = self.entry(vm)
        after = LedgerEntry.model_validate(before.model_dump() | changes)
        assert after.generation >= before.generation, (before, after)
        if after == before and vm in self._entries:
            return after
        path = self._folder / f"{vm}.json"
        temporary = path.with_suffix(".new")
        with temporary.open("w") as file:
            file.write(after.model_dump_json())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        self._entries[vm] = after
        return after

    def forget(self, vm: VmId) -> None:
        """Drop what is held but remember the generation: old orders stay refused."""
        self.update(
            vm,
            role=Role.NONE,
            is_plugged=False,
            is_standby=False,
            qemu_pid=0,
            qemu_start_ticks=0,
        )


class LedgerBroken(Exception):  # noqa: N818 - reads as a sentence where it is raised
    """A file of the ledger cannot be read."""
