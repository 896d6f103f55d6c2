"""A real etcd, real controller processes, and agents played by the test over real HTTP."""

import asyncio
import contextlib
import itertools
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from holdfast_controller.adapters.etcd import EtcdClient

DEADLINE_SECONDS = 60.0
"""Generous: the machine is small and shared. Nothing is asserted about how long things take."""
GIBIBYTE = 1024**3
MEBIBYTE = 1024**2
Found = TypeVar("Found")


def eventually(what: str, look: Callable[[], Found | None]) -> Found:
    """Poll until `look` finds something, and return it."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > deadline:
            pytest.fail(f"not within {DEADLINE_SECONDS} s: {what}")
        time.sleep(0.02)


class Process:
    """A child that ends with the test, also when the test process is killed."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.command = ["setpriv", "--pdeathsig", "KILL", *command]
        self.log = log
        self.running: subprocess.Popen[bytes] | None = None

    def launch(self) -> None:
        assert self.running is None
        with self.log.open("ab") as log:
            self.running = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def send(self, number: signal.Signals) -> None:
        assert self.running is not None
        self.running.send_signal(number)

    def end(self, number: signal.Signals = signal.SIGKILL) -> int | None:
        if self.running is None:
            return None
        self.running.send_signal(number)
        self.running.send_signal(signal.SIGCONT)
        code = self.running.wait(timeout=DEADLINE_SECONDS)
        self.running = None
        return code

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


class Etcd(Process):
    """One member on loopback."""

    def __init__(self, folder: Path) -> None:
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(2)]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            client, peer = (each.getsockname()[1] for each in sockets)
        self.endpoint = f"127.0.0.1:{client}"
        urls = f"http://127.0.0.1:{client}", f"http://127.0.0.1:{peer}"
        super().__init__(
            [
                *("etcd", "--name", "m1", "--data-dir", str(folder / "data")),
                *("--listen-client-urls", urls[0], "--advertise-client-urls", urls[0]),
                *("--listen-peer-urls", urls[1], "--initial-advertise-peer-urls", urls[1]),
                *("--initial-cluster", f"m1={urls[1]}", "--logger", "zap"),
            ],
            folder / "etcd.log",
        )

    def start(self) -> None:
        self.launch()
        eventually("etcd is healthy", self._is_healthy)

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.endpoint}/health", timeout=5) as answer:
                return b'"health":"true"' in answer.read()
        except OSError:
            return False

    def freeze(self) -> None:
        self.send(signal.SIGSTOP)

    def thaw(self) -> None:
        self.send(signal.SIGCONT)


class Controller(Process):
    """A controller process, and a client of it."""

    def __init__(self, folder: Path, etcd: Etcd, name: str, **options: Any) -> None:
        values: dict[str, Any] = {
            "listen_port": 0,
            "etcd_endpoints": [etcd.endpoint],
            "etcd_request_timeout_seconds": 1.0,
            "heartbeat_ttl_seconds": 2,
            "planner_interval_seconds": 0.2,
        } | options
        config = folder / f"{name}.toml"
        config.write_text("".join(f"{key} = {value!r}\n" for key, value in values.items()))
        super().__init__(
            [sys.executable, "-m", "holdfast_controller.main", "--config", str(config)],
            folder / f"{name}.log",
        )
        self.http = httpx.Client(timeout=30.0, trust_env=False)

    def start(self, *, ready: bool = True) -> None:
        self.launch()
        found = eventually(
            "the controller listens", lambda: re.findall(r"listening on (\S+)", self.text())
        )
        self.http.base_url = httpx.URL(f"http://{found[-1]}")
        if ready:
            self.wait_ready()

    def wait_ready(self) -> None:
        eventually("the controller is ready", lambda: self.get("/readyz").status_code == 200)

    def wait_leads(self) -> None:
        leads = "\nholdfast_controller_is_leader 1.0\n"
        eventually("the controller leads", lambda: leads in self.get("/metrics").text)

    def wait_not_ready(self) -> None:
        eventually("the controller is not ready", lambda: self.get("/readyz").status_code == 503)

    def close(self) -> None:
        self.http.close()
        self.end()

    def get(self, path: str, **params: Any) -> httpx.Response:
        return self.http.get(path, params=params)

    def put(self, path: str, body: Any = None) -> httpx.Response:
        return self.http.put(path, json=body)

    def patch(self, path: str, body: Any) -> httpx.Response:
        return self.http.patch(path, json=body)

    def post(self, path: str, body: Any = None) -> httpx.Response:
        return self.http.post(path, json=body)

    def delete(self, path: str) -> httpx.Response:
        return self.http.delete(path)

    def protection(self, vm: str) -> dict[str, Any]:
        found: dict[str, Any] = ok(self.get(f"/v1/vms/{vm}/protection"))
        return found

    def events(self, vm: str, kind: str | None = None) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = ok(self.get("/v1/events"))["events"]
        return [e for e in events if e["vm"] == vm and kind in (None, e["kind"])]


