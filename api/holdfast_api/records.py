"""What the control plane keeps and shows: policies, hosts, VMs, protections, events. Pure.

Every model refuses unknown fields, so that a misspelt option is an error and not a silence.
Units stand at the end of each name. Times are UTC seconds since 1970 as floats; they are shown to
people and never compared to decide anything.
"""

from typing import Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from holdfast_api.words import (
    Epoch,
    EventKind,
    Generation,
    HostId,
    Phase,
    PolicyName,
    Role,
    Severity,
    VmId,
    WorkerPhase,
)


class Model(BaseModel):
    """Base of every message and record: immutable, strict about names."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# --- policy ---------------------------------------------------------------------------------------


class Placement(Model):
    """Which hosts may back a VM up."""

    require_labels: dict[str, str] = Field(default_factory=dict, max_length=32)
    """A host must carry all of these labels."""
    prefer_labels: dict[str, str] = Field(default_factory=dict, max_length=32)
    """Hosts with more of these are taken first."""
    failure_domain: str | None = Field(default=None, max_length=63)
    """A label key; primary and backup must differ in its value; a host without it is
    passed over."""
    anti_affinity: tuple[VmId, ...] = Field(default=(), max_length=64)
    """VMs whose primary or backup must not share the chosen host."""
    hosts: tuple[HostId, ...] = Field(default=(), max_length=256)
    """If not empty, only these hosts."""
    exclude_hosts: tuple[HostId, ...] = Field(default=(), max_length=256)


EncodingPolicy: TypeAlias = Literal["auto", "none", "delta", "zstd", "delta-zstd"]


class Policy(Model):
    """What the operator asked for; stored, never edited by Holdfast itself."""

    interval_ms: int = Field(default=50, ge=5, le=10_000)
    """Longest distance of two checkpoints. Short: more pauses. Long: more dirty pages in each
    pause, and without `output_triggered` every reply waits for it."""
    min_interval_ms: int = Field(default=5, ge=1, le=10_000)
    """Shortest distance of two checkpoints, however much output waits."""
    output_triggered: bool = True
    """Take a checkpoint at once when output waits, not nearer than `min_interval_ms`."""
    output: Literal["hold", "unbuffered"] = "hold"
    """`unbuffered` lets output leave before it is acknowledged: UNSAFE, for measuring only."""
    held_limit_bytes: int = Field(default=64 << 20, ge=1 << 20, le=(1 << 32) - 1)
    """So much output of one NIC is held at most; whole packets beyond it are dropped, as a network
    may, and it is said. At half of it a checkpoint is taken at once."""
    transport: Literal["auto", "tcp", "rdma"] = "auto"
    """How checkpoints travel. `auto` takes RDMA where both hosts have an RDMA address configured
    and it works, else TCP. `rdma` takes no backup that can not be reached so. RDMA is checksummed
    but not encrypted."""
    encoding: EncodingPolicy = "auto"
    """What is done to the pages of checkpoints before they are sent. `delta` sends what changed in
    pages that the backup has, `zstd` compresses, `none` spares both hosts' processors. `auto` takes
    what is acknowledged soonest, by measurement. Pages of zeros are never sent as such."""
    keepalive_ms: int = Field(default=50, ge=10, le=10_000)
    """How often each side says that it lives."""
    keepalive_misses: int = Field(default=5, ge=2, le=100)
    """So many silent intervals make a suspicion. Low: false alarms on a busy host cost a
    failover. High: a dead host is noticed late."""
    placement: Placement = Placement()
    reprotect: Literal["auto", "manual"] = "auto"
    """Whether the planner looks for a new backup by itself after one was lost."""
    on_store_unreachable: Literal["hold"] = "hold"
    """What a side without its peer does while no claim can be decided. Only holding is safe."""

    @model_validator(mode="after")
    def _intervals_fit(self) -> Self:
        if self.min_interval_ms > self.interval_ms:
            raise ValueError(
                f"min_interval_ms ({self.min_interval_ms}) must not exceed "
                f"interval_ms ({self.interval_ms})"
            )
        return self

    @property
    def silence_limit_ms(self) -> int:
        """Silence of the peer for this long is a suspicion."""
        return self.keepalive_ms * self.keepalive_misses


class StoredPolicy(Model):
    """A policy with its name, as `GET /v1/policies` shows it."""

    name: PolicyName
    policy: Policy


DEFAULT_POLICY_NAME = "default"

# --- hosts ----------------------------------------------------------------------------------------


class HostFacts(Model):
    """What an agent knows of its own host; sent with every heartbeat."""

    peer_address: str = Field(max_length=255)
    """Where peer agents connect, `address:port`."""
    memory_total_bytes: int = Field(ge=0)
    memory_available_bytes: int = Field(ge=0)
    qemu_version: str = Field(max_length=64)
    machine_types: tuple[str, ...] = Field(default=(), max_length=1024)
    accelerators: tuple[str, ...] = Field(default=(), max_length=8)
    trackers: tuple[str, ...] = Field(default=(), max_length=8)
    """Dirty trackers that this host's kernel offers, best first."""
    plugs: tuple[str, ...] = Field(default=(), max_length=8)
    """Ways to hold output that this host has, best first."""
    transports: tuple[str, ...] = Field(default=(), max_length=8)
    """How checkpoints can travel from and to this host, best first. Empty: not known."""
    bridges: tuple[str, ...] = Field(default=(), max_length=256)
    agent_version: str = Field(max_length=64)

    def without_figures(self) -> Self:
        """Return them without what moves all the time."""
        return self.model_copy(update={"memory_available_bytes": 0})


