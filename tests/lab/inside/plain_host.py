"""A hypervisor without a lab: an agent, a bridge and a VM in one booted host; the second has more.

    python -m tests.lab.inside.plain_host first       agent h1, and a VM of a Redis guest
    python -m tests.lab.inside.plain_host second      etcd, controller, agent h2; protects the VM
    python -m tests.lab.inside.plain_host say WORDS   one command to the guest's Redis, from here

`second` prints how it goes on: `protected` and the report, then after the failover `survived`.
The guests' bridges of both hosts are not joined: each host speaks to the guest that it runs.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.lab.inside.rdma import bring_up

from holdfast_api.client import HoldfastClient
from holdfast_api.errors import HoldfastError
from holdfast_api.records import Policy
from holdfast_api.words import EventKind, Phase
from holdfast_lab.guest import ensure_image
from holdfast_lab.paths import find_tool
from holdfast_lab.services import toml
from holdfast_lab.vm import VmOptions, VmPlan, qemu_argv

CONTROL = "10.8.0.2"
GUEST = "10.20.0.9"
DEADLINE_SECONDS = 400.0
FOLDER = Path("/run/plain")
POLICY = {"interval_ms": 200, "keepalive_ms": 500, "keepalive_misses": 10}
"""The hosts are ten times slower than real ones."""
AGENT = """
import sys
from holdfast_agent import main, supervisor
supervisor.WORKER_START_SECONDS = 150.0
sys.exit(main.main())
"""
"""An agent, patient with workers that start as slowly as everything here."""


def tell(*words: object) -> None:
    """Print a line for whoever waits for it."""
    sys.stdout.write(" ".join(str(word) for word in words) + "\n")
    sys.stdout.flush()


def shell(*commands: str) -> None:
    for command in commands:
        subprocess.run(command.split(), check=True, timeout=60)


def start(name: str, *argv: str) -> "subprocess.Popen[bytes]":
    """Start a service, which ends with the host; its log is FOLDER/NAME.log."""
    with (FOLDER / f"{name}.log").open("wb") as log:
        return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def prepare(host: str, address: str) -> None:
    """Bring up RDMA and the guests' bridge, and start the agent."""
    bring_up()
    shell("modprobe -a kvm_amd tun bridge")
    shell("ip link add br0 type bridge", "ip addr add 10.20.0.1/16 dev br0", "ip link set br0 up")
    (FOLDER / "vms").mkdir(parents=True)
    config = FOLDER / "agent.toml"
    config.write_text(
        toml(
            host=host,
            controllers=[f"http://{CONTROL}:7700"],
            peer_listen=f"{address}:7701",
            rdma_address=address,
            tls="off",
            state_dir=str(FOLDER / "state"),
            run_dir=str(FOLDER / "run"),
            qmp_sockets=[str(FOLDER / "vms" / "*.qmp")],
            accelerator="kvm",
        )
    )
    start("agent", sys.executable, "-c", AGENT, "--config", str(config))


def run_vm() -> None:
    """Start the VM `vm`, a KVM guest with one NIC."""
    plan = VmPlan(
        name="vm",
        number=1,
        accelerator="kvm",
        options=VmOptions(memory_mb=128, graphics=False, cpu="max,cx16=off"),
        qmp=FOLDER / "vms" / "vm.qmp",
        console=FOLDER / "console",
    )
    (tap,) = plan.taps
    shell(
        f"ip tuntap add {tap} mode tap vnet_hdr",
        f"ip link set {tap} master br0",
        f"ip link set {tap} up",
    )
    argv = qemu_argv(plan, ensure_image())
    words = argv.index("-append") + 1
    argv[words] = argv[words].replace(plan.addresses[0], GUEST)
    start("qemu", *argv)


def control_plane() -> None:
    """Start etcd and a controller."""
    start(
        "etcd",
        find_tool("etcd"),
        f"--data-dir={FOLDER / 'etcd'}",
        "--listen-client-urls=http://127.0.0.1:2379",
        "--advertise-client-urls=http://127.0.0.1:2379",
    )
    config = FOLDER / "controller.toml"
    config.write_text(
        toml(
            listen_address="0.0.0.0",
            listen_port=7700,
            etcd_endpoints=["127.0.0.1:2379"],
            heartbeat_ttl_seconds=20,
        )
    )
    start("controller", sys.executable, "-m", "holdfast_controller.main", "--config", str(config))


def wait_for(what: str, probe: Callable[[], bool], client: HoldfastClient) -> None:
    """Poll until `probe` says yes; what the API refuses meanwhile is "not yet"."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        try:
            if probe():
                return
        except HoldfastError:
            pass
        time.sleep(0.2)  # polling with a deadline
    story = [f"{event.position} {event.kind} {event.message}" for event in client.events(0)]
    raise AssertionError(f"{what}: not within {DEADLINE_SECONDS} s: {story}")


def say(*words: str) -> str:
    """Say one command to the guest's Redis and return its answer."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        try:
            with socket.create_connection((GUEST, 6379), timeout=20) as connection:
                connection.sendall((" ".join(words) + "\r\n").encode())
                return connection.recv(100).decode()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)  # polling with a deadline


def second(policy: Policy) -> None:
    """Protect the VM of the first host, and wait until it runs here."""
    client = HoldfastClient([f"http://{CONTROL}:7700"], timeout_seconds=20)
    wait_for("the VM is known", lambda: client.vm("vm").host == "h1", client)
    wait_for("both hosts", lambda: client.host("h1").alive and client.host("h2").alive, client)
    tell("known", client.vm("vm").model_dump_json())
    client.protect("vm", policy=policy)
    wait_for("it is protected", lambda: client.protection("vm").phase is Phase.PROTECTED, client)
    wait_for("a report", lambda: client.protection("vm").primary_report is not None, client)
    report = client.protection("vm").primary_report
    assert report is not None
    tell("protected", report.transport, report.model_dump_json())
    wait_for("it runs here", lambda: client.protection("vm").primary == "h2", client)
    kinds = [event.kind for event in client.events(0)]
    tell("survived", say("GET", "mark").split(), kinds.count(EventKind.FAILED_OVER))
    for event in client.events(0):
        tell(event.kind, event.message, event.evidence)


def main() -> None:
    """Do what the arguments say; see the module."""
    what, *words = sys.argv[1:]
    if what == "say":
        tell(say(*words))
        return
    FOLDER.mkdir(parents=True)
    if what == "first":
        prepare("h1", "10.8.0.1")
        run_vm()
        tell("ready")
        while True:
            time.sleep(3600)  # until this host is ended
    prepare("h2", CONTROL)
    control_plane()
    second(Policy.model_validate(POLICY | {"transport": os.environ.get("TRANSPORT", "auto")}))


if __name__ == "__main__":
    main()
