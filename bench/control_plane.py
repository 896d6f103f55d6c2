"""How fast claims are decided while a thousand hosts beat.

An etcd and three controller processes on loopback; agents that beat and long-poll as the product's
own do, all in one process of their own (`light_agents.py`); and claims made meanwhile from here: a
real claimant does not share an interpreter with 999 others. Every claim is of a backup whose
primary fell silent: it is won, the planner finds another backup, and the new pair is protected
again. Everything shares one machine, so the line about processors says how much of the time was
spent where; where all of it is spent, the figures are the machine's and not the product's.

    python -m bench.control_plane [--hosts 1000] [--beat-seconds 1]

Bounded in time and count; every process is ended, also when this one dies.
"""

import argparse
import asyncio
import contextlib
import logging
import multiprocessing
import os
import re
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.synchronize import Event
from pathlib import Path

import httpx

from bench.light_agents import agents_process
from bench.planning import host_name, record_of
from holdfast_api.agent_client import AgentClient
from holdfast_api.client import HoldfastClient
from holdfast_api.errors import HoldfastError
from holdfast_api.messages import Claim
from holdfast_api.words import ClaimReason
from holdfast_controller.adapters.etcd import EtcdClient, Put
from holdfast_controller.adapters.keys import Kind, encode, key_of

CONTROLLERS = 3
HEARTBEAT_SECONDS = 1.0
SETTLE_SECONDS = 12.0
"""Every host has been asked for the rhythm of so many by then, and has a lease for it."""
CLAIMANTS = 24
START_SECONDS_MAX = 60.0
PUTS_PER_TXN = 100

# --- processes ------------------------------------------------------------------------------------


