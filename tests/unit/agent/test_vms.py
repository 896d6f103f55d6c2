"""When an agent looks at the monitors of its host, with sockets of a monitor that is busy."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.unit.agent.agents import NOBODY

from holdfast_agent.config import AgentConfig
from holdfast_agent.host import vms
from holdfast_agent.host.vms import VmFinder
from holdfast_agent.hypervisor.holding import qmp_path_of

VM = frozenset({"vm"})
NOTHING: frozenset[str] = frozenset()


@pytest.fixture
def config(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> AgentConfig:
    monkeypatch.setattr(vms, "CONNECT_SECONDS", 0.01)
    return AgentConfig(
        host="h1",
        controllers=(NOBODY,),
        peer_listen="127.0.0.1:0",
        state_dir=run_dir / "state",
        run_dir=run_dir,
        qmp_sockets=(str(run_dir / "own" / "*.qmp"),),
    )


@pytest.fixture
def monitor_at() -> Iterator[Callable[[Path], Callable[[], int]]]:
    """Return a function that makes a monitor; what that returns counts who came since."""
    listening: list[socket.socket] = []

    def make(path: Path) -> Callable[[], int]:
        path.parent.mkdir(parents=True, exist_ok=True)
        monitor = socket.socket(socket.AF_UNIX)
        monitor.bind(str(path))
        monitor.listen()
        monitor.setblocking(False)
        listening.append(monitor)

        def came() -> int:
            count = 0
            while True:
                try:
                    monitor.accept()[0].close()
                except BlockingIOError:
                    return count
                count += 1

        return came

    yield make
    for monitor in listening:
        monitor.close()


def test_a_standbys_monitor_is_left_to_its_worker_and_looked_at_once_that_has_gone(
    config: AgentConfig, monitor_at: Callable[[Path], Callable[[], int]]
) -> None:
    came = monitor_at(qmp_path_of("vm", config.run_dir))
    finder = VmFinder(config)
    asyncio.run(finder.look(VM))
    assert came() == 0
    asyncio.run(finder.look(NOTHING))
    assert came() == 1


def test_a_monitor_is_looked_at_once_in_a_while_or_at_once_when_asked(
    config: AgentConfig, monitor_at: Callable[[Path], Callable[[], int]], run_dir: Path
) -> None:
    came = monitor_at(run_dir / "own" / "some.qmp")
    finder = VmFinder(config)
    for _ in range(3):
        asyncio.run(finder.look(VM))
    assert came() == 1
    asyncio.run(finder.look(VM, at_once=True))
    assert came() == 1
