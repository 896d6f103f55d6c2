"""What one agent process is told at its start: a TOML file, and the environment over it.

Reads the file and `HOLDFAST_AGENT_*` variables. What the cluster must agree on is policy in etcd
and never stands here. All faults are reported at once.
"""

import os
import tomllib
from ipaddress import ip_address
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator

from holdfast_api.records import Model
from holdfast_api.words import HostId

ENVIRONMENT_PREFIX = "HOLDFAST_AGENT_"


class AgentConfig(Model):
    """Settings of an agent."""

    host: HostId
    """This host's name in the cluster; never two hosts with the same."""
    controllers: tuple[str, ...] = Field(min_length=1, max_length=16)
    """Base URLs of controllers; any of them can answer everything."""
    peer_listen: str
    """`address:port` where other agents connect; the address must be reachable for them."""
    tls: Literal["required", "off"] = "required"
    """How hosts speak to each other: by TLS 1.3 with certificates on both sides, or in the clear.
    The same on every host. `off` is for a network that nobody else reaches."""
    tls_ca: Path = Path("/etc/holdfast/pki/ca.pem")
    """PEM: the authorities whose certificates prove a host. Several while one is exchanged."""
    tls_certificate: Path = Path("/etc/holdfast/pki/host.pem")
    """PEM: this host's certificate, which names it `holdfast://host/HOST`. Read anew, with its key
    and the authorities, for every connection: a renewed file is used from the next one on."""
    tls_key: Path = Path("/etc/holdfast/pki/host.key")
    """PEM: its key, without a passphrase; for the agent's user alone."""
    rdma_address: str = ""
    """This host's address on its RDMA network, without a port; empty to do no RDMA. Checkpoints
    are not encrypted there: it must be a network that only hosts reach."""
    metrics_listen: str = "127.0.0.1:7702"
    """`address:port` of `/metrics`; empty to have none."""
    state_dir: Path = Path("/var/lib/holdfast")
    """Survives a reboot: ledger, logs."""
    run_dir: Path = Path("/run/holdfast")
    """Need not survive a reboot: sockets of workers and VMs."""
    qmp_sockets: tuple[str, ...] = ("/run/holdfast/vms/*.qmp",)
    """Globs of QMP sockets whose VMs this agent may protect. A QMP socket serves one client: give
    the agent one of its own."""
    accelerator: Literal["auto", "kvm", "tcg"] = "auto"
    """What standbys may run with; `auto` finds out whether KVM works."""
    tracker: Literal["auto", "pagemap-scan", "soft-dirty", "compare"] = "auto"
    plug: Literal["auto", "qdisc", "filter"] = "auto"
    """How output is held: by the kernel's plug qdisc, or by filters in QEMU, which serve neither
    vhost nor several queues. `auto` takes the kernel's where it has one."""
    memory_total_bytes: int | None = Field(default=None, ge=0)
    """Offer no more than this to standbys; None: all that the host has."""
    heartbeat_ms: int = Field(default=1000, ge=100, le=60_000)
    """Distance of two looks at the host, and of two heartbeats, if the controllers do not ask for
    fewer. Short: more load. Long: what happens is told late; must stay well under the controllers'
    heartbeat TTL (5 s)."""
    examine_ms: int = Field(default=5000, ge=500, le=600_000)
    """How often unprotected VMs are looked at again."""
    delta_cache_bytes: int = Field(default=256 << 20, ge=0)
    """Memory in which the worker of a primary remembers what its backup has, for each VM and no
    more than the VM has; used only while differences are sent. Small: fewer pages of a busy guest
    are known, and they are sent whole. 0: no differences."""
    seeding_bytes_per_second: int = Field(default=0, ge=0)
    """Upper limit of seeding; 0 is none."""

    @field_validator("rdma_address")
    @classmethod
    def _is_of_an_interface(cls, value: str) -> str:
        if value and (ip_address(value).is_loopback or ip_address(value).is_unspecified):
            raise ValueError(f"{value} is no address of an RDMA device")
        return value

    @field_validator("peer_listen", "metrics_listen")
    @classmethod
    def _has_port(cls, value: str) -> str:
        if value:
            split_address(value)
        return value


class ConfigFaulty(Exception):  # noqa: N818 - reads as a sentence where it is raised
    """The configuration cannot be used; the message lists every fault."""


def split_address(value: str) -> tuple[str, int]:
    """Split `address:port`; raises ValueError that says what is wrong."""
    address, separator, port = value.rpartition(":")
    if not separator or not port.isdigit() or not 0 <= int(port) <= 65535:  # noqa: PLR2004
        raise ValueError(f"{value!r} is not address:port")
    return address.strip("[]"), int(port)


def load(path: Path) -> AgentConfig:
    """Read the file at `path`, then the environment. Raises ConfigFaulty."""
    try:
        values: dict[str, object] = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigFaulty(f"{path}: {error}") from error
    for name in AgentConfig.model_fields:
        value = os.environ.get(ENVIRONMENT_PREFIX + name.upper())
        if value is not None:
            values[name] = value.split(",") if name in ("controllers", "qmp_sockets") else value
    try:
        return AgentConfig.model_validate(values)
    except ValidationError as error:
        faults = [f"  {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigFaulty("\n".join([f"{path} can not be used:", *faults])) from error
