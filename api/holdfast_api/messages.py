"""What travels over HTTP besides the records: requests, listings, heartbeats, claims. Pure.

Agents pull: a heartbeat's answer and the assignments' long poll both carry the host's *full* set of
assignments. Absence from the set means nothing at all; a host that must let go of a VM is told so
by an assignment with role `none`.
"""

from typing import Literal

from pydantic import Field

from holdfast_api.records import (
    EncodingPolicy,
    Event,
    Host,
    HostFacts,
    Model,
    Policy,
    PreflightIssue,
    ProtectionRecord,
    StoredPolicy,
    Vm,
    VmFacts,
    WorkerReport,
)
from holdfast_api.words import (
    BEAT_SECONDS_MAX,
    ClaimReason,
    EventKind,
    Generation,
    HostId,
    Phase,
    PolicyName,
    Role,
    VmId,
)

# --- people's side --------------------------------------------------------------------------------


class ProtectRequest(Model):
    """Body of `PUT /v1/vms/{vm}/protection`: a policy's name or an inline policy, not both."""

    policy_name: PolicyName | None = None
    policy: Policy | None = None


class PolicyPatch(Model):
    """Body of `PATCH /v1/vms/{vm}/protection`: fields that may change while running."""

    interval_ms: int | None = Field(default=None, ge=5, le=10_000)
    min_interval_ms: int | None = Field(default=None, ge=1, le=10_000)
    output_triggered: bool | None = None
    reprotect: Literal["auto", "manual"] | None = None
    encoding: EncodingPolicy | None = None


class HostPatch(Model):
    """Body of `PATCH /v1/hosts/{host}`. A label with value null is removed."""

    labels: dict[str, str | None] | None = None
    maintenance: bool | None = None


class SwitchoverRequest(Model):
    """Body of `POST /v1/vms/{vm}/switchover`; `to` must be the present backup when given."""

    to: HostId | None = None


class HostList(Model):
    """`GET /v1/hosts`."""

    hosts: tuple[Host, ...]


class VmList(Model):
    """`GET /v1/vms`."""

    vms: tuple[Vm, ...]


class PolicyList(Model):
    """`GET /v1/policies`."""

    policies: tuple[StoredPolicy, ...]


class EventList(Model):
    """`GET /v1/events`, when not followed."""

    events: tuple[Event, ...]


class Preflight(Model):
    """`GET /v1/vms/{vm}/preflight`."""

    vm: VmId
    protectable: bool
    """No issue is blocking."""
    issues: tuple[PreflightIssue, ...]


# --- agents' side ---------------------------------------------------------------------------------


class Holding(Model):
    """Something a host keeps for a VM on behalf of a protection: a running VM or a standby."""

    vm: VmId
    generation: Generation
    role: Role


class Heartbeat(Model):
    """Body of `POST /v1/agent/hosts/{host}/heartbeat`."""

    facts: HostFacts
    vms: tuple[VmFacts, ...] = ()
    """Every QEMU the agent sees that runs (or ran) a guest; standbys are not VMs yet."""
    workers: tuple[WorkerReport, ...] = ()
    holdings: tuple[Holding, ...] = ()
    position: int = Field(default=0, ge=0)
    """The newest `Assignments.position` whose orders were carried out when the host began to look
    at itself. A heartbeat may arrive late, after newer ones: what it says counts as later
    than the orders up to here, and than no others."""

    def without_figures(self) -> tuple[object, ...]:
        """Return all but what moves all the time: two of these differ if something happened."""
        return (
            self.position,
            self.facts.without_figures(),
            self.vms,
            self.holdings,
            tuple(report.without_figures() for report in self.workers),
        )


class Assignment(Model):
    """One VM's order for one host."""

    vm: VmId
    generation: Generation
    role: Role
    phase: Phase
    policy: Policy
    peer: HostId | None = None
    peer_address: str | None = None
    """The backup's agent, `address:port`; for the primary only."""
    handover: bool = False


class Assignments(Model):
    """Answer to `GET /v1/agent/hosts/{host}/assignments?after=&wait_ms=`."""

    position: int = Field(ge=0)
    """Give it back as `after` to wait for something newer."""
    assignments: tuple[Assignment, ...]


class HeartbeatAnswer(Assignments):
    """Answer to a heartbeat."""

    beat_seconds: float = Field(default=0.0, ge=0, le=BEAT_SECONDS_MAX)
    """The next heartbeat is wanted after so long, or when there is something to tell. A host that
    keeps its own, shorter rhythm does no harm but work; a longer one, and it counts as silent."""


class Claim(Model):
    """Body of `POST /v1/agent/claims`: go from `generation` to the next one, alone."""

    vm: VmId
    generation: Generation
    host: HostId
    claim: str = Field(min_length=8, max_length=64)
    """The claimant's own name for this claim; the same in every retry of it."""
    reason: ClaimReason
    evidence: dict[str, str | int | float | bool | None] = Field(default_factory=dict)


class ClaimVerdict(Model):
    """The decided answer to a claim. An undecided one is an HTTP error and never this."""

    won: bool
    record: ProtectionRecord | None
    """As it stands now; None if there is no protection at all (the claim is lost then)."""
    explanation: str


class SeededReport(Model):
    """Body of `POST /v1/agent/seeded`: the first checkpoint is acknowledged, output is plugged."""

    vm: VmId
    generation: Generation
    host: HostId


class ReleasedReport(Model):
    """Body of `POST /v1/agent/released`: the primary has taken out everything of the protection."""

    vm: VmId
    generation: Generation
    host: HostId


class SeedingFailedReport(Model):
    """Body of `POST /v1/agent/seeding-failed`: this backup could not be filled (output never held).

    Only the primary reports it, and only before it plugged; afterwards it must claim.
    """

    vm: VmId
    generation: Generation
    host: HostId
    reason: str = Field(max_length=1024)


class EventReport(Model):
    """Body of `POST /v1/agent/events`: something an agent wants remembered."""

    kind: EventKind
    host: HostId
    vm: VmId | None = None
    generation: Generation | None = None
    message: str = Field(max_length=1024)
    evidence: dict[str, str | int | float | bool | None] = Field(default_factory=dict)


class RecordAnswer(Model):
    """Answer to the agents' reports that change a record."""

    record: ProtectionRecord
