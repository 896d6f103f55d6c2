"""An immutable snapshot of the world, as one planner pass sees it. Pure.

Everything the planner may use to decide is in here, and nothing else; two passes over the same view
give the same plan. Records carry the store's revision at which they were read, so that a step
planned from an old view fails its compare-and-swap instead of harming anybody.

Times are seconds of one clock of this process (`now_seconds`, `since_seconds`); they only decide
how soon something is tried again, never who may run a VM.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from holdfast_api.records import (
    HostFacts,
    HostSettings,
    Policy,
    ProtectionRecord,
    VmFacts,
    WorkerReport,
)
from holdfast_api.words import Generation, HostId, PolicyName, Role, VmId


@dataclass(frozen=True)
class Held:
    """Something a host says it keeps for a VM: a running guest or a standby."""

    vm: VmId
    generation: Generation
    role: Role


@dataclass(frozen=True)
class HeartbeatView:
    """What a living host said last."""

    revision: int
    """Of the store. What the host says was the case after every earlier revision."""
    facts: HostFacts
    vms: Mapping[VmId, VmFacts] = field(default_factory=dict)
    workers: Mapping[VmId, WorkerReport] = field(default_factory=dict)
    held: Mapping[VmId, Held] = field(default_factory=dict)

    def keeps(self, vm: VmId) -> bool:
        """Whether the host has anything of this VM: a guest, or something held for it."""
        return vm in self.vms or vm in self.held


@dataclass(frozen=True)
class HostView:
    """A host: what the operator says of it, and its heartbeat while it lives."""

    host: HostId
    settings: HostSettings = field(default_factory=HostSettings)
    settings_revision: int = 0
    """0: nothing is stored of it yet."""
    present: bool = False
    """What its last event said: True after it appeared or returned, False after it went silent."""
    heartbeat: HeartbeatView | None = None
    """None when its lease expired."""

    @property
    def alive(self) -> bool:
        """Its heartbeat is younger than the lease."""
        return self.heartbeat is not None


@dataclass(frozen=True)
class ProtectionView:
    """A record, the revision at which it was read, and since when it is at its generation."""

    record: ProtectionRecord
    revision: int
    since_seconds: float = 0.0


@dataclass(frozen=True)
class PolicyView:
    """A stored policy and its revision."""

    policy: Policy
    revision: int


@dataclass(frozen=True)
class View:
    """The world at one revision of the store."""

    revision: int = 0
    now_seconds: float = 0.0
    hosts: Mapping[HostId, HostView] = field(default_factory=dict)
    protections: Mapping[VmId, ProtectionView] = field(default_factory=dict)
    policies: Mapping[PolicyName, PolicyView] = field(default_factory=dict)

    def heartbeat(self, host: HostId) -> HeartbeatView | None:
        """Return what `host` said last, or None when it is silent or unknown."""
        known = self.hosts.get(host)
        return None if known is None else known.heartbeat

    def vm_facts(self, host: HostId, vm: VmId) -> VmFacts | None:
        """Return what `host` reports of `vm`."""
        heartbeat = self.heartbeat(host)
        return None if heartbeat is None else heartbeat.vms.get(vm)

    def record(self, vm: VmId) -> ProtectionRecord | None:
        """Return the record of `vm`, of whatever phase."""
        known = self.protections.get(vm)
        return None if known is None else known.record

    def reporters(self, vm: VmId) -> Iterator[tuple[HostId, VmFacts]]:
        """Yield every living host that reports `vm`, by name."""
        for name in sorted(self.hosts):
            facts = self.vm_facts(name, vm)
            if facts is not None:
                yield name, facts