def start(stack: contextlib.ExitStack, command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a process that ends with `stack`, and with this process however it ends."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    stack.callback(process.wait, timeout=START_SECONDS_MAX)
    stack.callback(process.kill)
    return process


def until(what: str, look: Callable[[], bool]) -> None:
    """Poll until `look` says yes."""
    deadline = time.monotonic() + START_SECONDS_MAX
    while not look():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {START_SECONDS_MAX} s: {what}")
        time.sleep(0.05)


def start_etcd(stack: contextlib.ExitStack, folder: Path) -> tuple[int, str]:
    """Start one member on loopback; returns its pid and endpoint."""
    with contextlib.ExitStack() as free:
        sockets = [free.enter_context(socket.socket()) for _ in range(2)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        client, peer = (f"127.0.0.1:{each.getsockname()[1]}" for each in sockets)
    command = [
        *("etcd", "--name", "m1", "--data-dir", str(folder / "data"), "--logger", "zap"),
        *(
            "--listen-client-urls",
            f"http://{client}",
            "--advertise-client-urls",
            f"http://{client}",
        ),
        *(
            "--listen-peer-urls",
            f"http://{peer}",
            "--initial-advertise-peer-urls",
            f"http://{peer}",
        ),
        *("--initial-cluster", f"m1=http://{peer}"),
    ]
    process = start(stack, command, folder / "etcd.log")
    until("etcd is healthy", lambda: answers(f"http://{client}/health"))
    return process.pid, client


def start_controller(
    stack: contextlib.ExitStack, folder: Path, endpoint: str, number: int, beat_seconds: float
) -> tuple[int, str]:
    """Start a controller with the options a real one has; returns its pid and URL."""
    config, log = folder / f"controller{number}.toml", folder / f"controller{number}.log"
    config.write_text(
        f'listen_port = 0\netcd_endpoints = ["{endpoint}"]\n'
        f"heartbeat_ttl_seconds = {int(5 * beat_seconds)}\n"
    )
    command = [sys.executable, "-m", "holdfast_controller.main", "--config", str(config)]
    process = start(stack, command, log)
    until("the controller listens", lambda: "listening on" in log.read_text())
    address = re.findall(r"listening on (\S+)", log.read_text())[-1]
    until("the controller is ready", lambda: answers(f"http://{address}/readyz"))
    return process.pid, f"http://{address}"


def answers(url: str) -> bool:
    """Whether `url` answers with success."""
    try:
        return httpx.get(url, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def processor_seconds(pid: int) -> float:
    """Return the processor time that a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- claims ---------------------------------------------------------------------------------------


async def write_records(endpoint: str, host_count: int) -> None:
    """Write one protected VM for each host, backed up by the next host."""
    etcd = EtcdClient([endpoint])
    try:
        puts = []
        for number in range(host_count):
            vm = f"vm{number:05d}"
            record = record_of(vm, host_name(number), host_name((number + 1) % host_count))
            puts.append(Put(key_of(Kind.PROTECTIONS, vm), encode(record)))
        for first in range(0, len(puts), PUTS_PER_TXN):
            await etcd.txn([], puts[first : first + PUTS_PER_TXN])
    finally:
        await etcd.close()


async def make_claims(
    urls: list[str], host_count: int, claim_count: int, seconds: float
) -> list[float]:
    """Claim as backups do, evenly over `seconds`; returns the milliseconds of each claim."""
    verify = ssl.create_default_context()
    milliseconds: list[float] = []

    async def claim(client: AgentClient, number: int) -> None:
        host = host_name((number + 1) % host_count)
        wanted = Claim(
            vm=f"vm{number:05d}",
            generation=3,
            host=host,
            claim=f"bench-{number:05d}",
            reason=ClaimReason.PEER_SILENT,
        )
        begun = time.perf_counter()
        verdict = await client.claim(wanted)
        milliseconds.append((time.perf_counter() - begun) * 1000)
        assert verdict.won, verdict

    async with contextlib.AsyncExitStack() as stack:
        clients = []
        for number in range(CLAIMANTS):
            turned = urls[number % len(urls) :] + urls[: number % len(urls)]
            client = AgentClient(turned, f"claimant{number}", verify=verify)
            clients.append(await stack.enter_async_context(client))
            await client.assignments(0, 0)  # warm, as a heartbeat would have left it
        async with asyncio.TaskGroup() as group:
            for number in range(claim_count):
                spread = number * (host_count // claim_count)
                group.create_task(claim(clients[number % CLAIMANTS], spread))
                await asyncio.sleep(seconds / claim_count)
    return milliseconds


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which `share` of `values` lies."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def claims(
    agent_count: int = 1000,
    claim_count: int = 250,
    seconds: float = 25.0,
    beat_seconds: float = HEARTBEAT_SECONDS,
) -> None:
    """Print how long claims take without and with so many agents beating and polling."""
    claim_count = min(claim_count, agent_count)  # one for each VM: a second one would be a retry
    print(f"{agent_count} agents, {CONTROLLERS} controllers, one etcd, {claim_count} claims")
    logging.disable(logging.WARNING)  # what was undecided shows in the figures
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="holdfast-bench-")))
        pids = {}
        pids["etcd"], endpoint = start_etcd(stack, folder)
        asyncio.run(write_records(endpoint, agent_count))
        urls = []
        for number in range(CONTROLLERS):
            name = f"controller {number}"
            pids[name], url = start_controller(stack, folder, endpoint, number, beat_seconds)
            urls.append(url)
        ended, process = start_agents(stack, agent_count, urls, beat_seconds)
        pids["agents"] = process.pid or 0
        time.sleep(SETTLE_SECONDS)
        until("all are ready", lambda: all(answers(f"{url}/readyz") for url in urls))
        before = {name: processor_seconds(pid) for name, pid in pids.items()}
        begun = time.monotonic()
        milliseconds = asyncio.run(make_claims(urls, agent_count, claim_count, seconds))
        elapsed = time.monotonic() - begun
        shares = {n: (processor_seconds(p) - before[n]) / elapsed for n, p in pids.items()}
        ended.set()
        process.join(START_SECONDS_MAX)
        print_claims(milliseconds, shares)
        print_events(urls[0])


def start_agents(
    stack: contextlib.ExitStack, agent_count: int, urls: list[str], beat_seconds: float
) -> tuple[Event, multiprocessing.process.BaseProcess]:
    """Start the process of all agents, which ends with `stack`; returns when all of them beat."""
    context = multiprocessing.get_context("spawn")
    started, ended = context.Event(), context.Event()
    process = context.Process(
        target=agents_process, args=(agent_count, urls, beat_seconds, started, ended), daemon=True
    )
    process.start()
    stack.callback(process.kill)
    if not started.wait(START_SECONDS_MAX):
        print("  this machine is too slow to start them all: fewer beat than wanted")
    return ended, process


def print_claims(milliseconds: Sequence[float], shares: dict[str, float]) -> None:
    """Print what the claims took, and where the processors' time went."""
    print(
        f"  claim: p50 {percentile(milliseconds, 0.5):.1f} ms, "
        f"p99 {percentile(milliseconds, 0.99):.1f} ms, max {max(milliseconds):.1f} ms"
    )
    told = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    load = os.getloadavg()[0]
    print(f"  processors: {told}; load average {load:.1f} on {os.cpu_count()} processors")


def print_events(url: str) -> None:
    """Print what the control plane made of it all, by kind of event."""
    client = HoldfastClient([url], timeout_seconds=START_SECONDS_MAX)
    counts: dict[str, int] = {}
    try:
        events = client.events()
    except HoldfastError as error:
        print(f"  events: not told: {error}")
        return
    for event in events:
        counts[event.kind] = counts.get(event.kind, 0) + 1
    print("  events: " + ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items())))


def main() -> None:
    """Measure, with other sizes if asked for."""
    parser = argparse.ArgumentParser(description="claims under heartbeats")
    parser.add_argument("--hosts", type=int, default=1000)
    parser.add_argument("--beat-seconds", type=float, default=HEARTBEAT_SECONDS)
    options = parser.parse_args()
    claims(options.hosts, beat_seconds=options.beat_seconds)


if __name__ == "__main__":
    main()
