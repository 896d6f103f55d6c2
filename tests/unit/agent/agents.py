"""A supervisor of real processes: stub workers, `sleep` for a QEMU, a remembering outbox."""

import asyncio
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from holdfast_agent.config import AgentConfig
from holdfast_agent.host.ledger import Ledger, LedgerEntry
from holdfast_agent.host.processes import start_ticks_of
from holdfast_agent.host.reporter import Outbox
from holdfast_agent.host.vms import VmFinder
from holdfast_agent.supervisor import Supervisor
from holdfast_api.client import AgentClient
from holdfast_api.messages import Assignment, Claim, ClaimVerdict, EventReport
from holdfast_api.records import Policy, ProtectionRecord, VmFacts
from holdfast_api.words import Generation, Phase, Role, VmId

Qemu = subprocess.Popen[bytes]

PATIENCE_SECONDS = 20.0
POLL_SECONDS = 0.01
STUB = Path(__file__).with_name("stub_worker.py")
NOBODY = "http://127.0.0.1:9"


class RememberingOutbox(Outbox):
    """Sends nothing and remembers what it was given; claims are answered by `verdict`."""

    def __init__(self, client: AgentClient) -> None:
        super().__init__(client, "h1")
        self.said: list[tuple[str, VmId, Generation]] = []
        self.events: list[EventReport] = []
        self.claims: list[Claim] = []
        self.verdict: ClaimVerdict | None = None

    def seeded(self, vm: VmId, generation: Generation, noted: Callable[[], None]) -> None:
        self.said.append(("seeded", vm, generation))
        noted()

    def released(self, vm: VmId, generation: Generation) -> None:
        self.said.append(("released", vm, generation))

    def seeding_failed(
        self,
        vm: VmId,
        generation: Generation,
        reason: str,
        noted: Callable[[], None] = lambda: None,
    ) -> None:
        del reason
        self.said.append(("seeding-failed", vm, generation))
        noted()

    def event(self, event: EventReport) -> None:
        self.events.append(event)

    async def claim(self, claim: Claim) -> ClaimVerdict:
        self.claims.append(claim)
        assert self.verdict is not None
        return self.verdict


class TestedAgent:
    """Everything that a supervisor needs, in one folder; a second one may follow the first."""

    __test__ = False

    def __init__(self, run_dir: Path, client: AgentClient) -> None:
        self.run_dir = run_dir
        self.config = AgentConfig(
            host="h1",
            controllers=(NOBODY,),
            peer_listen="127.0.0.1:0",
            state_dir=run_dir / "state",
            run_dir=run_dir,
            qmp_sockets=(),
        )
        self.outbox = RememberingOutbox(client)
        self.ledger = Ledger(self.config.state_dir / "ledger")
        self.finder = VmFinder(self.config)
        self.supervisor = Supervisor(self.config, self.ledger, self.outbox, self.finder)

    @property
    def entry(self) -> LedgerEntry:
        return self.ledger.entry("vm")

    def heard(self, kind: str) -> list[dict[str, Any]]:
        """Return what stub workers noted of this type."""
        path = self.run_dir / "heard"
        lines = path.read_text().splitlines() if path.exists() else []
        return [note for note in map(json.loads, lines) if note["type"] == kind]

    def started(self) -> list[tuple[str, str, int]]:
        """Return mode, role and generation of every worker ever started."""
        return [(n["mode"], n["role"], n["generation"]) for n in self.heard("started")]

    def finds(self, process: Qemu) -> None:
        """Let the finder know of a VM that runs as `process`."""
        facts = VmFacts(
            vm="vm",
            running=True,
            memory_bytes=1,
            vcpus=1,
            machine_type="pc",
            qemu_version="7.2",
            accelerator="tcg",
            pid=process.pid,
            start_ticks=start_ticks_of(process.pid),
        )
        self.finder.remember(facts, self.run_dir / "vm.qmp")

    def holds(self, process: Qemu, role: Role, **fields: Any) -> None:
        """Write into the ledger that `process` is held."""
        self.ledger.update(
            "vm",
            role=role,
            qemu_pid=process.pid,
            qemu_start_ticks=start_ticks_of(process.pid),
            **fields,
        )

    async def kill_worker(self) -> None:
        """Kill the newest worker and wait until the supervisor has noticed."""
        os.kill(self.heard("started")[-1]["pid"], signal.SIGKILL)
        await until(lambda: "vm" not in self.supervisor.busy_vms())

    def kill_all_workers(self) -> None:
        for note in self.heard("started"):
            if start_ticks_of(note["pid"]):
                os.kill(note["pid"], signal.SIGKILL)

    def all_workers_are_reaped(self) -> bool:
        return not any(Path(f"/proc/{note['pid']}").exists() for note in self.heard("started"))


def make_stub(run_dir: Path) -> Path:
    """Return a program that takes the interpreter's place and is the stub."""
    path = run_dir / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {STUB} "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def order(role: Role, phase: Phase, generation: int = 2, **fields: Any) -> Assignment:
    has_backup = role is Role.PRIMARY and phase in (Phase.SEEDING, Phase.PROTECTED)
    values: dict[str, Any] = {
        "vm": "vm",
        "generation": generation,
        "role": role,
        "phase": phase,
        "policy": Policy(),
        "peer": "h2" if has_backup or role is Role.BACKUP else None,
        "peer_address": "127.0.0.1:9" if has_backup else None,
    }
    return Assignment.model_validate(values | fields)


def record(primary: str, generation: int) -> ProtectionRecord:
    return ProtectionRecord(
        vm="vm", generation=generation, phase=Phase.UNPROTECTED, primary=primary, policy=Policy()
    )


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not is_so():  # noqa: ASYNC110 - what is awaited happens in other processes
            await asyncio.sleep(POLL_SECONDS)