class HostSettings(Model):
    """What the operator says of a host; kept in etcd, survives the host."""

    labels: dict[str, str] = Field(default_factory=dict, max_length=64)
    maintenance: bool = False
    """Takes no new backup and no switchover while true."""


class Host(Model):
    """A machine that runs an agent, as `GET /v1/hosts` shows it."""

    host: HostId
    alive: bool
    """Its heartbeat is younger than the lease."""
    settings: HostSettings
    facts: HostFacts | None
    """Last heard; None when it never spoke or its lease has expired."""
    primaries: tuple[VmId, ...] = ()
    backups: tuple[VmId, ...] = ()


# --- VMs ------------------------------------------------------------------------------------------


class PreflightIssue(Model):
    """A reason why a VM can not (blocking) or should not (warning) be protected."""

    code: str = Field(pattern=r"^[a-z][a-z0-9-]*$")
    severity: Severity
    message: str
    """What is the case and what to do about it."""


class VmFacts(Model):
    """What an agent found out about a running QEMU."""

    vm: VmId
    running: bool
    """The guest executes (QEMU's status is `running`)."""
    memory_bytes: int = Field(ge=0)
    vcpus: int = Field(ge=0)
    machine_type: str
    """As QEMU resolved it, for example `pc-q35-7.2`."""
    qemu_version: str
    accelerator: str
    bridges: tuple[str, ...] = ()
    """Bridges that its NICs are attached to; a backup host must have them all."""
    plugs: tuple[str, ...] = ()
    """Ways to hold its output that serve its NICs; a backup host must have one of them, or the VM
    could not be protected again after a failover. Empty: not known."""
    issues: tuple[PreflightIssue, ...] = ()
    pid: int = Field(ge=0)
    start_ticks: int = Field(default=0, ge=0)
    """Start time of `pid` in clock ticks since boot."""


class Vm(Model):
    """A virtual machine as `GET /v1/vms` shows it."""

    vm: VmId
    host: HostId | None
    """Where it runs; None when no living host reports it."""
    facts: VmFacts | None
    protection: "Protection | None" = None


# --- protections ----------------------------------------------------------------------------------


class ClaimStamp(Model):
    """Who moved the record to its present generation, so that a retried claim recognises itself."""

    claim: str = Field(max_length=64)
    """Chosen by the claimant, the same in every retry."""
    host: HostId
    reason: str = Field(max_length=64)
    generation: Generation = 0
    """The generation that this claim won; `transitions.claim` fills it in. The stamp stays when the
    planner moves the record on, so that a late retry still learns that it won."""


class Setback(Model):
    """A backup that could not be filled: its host is passed over for a while, longer each time."""

    host: HostId
    count: int = Field(ge=1)
    reason: str = Field(max_length=1024)


class Rejection(Model):
    """A host that was passed over, and why."""

    host: HostId
    reason: str


class PlacementNote(Model):
    """The planner's last search for a backup."""

    chosen: HostId | None
    rejections: tuple[Rejection, ...] = ()


