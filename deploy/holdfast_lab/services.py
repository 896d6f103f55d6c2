"""The lab's services: which party runs them, with which command and configuration.

Writes the configuration files; starts nothing.
"""

import importlib.util
import json
import sys
from dataclasses import dataclass, field

from holdfast_api import pki
from holdfast_lab import clocks, control_plane
from holdfast_lab.errors import LabRefused
from holdfast_lab.network import party_address
from holdfast_lab.paths import find_tool
from holdfast_lab.state import Folder, LabState

COMPONENTS = ("etcd", "controller", "agents")
CONTROLLER_PORT = 7700
PEER_PORT = 7701
METRICS_PORT = 7702
ETCD_PORT = 2379
ETCD_PEER_PORT = 2380
LOOPBACK = "127.0.0.1"
_MODULES = {"controller": "holdfast_controller.main", "agents": "holdfast_agent.main"}


@dataclass(frozen=True)
class Service:
    """How to start one."""

    name: str
    party: str
    argv: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    """Beside the machine's own."""


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
    if name in control_plane.all_names(state):
        argv = (_etcd if kind == control_plane.ETCD else _controller)(folder, state, name)
        return Service(name, control_plane.party_of(name), argv)
    if kind == "agent" and host in state.hosts and "agents" in state.components:
        environment = clocks.environment(folder, host) if state.clocks else {}
        return Service(name, host, _agent(folder, state, host), environment)
    raise LabRefused(f"this lab has no service {name!r}: it has {', '.join(service_names(state))}")


def make_certificates(folder: Folder, state: LabState) -> None:
    """Make an authority for the lab, and what each host needs of it."""
    pki.make_authority(folder.authority)
    for host in state.hosts:
        pki.issue(folder.authority, host)


def service_names(state: LabState) -> list[str]:
    """Return the services that the user may start and stop."""
    names = control_plane.all_names(state)
    if "agents" in state.components:
        names += [f"agent {host}" for host in state.hosts]
    return names


def address_of(name: str) -> str:
    """Return the address of a service of the control plane."""
    return party_address(control_plane.party_of(name))


def controller_target(name: str) -> str:
    """Return `address:port` where the parties of the lab find a controller."""
    return f"{address_of(name)}:{CONTROLLER_PORT}"


def forwarder_argv(target: str) -> list[str]:
    """Return the command of the way in from outside; it wants its socket as descriptor 3."""
    return [sys.executable, "-m", "holdfast_lab.forwarder", "--to", target]


def _etcd(folder: Folder, state: LabState, name: str) -> list[str]:
    address = address_of(name)
    members = control_plane.names_of(state, control_plane.ETCD)
    # A single one keeps the name, the folder and the peer address that labs always had.
    peers = {member: address_of(member) for member in members} if members[1:] else {name: LOOPBACK}
    own = _member(name)
    peer_url = f"http://{peers[name]}:{ETCD_PEER_PORT}"
    cluster = [f"{_member(each)}=http://{where}:{ETCD_PEER_PORT}" for each, where in peers.items()]
    return [
        find_tool("etcd"),
        f"--name={own}",
        f"--data-dir={folder.path / own}",
        f"--listen-client-urls=http://{address}:{ETCD_PORT},http://{LOOPBACK}:{ETCD_PORT}",
        f"--advertise-client-urls=http://{address}:{ETCD_PORT}",
        f"--listen-peer-urls={peer_url}",
        f"--initial-advertise-peer-urls={peer_url}",
        f"--initial-cluster={','.join(cluster)}",
        # A member that comes back from behind a cut must not depose the leader; default since 3.5.
        "--pre-vote",
        "--logger=zap",
        "--log-level=warn",
    ]


def _member(name: str) -> str:
    """Return what a member is called in its cluster, and its folder."""
    return name.replace(" ", "-")


def _controller(folder: Folder, state: LabState, name: str) -> list[str]:
    path = folder.path / f"{name.replace(' ', '-')}.toml"
    members = control_plane.names_of(state, control_plane.ETCD)
    # Each begins at another member, so that no loss of one member meets all controllers at once.
    first = (_number(name) - 1) % len(members)
    path.write_text(
        toml(
            listen_address="0.0.0.0",  # noqa: S104 - in a namespace that only the lab reaches
            listen_port=CONTROLLER_PORT,
            etcd_endpoints=[
                f"{address_of(member)}:{ETCD_PORT}" for member in _rotated(members, first)
            ],
        )
    )
    return [sys.executable, "-m", "holdfast_controller.main", "--config", str(path)]


def _controllers_for(state: LabState, host: str) -> list[str]:
    """Return the controllers' URLs as a host is told them: each host begins at another one."""
    # A lab may be made for agents alone; they look for a controller that somebody else starts.
    names = control_plane.names_of(state, control_plane.CONTROLLER) or [control_plane.CONTROLLER]
    first = (int(host[1:]) - 1) % len(names)
    return [f"http://{controller_target(name)}" for name in _rotated(names, first)]


def _number(name: str) -> int:
    return int(name.partition(" ")[2] or 1)


def _rotated(names: list[str], first: int) -> list[str]:
    return names[first:] + names[:first]


def _agent(folder: Folder, state: LabState, host: str) -> list[str]:
    run = folder.run(host)
    for path in (run / "vms", folder.disk(host)):
        path.mkdir(parents=True, exist_ok=True)
    values: dict[str, str | int | list[str]] = {
        "host": host,
        "controllers": _controllers_for(state, host),
        "peer_listen": f"{party_address(host)}:{PEER_PORT}",
        "metrics_listen": f"127.0.0.1:{METRICS_PORT}",
        "state_dir": str(folder.disk(host)),
        "run_dir": str(run),
        "qmp_sockets": [str(run / "vms" / "*.qmp")],
        "accelerator": state.accelerator,
    }
    if state.tls:
        made = folder.authority / "hosts" / host
        values["tls_ca"] = str(made / pki.AUTHORITY_FILE)
        values["tls_certificate"] = str(made / pki.HOST_FILE)
        values["tls_key"] = str(made / pki.HOST_KEY_FILE)
    else:
        values["tls"] = "off"
    if state.memory_total_bytes is not None:
        values["memory_total_bytes"] = state.memory_total_bytes
    path = run.parent / "agent.toml"
    path.write_text(toml(**values))
    return [sys.executable, "-m", "holdfast_agent.main", "--config", str(path)]


def toml(**values: str | int | list[str]) -> str:
    """Return a flat TOML document. JSON's strings, numbers and lists are TOML's too."""
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
