"""An agent process: production supervisor, ledger, outbox and its two loops, on simulated time."""

from pathlib import Path
from typing import TYPE_CHECKING, cast

from tests.simulation.client import SimulatedAgentClient
from tests.simulation.control_plane import Controller
from tests.simulation.simulated_loop import new_loop

from holdfast_agent.config import AgentConfig
from holdfast_agent.host.ledger import Ledger
from holdfast_agent.host.reporter import Outbox, keep_beating, keep_polling
from holdfast_agent.supervisor import Supervisor
from holdfast_api.messages import Heartbeat
from holdfast_api.records import HostFacts, VmFacts

if TYPE_CHECKING:
    from tests.simulation.host import SimulatedHost

    from holdfast_agent.host.vms import VmFinder
    from holdfast_api.agent_client import AgentClient

MEMORY_BYTES = 8 << 30
HEARTBEAT_SECONDS = 1.0


class SimulatedFinder:
    """What the agent uses of `VmFinder`."""

    def __init__(self, host: "SimulatedHost") -> None:
        self._host = host
        self._facts: dict[str, VmFacts] = {}

    def all_facts(self) -> tuple[VmFacts, ...]:
        return tuple(f for f in self._facts.values() if self._host.qemus.find(f.pid) is not None)

    def facts_of(self, vm: str) -> VmFacts | None:
        facts = self._facts.get(vm)
        alive = facts is not None and self._host.qemus.find(facts.pid) is not None
        return facts if alive else None

    def socket_of(self, vm: str) -> Path:
        return Path("/simulated") / f"{vm}.qmp"

    def remember(self, facts: VmFacts, _socket: Path) -> None:
        self._facts[facts.vm] = facts

    async def look(self, busy: frozenset[str], *, at_once: bool = False) -> None:  # noqa: ARG002
        for qemu in self._host.qemus.on(self._host.name):
            if qemu.vm_name not in busy and not qemu.is_busy and not qemu.is_standby:
                self._facts[qemu.vm_name] = qemu.facts()
        gone = [vm for vm, f in self._facts.items() if self._host.qemus.find(f.pid) is None]
        for vm in gone:
            del self._facts[vm]


class Agent:
    """One agent, from its start until it is killed."""

    def __init__(self, host: "SimulatedHost", controllers: list[Controller]) -> None:
        self.host = host
        self.loop = new_loop(host.kernel, f"{host.name}/agent", host.clock)
        self.loop.start_program = host.start_program
        self.client = cast(
            "AgentClient", SimulatedAgentClient(host.name, host.network, controllers)
        )
        self.finder = cast("VmFinder", SimulatedFinder(host))
        self.outbox = Outbox(self.client, host.name)
        config = AgentConfig(
            host=host.name,
            controllers=("http://simulated:1",),
            peer_listen="127.0.0.1:1",
            state_dir=host.folder / "state",
            run_dir=host.folder / "run",
        )
        ledger = Ledger(host.folder / "state" / "ledger")
        self.supervisor = Supervisor(config, ledger, self.outbox, self.finder)
        self.loop.spawn(self._run())

    async def _run(self) -> None:
        supervisor = self.supervisor
        await supervisor.adopt()
        await self.finder.look(supervisor.busy_vms())
        kernel = self.host.kernel

        def share() -> float:
            return kernel.random.random()

        self.loop.create_task(
            keep_beating(
                self.client,
                self.outbox,
                self._heartbeat,
                supervisor.apply,
                HEARTBEAT_SECONDS,
                share=share,
            )
        )
        self.loop.create_task(keep_polling(self.client, self.outbox, supervisor.apply, share=share))

    async def _heartbeat(self) -> Heartbeat:
        position = self.outbox.position
        await self.finder.look(self.supervisor.busy_vms())
        return Heartbeat(
            facts=HostFacts(
                peer_address=f"{self.host.name}:7701",
                memory_total_bytes=MEMORY_BYTES,
                memory_available_bytes=MEMORY_BYTES,
                qemu_version="7.2.22",
                machine_types=("pc-q35-7.2",),
                accelerators=("tcg",),
                agent_version="simulated",
            ),
            vms=self.finder.all_facts(),
            workers=self.supervisor.reports(),
            holdings=self.supervisor.holdings(),
            position=position,
        )
