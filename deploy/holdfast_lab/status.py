"""What runs in a lab, as plain data. Reads /proc."""

from typing import Any

from holdfast_lab import control_plane, processes
from holdfast_lab.network import Network, party_address
from holdfast_lab.state import LabState


def url_of(port: int) -> str:
    """Return where a controller answers, seen from outside the lab."""
    return f"http://127.0.0.1:{port}"


def status_of(state: LabState, network: Network) -> dict[str, Any]:
    """Return hosts, services, VMs and cuts."""
    alive = {name: processes.is_alive(process) for name, process in state.processes.items()}
    control = [name for kind in control_plane.KINDS for name in _shown(state, kind)]
    return {
        "name": state.name,
        "url": url_of(state.ports[0]) if state.ports else None,
        "urls": [url_of(port) for port in state.ports],
        "hosts": [
            {
                "host": host,
                "address": party_address(host),
                "namespace": network.namespace(host),
                "powered": powered,
                "agent": alive.get(f"agent {host}", False),
            }
            for host, powered in state.hosts.items()
        ],
        "services": {name: alive.get(name, False) for name in control},
        "vms": [
            {
                "vm": known.name,
                "addresses": known.addresses,
                "started_on": known.started_on,
                "still_there": alive.get(f"vm {known.name} on {known.started_on}", False),
            }
            for known in state.vms.values()
        ],
        "cuts": [{"from": sender, "to": receiver} for sender, receiver in state.cuts],
    }


def _shown(state: LabState, kind: str) -> list[str]:
    """Return the services of a kind; one that the lab was made without is shown as not running."""
    return control_plane.names_of(state, kind) or [kind]
