"""Finds this host's VMs at their QMP sockets and keeps what is known of them.

A QMP socket serves one client at a time: each look connects, asks and hangs up, and a VM whose
worker holds the monitor is left alone; its facts are what the worker told last. Looks happen in a
thread and at most every `examine_ms`, but a socket that is new is looked at at once.
"""

import asyncio
import glob
import logging
import time
from pathlib import Path

from holdfast_agent.config import AgentConfig
from holdfast_agent.core.failures import MonitorBusy, VirtualMachineFailed, VirtualMachineGone
from holdfast_agent.host.processes import is_alive
from holdfast_agent.hypervisor.discovery import facts_of
from holdfast_agent.hypervisor.holding import qmp_path_of
from holdfast_agent.hypervisor.qmp import QmpConnection
from holdfast_agent.network.selection import outlook_of
from holdfast_api.records import VmFacts
from holdfast_api.words import VmId

LOGGER = logging.getLogger(__name__)
SOCKETS_MAX = 512
CONNECT_SECONDS = 0.5
"""A free monitor greets in a millisecond; waiting longer only delays the news that it is busy."""


class VmFinder:
    """What this host's QEMUs are."""

    def __init__(self, config: AgentConfig) -> None:
        """Know nothing yet."""
        self._config = config
        self._facts: dict[VmId, VmFacts] = {}
        self._sockets: dict[VmId, Path] = {}
        self._looked_at: dict[str, float] = {}
        self._lock = asyncio.Lock()
        promoted = str(qmp_path_of("*", config.run_dir))
        self._patterns = (*config.qmp_sockets, promoted)

    def all_facts(self) -> tuple[VmFacts, ...]:
        """Return the facts of every VM that lives."""
        return tuple(f for f in self._facts.values() if is_alive(f.pid, f.start_ticks))

    def facts_of(self, vm: VmId) -> VmFacts | None:
        """Return what is known of a VM that lives here."""
        facts = self._facts.get(vm)
        return facts if facts is not None and is_alive(facts.pid, facts.start_ticks) else None

    def socket_of(self, vm: VmId) -> Path:
        """Return the monitor socket of a VM; where a promoted one has it if it is not known."""
        return self._sockets.get(vm, qmp_path_of(vm, self._config.run_dir))

    def remember(self, facts: VmFacts, socket: Path) -> None:
        """Take over what a worker found out; only it can ask the monitor."""
        self._facts[facts.vm] = facts
        self._sockets[facts.vm] = socket

    async def look(self, busy: frozenset[VmId], *, at_once: bool = False) -> None:
        """Look at all sockets that are due (or, `at_once`, at all) and not busy."""
        async with self._lock:
            await asyncio.to_thread(self._look, busy, at_once)

    def _look(self, busy: frozenset[VmId], at_once: bool) -> None:  # noqa: FBT001 - passed on
        now = time.monotonic()
        # Standbys' too: they are no VMs yet, and will be looked at once their worker has gone.
        held = {str(self.socket_of(vm)) for vm in busy}
        paths = sorted({path for pattern in self._patterns for path in glob.glob(pattern)})  # noqa: PTH207
        for path in paths[:SOCKETS_MAX]:
            age_ms = (now - self._looked_at.get(path, float("-inf"))) * 1000
            if path not in held and (at_once or age_ms >= self._config.examine_ms):
                self._looked_at[path] = now
                self._ask(path)
        self._looked_at = {path: at for path, at in self._looked_at.items() if path in paths}
        gone = [vm for vm, f in self._facts.items() if not is_alive(f.pid, f.start_ticks)]
        for vm in gone:
            del self._facts[vm]
            self._sockets.pop(vm, None)

    def _ask(self, path: str) -> None:
        try:
            qmp = QmpConnection.connect(path, timeout_s=CONNECT_SECONDS)
        except VirtualMachineGone:
            return
        except MonitorBusy as error:
            LOGGER.info("%s", error)
            return
        except VirtualMachineFailed as error:
            LOGGER.warning("%s", error)
            return
        try:
            facts = facts_of(qmp, outlook=outlook_of(self._config.plug))
        except VirtualMachineFailed as error:
            LOGGER.warning("%s: %s", path, error)
            return
        finally:
            qmp.close()
        if facts is not None:
            self._facts[facts.vm] = facts
            self._sockets[facts.vm] = Path(path)