def ok(response: httpx.Response) -> Any:
    """Return the body of a success."""
    assert response.is_success, (response.status_code, response.text)
    return response.json() if response.content else None


def problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Return the body of an error, which must be a whole problem document."""
    assert response.status_code == status, (response.status_code, response.text)
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body["code"] == code, body
    assert body["status"] == status
    assert body["title"]
    assert body["detail"]
    return body


def noted_once(events: list[dict[str, Any]], host: str) -> bool:
    """Whether a host was noted, and came and went in turn: no change was written down twice.

    Whether its first event says "for the first time" depends on who is quicker, the planner or the
    operator who labels it.
    """
    here = {"HostAppeared": True, "HostReturned": True, "HostWentSilent": False}
    seen = [here[e["kind"]] for e in events if e["host"] == host and e["kind"] in here]
    return bool(seen) and seen == [number % 2 == 0 for number in range(len(seen))]


def vm_facts(vm: str, **changes: Any) -> dict[str, Any]:
    return {
        "vm": vm,
        "running": True,
        "memory_bytes": 256 * MEBIBYTE,
        "vcpus": 1,
        "machine_type": "pc-q35-7.2",
        "qemu_version": "7.2.22",
        "accelerator": "tcg",
        "bridges": ["br0"],
        "pid": 42,
    } | changes


class Agent:
    """A host played by the test: says what it is told to, and does nothing by itself."""

    def __init__(self, controller: Controller, name: str) -> None:
        self.controller = controller
        self.name = name
        self.vms: list[dict[str, Any]] = []
        self.holdings: list[dict[str, Any]] = []
        self.workers: list[dict[str, Any]] = []
        self.position = 0
        self.facts: dict[str, Any] = {
            "peer_address": f"{name}:7001",
            "memory_total_bytes": 16 * GIBIBYTE,
            "memory_available_bytes": 8 * GIBIBYTE,
            "qemu_version": "7.2.22",
            "machine_types": ["pc-q35-7.2", "pc-i440fx-7.2"],
            "accelerators": ["tcg"],
            "trackers": ["pagemap-scan"],
            "bridges": ["br0"],
            "agent_version": "0.1.0",
        }

    def try_beat(self) -> httpx.Response:
        body = {
            "facts": self.facts,
            "vms": self.vms,
            "holdings": self.holdings,
            "workers": self.workers,
            "position": self.position,
        }
        return self.controller.post(f"/v1/agent/hosts/{self.name}/heartbeat", body)

    def beat(self) -> dict[str, dict[str, Any]]:
        """Send a heartbeat; return the orders by VM."""
        answer = ok(self.try_beat())
        self.position = answer["position"]
        return {order["vm"]: order for order in answer["assignments"]}

    def run(self, vm: str, **changes: Any) -> None:
        self.vms.append(vm_facts(vm, **changes))
        self.beat()

    def hold(self, vm: str, generation: int, role: str) -> None:
        self.holdings = [h for h in self.holdings if h["vm"] != vm]
        self.holdings.append({"vm": vm, "generation": generation, "role": role})

    def say(self, what: str, vm: str, generation: int, **more: Any) -> httpx.Response:
        body = {"vm": vm, "generation": generation, "host": self.name} | more
        return self.controller.post(f"/v1/agent/{what}", body)

    def claim(
        self, vm: str, generation: int, reason: str = "peer-silent", claim: str = "claim-0001"
    ) -> httpx.Response:
        return self.say("claims", vm, generation, claim=claim, reason=reason)


_numbers = itertools.count(1)


class Scene:
    """Hosts of one test, with names of its own, kept alive by their heartbeats."""

    def __init__(self, controller: Controller) -> None:
        self.controller = controller
        self.number = next(_numbers)
        self.vm = f"vm{self.number}"
        self.policy = f"policy{self.number}"
        self.agents: dict[str, Agent] = {}

    def host(self, name: str, controller: Controller | None = None) -> Agent:
        """Make a host and let it speak once; its label `scene` keeps others' VMs away."""
        agent = Agent(controller or self.controller, f"{name}-{self.number}")
        self.agents[name] = agent
        agent.beat()
        label = {"labels": {"scene": str(self.number)}}
        ok(agent.controller.patch(f"/v1/hosts/{agent.name}", label))
        return agent

    def inline_policy(self, **changes: Any) -> dict[str, Any]:
        placement = {"require_labels": {"scene": str(self.number)}} | changes.pop("placement", {})
        return {"placement": placement} | changes

    def protect(self, **changes: Any) -> dict[str, Any]:
        body = {"policy": self.inline_policy(**changes)}
        found: dict[str, Any] = ok(self.controller.put(f"/v1/vms/{self.vm}/protection", body))
        return found

    def beat_all(self) -> None:
        for agent in self.agents.values():
            agent.beat()

    def wait_for_phase(self, phase: str) -> dict[str, Any]:
        """Keep all hosts alive until the VM is in `phase`."""

        def look() -> dict[str, Any] | None:
            self.beat_all()
            found = self.controller.protection(self.vm)
            return found if found["phase"] == phase else None

        return eventually(f"{self.vm} is {phase}", look)

    def become_protected(self, primary: Agent) -> dict[str, Any]:
        """Run the VM on `primary` and bring its protection as far as protected."""
        if not any(facts["vm"] == self.vm for facts in primary.vms):
            primary.run(self.vm)
        self.protect()
        seeding = self.wait_for_phase("seeding")
        backup = next(a for a in self.agents.values() if a.name == seeding["backup"])
        backup.hold(self.vm, seeding["generation"], "backup")
        primary.hold(self.vm, seeding["generation"], "primary")
        ok(primary.say("seeded", self.vm, seeding["generation"]))
        return self.wait_for_phase("protected")


