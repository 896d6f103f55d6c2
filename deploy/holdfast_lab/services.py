"""The lab's services: which party runs them, with which command and configuration.

Writes the configuration files; starts nothing.
"""

import importlib.util
import json
import sys
from dataclasses import dataclass

from holdfast_lab.errors import LabRefused
from holdfast_lab.network import CONTROL, party_address
from holdfast_lab.paths import find_tool
from holdfast_lab.state import Folder, LabState

COMPONENTS = ("etcd", "controller", "agents")
CONTROLLER_PORT = 7700
PEER_PORT = 7701
METRICS_PORT = 7702
ETCD_PORT = 2379
_MODULES = {"controller": "holdfast_controller.main", "agents": "holdfast_agent.main"}


@dataclass(frozen=True)
class Service:
    """How to start one."""

    name: str
    party: str
    argv: list[str]


def check_components(components: tuple[str, ...]) -> None:
    """Raise LabRefused when a component is unknown or not there to be started."""
    for component in components:
        if component not in COMPONENTS:
            raise LabRefused(f"a component is one of {', '.join(COMPONENTS)}: not {component}")
        module = _MODULES.get(component)
        if module and importlib.util.find_spec(module) is None:
            raise LabRefused(f"the package {module} is missing: run ./dev setup")
    if "controller" in components and "etcd" not in components:
        raise LabRefused("a controller needs etcd: name both components")


def describe(folder: Folder, state: LabState, name: str) -> Service:
    """Return how to start the service `name`; its configuration file is written.

    Raises LabRefused for a service that this lab does not have.
    """
    kind, _, host = name.partition(" ")
    if name == "etcd" and "etcd" in state.components:
        return Service(name, CONTROL, _etcd(folder))
    if name == "controller" and "controller" in state.components:
        return Service(name, CONTROL, _controller(folder))
    if kind == "agent" and host in state.hosts and "agents" in state.components:
        return Service(name, host, _agent(folder, state, host))
    raise LabRefused(f"this lab has no service {name!r}: it has {', '.join(service_names(state))}")


def service_names(state: LabState) -> list[str]:
    """Return the services that the user may start and stop."""
    names: list[str] = [name for name in ("etcd", "controller") if name in state.components]
    if "agents" in state.components:
        names += [f"agent {host}" for host in state.hosts]
    return names


def controller_url() -> str:
    """Return where the parties of the lab find the controller."""
    return f"http://{party_address(CONTROL)}:{CONTROLLER_PORT}"


def forwarder_argv(target: str) -> list[str]:
    """Return the command of the way in from outside; it wants its socket as descriptor 3."""
    return [sys.executable, "-m", "holdfast_lab.forwarder", "--to", target]


def _etcd(folder: Folder) -> list[str]:
    address = party_address(CONTROL)
    return [
        find_tool("etcd"),
        "--name=lab",
        f"--data-dir={folder.path / 'etcd'}",
        f"--listen-client-urls=http://{address}:{ETCD_PORT},http://127.0.0.1:{ETCD_PORT}",
        f"--advertise-client-urls=http://{address}:{ETCD_PORT}",
        "--listen-peer-urls=http://127.0.0.1:2380",
        "--initial-advertise-peer-urls=http://127.0.0.1:2380",
        "--initial-cluster=lab=http://127.0.0.1:2380",
        "--logger=zap",
        "--log-level=warn",
    ]


def _controller(folder: Folder) -> list[str]:
    path = folder.path / "controller.toml"
    path.write_text(
        toml(
            listen_address="0.0.0.0",  # noqa: S104 - in a namespace that only the lab reaches
            listen_port=CONTROLLER_PORT,
            etcd_endpoints=[f"{party_address(CONTROL)}:{ETCD_PORT}"],
        )
    )
    return [sys.executable, "-m", "holdfast_controller.main", "--config", str(path)]


def _agent(folder: Folder, state: LabState, host: str) -> list[str]:
    run = folder.run(host)
    for path in (run / "vms", folder.disk(host)):
        path.mkdir(parents=True, exist_ok=True)
    values: dict[str, str | int | list[str]] = {
        "host": host,
        "controllers": [controller_url()],
        "peer_listen": f"{party_address(host)}:{PEER_PORT}",
        "metrics_listen": f"127.0.0.1:{METRICS_PORT}",
        "state_dir": str(folder.disk(host)),
        "run_dir": str(run),
        "qmp_sockets": [str(run / "vms" / "*.qmp")],
        "accelerator": state.accelerator,
    }
    if state.memory_total_bytes is not None:
        values["memory_total_bytes"] = state.memory_total_bytes
    path = run.parent / "agent.toml"
    path.write_text(toml(**values))
    return [sys.executable, "-m", "holdfast_agent.main", "--config", str(path)]


def toml(**values: str | int | list[str]) -> str:
    """Return a flat TOML document. JSON's strings, numbers and lists are TOML's too."""
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
