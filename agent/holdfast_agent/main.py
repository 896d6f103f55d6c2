"""The agent's process: `holdfast-agent --config FILE`.

Wires the parts together and runs them until SIGTERM or SIGINT:

* `supervisor` carries out assignments and keeps the workers;
* `host.reporter` speaks with the controllers;
* `host.peer_listener` receives primaries of other hosts;
* `host.vms` looks for VMs at their QMP sockets.

Ending the agent ends neither a worker nor a VM; the next agent adopts them.
"""

import argparse
import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Coroutine  # noqa: TC003 - read where it is used
from pathlib import Path

from holdfast_agent.config import AgentConfig, ConfigFaulty, load
from holdfast_agent.core.failures import VirtualMachineFailed
from holdfast_agent.host.facts import HostProbe, HostUnfit
from holdfast_agent.host.ledger import Ledger, LedgerBroken
from holdfast_agent.host.metrics import serve_metrics
from holdfast_agent.host.peer_listener import PeerListener
from holdfast_agent.host.reporter import Outbox, keep_beating, keep_polling
from holdfast_agent.host.vms import VmFinder
from holdfast_agent.network.qdisc_links import sweep
from holdfast_agent.supervisor import Supervisor
from holdfast_agent.transport.identity import Identity, IdentityUnusable
from holdfast_api.client import AgentClient
from holdfast_api.messages import Heartbeat

LOGGER = logging.getLogger(__name__)
EXPIRY_LOOK_SECONDS = 86_400.0
SWEEP_SECONDS = 30.0


async def run_agent(config: AgentConfig) -> None:
    """Run until cancelled; leave workers and VMs as they are."""
    identity = Identity.of(config)
    _look_at(identity, at_start=True)
    probe = await asyncio.to_thread(HostProbe, config)
    ledger = Ledger(config.state_dir / "ledger")
    async with AgentClient(config.controllers, config.host) as client:
        outbox = Outbox(client, config.host)
        finder = VmFinder(config)
        supervisor = Supervisor(config, ledger, outbox, finder)
        await supervisor.adopt()
        await finder.look(supervisor.busy_vms())
        listener = PeerListener(config.peer_listen, supervisor.backup_link, identity)

        async def make_heartbeat() -> Heartbeat:
            position = outbox.position  # before we look: what we see is later than that
            await finder.look(supervisor.busy_vms())
            return Heartbeat(
                facts=await asyncio.to_thread(probe.look),
                vms=finder.all_facts(),
                workers=supervisor.reports(),
                holdings=supervisor.holdings(),
                position=position,
            )

        metrics = serve_metrics(
            config.metrics_listen,
            config.host,
            supervisor.reports,
            lambda: listener.refused + supervisor.turned_away,
            identity.seconds_left if identity else None,
        )
        loops: list[Coroutine[None, None, None]] = [
            keep_beating(
                client, outbox, make_heartbeat, supervisor.apply, config.heartbeat_ms / 1000
            ),
            keep_polling(client, outbox, supervisor.apply),
            listener.serve(),
            _watch(identity),
            _keep_swept(),
        ]
        try:
            async with asyncio.TaskGroup() as group:
                for loop in loops:
                    group.create_task(loop)
        finally:
            metrics()
            await listener.close()
            await outbox.close()
            await supervisor.close()


def _look_at(identity: Identity | None, *, at_start: bool = False) -> None:
    """Warn of what is wrong with our certificate; at the start it must be there and ours.

    Later it must not end an agent whose VMs run.
    """
    if identity is None:
        LOGGER.warning("TLS is off: whoever reaches the peers' network can read and forge VMs")
        return
    try:
        for warning in identity.check():
            LOGGER.warning(warning)
    except IdentityUnusable:
        if at_start:
            raise
        LOGGER.exception("no new connection to a peer can begin")


async def _keep_swept() -> None:
    """Remove what holds output for VMs that are gone, now and again and again."""
    while True:
        try:
            await asyncio.to_thread(sweep)
        except VirtualMachineFailed as error:
            LOGGER.warning("%s", error)
        await asyncio.sleep(SWEEP_SECONDS)


async def _watch(identity: Identity | None) -> None:
    while True:
        await asyncio.sleep(EXPIRY_LOOK_SECONDS)
        await asyncio.to_thread(_look_at, identity)


async def _run_until_signal(config: AgentConfig) -> None:
    loop = asyncio.get_running_loop()
    task = asyncio.create_task(run_agent(config))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task


def main() -> int:
    """Parse arguments, read the configuration, run; return the exit status."""
    if not __debug__:
        print("assertions guard this program's safety: do not run it with python -O")
        return 2
    parser = argparse.ArgumentParser(prog="holdfast-agent", description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="a TOML file; see the docs")
    arguments = parser.parse_args()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s.%(msecs)03d %(levelname)s %(message)s", datefmt="%T"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        config = load(arguments.config)
        asyncio.run(_run_until_signal(config))
    except (ConfigFaulty, HostUnfit, IdentityUnusable, LedgerBroken) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