@contextlib.contextmanager
def running_etcd(folder: Path) -> Iterator[Etcd]:
    """Run an etcd with its data in `folder`; ended on the way out."""
    server = Etcd(folder)
    try:
        server.start()
        yield server
    finally:
        server.end()


def on_etcd(etcd: Etcd, scene: Callable[[AsyncExitStack, EtcdClient], Awaitable[None]]) -> None:
    """Run `scene` with a client of its own, on an empty store."""

    async def run() -> None:
        async with AsyncExitStack() as stack:
            client = EtcdClient([etcd.endpoint])
            stack.push_async_callback(client.close)
            await scene(stack, client)

    asyncio.run(run())


@pytest.fixture(scope="module")
def shared_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    """An etcd for tests that leave it alone."""
    with running_etcd(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture(scope="module")
def controller(shared_etcd: Etcd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controller]:
    """A ready controller on the shared etcd, and the only one: it plans."""
    process = Controller(tmp_path_factory.mktemp("controller"), shared_etcd, "first")
    try:
        process.start()
        process.wait_leads()
        yield process
    finally:
        process.close()


@pytest.fixture
def scene(controller: Controller) -> Scene:
    """Names of this test's own."""
    return Scene(controller)


@pytest.fixture
def own_etcd(tmp_path: Path) -> Iterator[Etcd]:
    """An etcd that the test may stop, freeze and kill."""
    with running_etcd(tmp_path) as server:
        yield server


@pytest.fixture
def make_controller(tmp_path: Path) -> Iterator[Callable[..., Controller]]:
    """Make controllers with options of your own; ended with the test."""
    made: list[Controller] = []

    def make(etcd: Etcd, **options: Any) -> Controller:
        process = Controller(tmp_path, etcd, f"controller{len(made)}", **options)
        made.append(process)
        return process

    try:
        yield make
    finally:
        for process in made:
            process.close()