class ProtectionRecord(Model):
    """The one record of a protection in etcd; every change of role raises `generation` by one."""

    vm: VmId
    generation: Generation
    phase: Phase
    primary: HostId
    backup: HostId | None = None
    policy_name: PolicyName | None = None
    """None when the policy was given inline."""
    policy: Policy
    handover: bool = False
    """A planned switchover is wanted: the primary hands over after its next checkpoint."""
    claimed: ClaimStamp | None = None
    placement: PlacementNote | None = None
    backup_wanted: bool = True
    """The planner may look for a backup. Cleared when one is lost under `reprotect: manual`; the
    operator sets it again by protecting the VM once more."""
    setbacks: tuple[Setback, ...] = Field(default=(), max_length=32)
    """Hosts whose seeding failed since the VM was last protected."""
    unprotected_since: float | None = None
    """UTC seconds; None while protected."""

    @model_validator(mode="after")
    def _roles_fit(self) -> Self:
        if self.backup is not None and self.backup == self.primary:
            raise ValueError(f"backup and primary are both {self.primary}")
        has_backup = self.phase in (Phase.SEEDING, Phase.PROTECTED)
        if has_backup != (self.backup is not None):
            raise ValueError(f"phase {self.phase} with backup {self.backup}")
        return self

    def role_of(self, host: HostId) -> Role:
        """Return the role of `host` in this record."""
        if host == self.primary:
            return Role.PRIMARY
        if host == self.backup:
            return Role.BACKUP
        return Role.NONE


class Percentiles(Model):
    """Of the last few hundred checkpoints."""

    p50: float = 0.0
    p99: float = 0.0
    max: float = 0.0


class SeedingProgress(Model):
    """How far a backup is filled."""

    round: int = Field(default=0, ge=0)
    sent_bytes: int = Field(default=0, ge=0)
    total_bytes: int = Field(default=0, ge=0)
    """Size of what must be there at the end; rounds may send more than this."""
    rate_bytes_per_second: float = 0.0


class WorkerReport(Model):
    """What a worker last said; volatile, never a base for a safety decision."""

    vm: VmId
    generation: Generation
    role: Role
    phase: WorkerPhase
    detail: str = ""
    """Why it is not (yet) protecting, or how it ended."""
    epoch: Epoch = 0
    acknowledged_epoch: Epoch = 0
    """Of checkpoint epochs; on a backup: what it would promote from."""
    pause_ms: Percentiles = Percentiles()
    acknowledgement_ms: Percentiles = Percentiles()
    checkpoint_bytes: Percentiles = Percentiles()
    held_bytes: int = Field(default=0, ge=0)
    """Output that waits for its acknowledgement right now."""
    checkpoints: int = Field(default=0, ge=0)
    tracker: str = ""
    plug: str = ""
    transport: str = ""
    """How a primary's checkpoints travel: `tcp` or `rdma`."""
    encoding: str = ""
    """How a primary encodes the pages of checkpoints, but for trials of another way."""
    encoding_reason: str = ""
    """Why so: the policy, or what was measured."""
    seeding: SeedingProgress | None = None
    counters: dict[str, float] = Field(default_factory=dict)
    """Monotonic counts and sums, by metric name."""

    def without_figures(self) -> tuple[object, ...]:
        """Return where the worker stands; how far seeding is counts, for somebody waits for it."""
        return (
            *(self.vm, self.generation, self.role, self.phase, self.detail),
            *(self.tracker, self.plug, self.seeding),
        )


class Protection(Model):
    """A protection as the API shows it: the record and what its workers last reported."""

    vm: VmId
    phase: Phase
    generation: Generation
    primary: HostId
    backup: HostId | None
    policy_name: PolicyName | None
    policy: Policy
    handover: bool
    acknowledged_epoch: Epoch = 0
    pause_ms: Percentiles = Percentiles()
    acknowledgement_ms: Percentiles = Percentiles()
    checkpoint_bytes: Percentiles = Percentiles()
    held_bytes: int = 0
    unprotected_seconds: float = 0.0
    """How long it has been without an acknowledged backup; 0 while protected."""
    reason: str | None = None
    """Why it is not protected; None while it is."""
    placement: PlacementNote | None = None
    seeding: SeedingProgress | None = None
    primary_report: WorkerReport | None = None
    backup_report: WorkerReport | None = None


# --- events ---------------------------------------------------------------------------------------


class Event(Model):
    """Something that happened, with its evidence. Ordered by `position`."""

    position: int = Field(ge=0)
    """Rises with every event; `after=` takes it."""
    at: float
    """UTC seconds at the controller that wrote it."""
    kind: EventKind
    vm: VmId | None = None
    host: HostId | None = None
    generation: Generation | None = None
    message: str
    evidence: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
