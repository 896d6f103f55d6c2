"""What an agent and its workers say to each other, over a Unix SEQPACKET socket. Pure.

One message is one datagram of JSON. Everything a worker wants from its agent is a *state* that it
repeats until it is answered (`Want...`), so that a lost message, or an agent that died and came
back, costs time and never correctness.
"""

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from holdfast_api.messages import Assignment, Claim, ClaimVerdict, EventReport
from holdfast_api.records import Model, VmFacts, WorkerReport
from holdfast_api.words import Generation, HostId, Role, VmId

MESSAGE_LIMIT_BYTES = 2 << 20

# --- to the worker --------------------------------------------------------------------------------


class Ordered(Model):
    """The present assignment of this VM on this host; repeated at will."""

    type: Literal["ordered"] = "ordered"
    assignment: Assignment


class Decided(Model):
    """The arbiter's decided verdict on a claim."""

    type: Literal["decided"] = "decided"
    claim: str
    verdict: ClaimVerdict


class PeerConnected(Model):
    """Somebody connected; the datagram carries the socket, of which the preface was read.

    What the preface said is believed by nobody until the HELLO says it too.
    """

    type: Literal["peer-connected"] = "peer-connected"
    vm: VmId
    generation: Generation
    tls: bool
    """A TLS handshake comes next, else the HELLO."""
    address: str
    """Where it came from, for the log."""


class Noted(Model):
    """The control plane has taken note of what the worker wanted it to know."""

    type: Literal["noted"] = "noted"
    what: Literal["seeded", "seeding-failed"]


ToWorker = Annotated[Ordered | Decided | PeerConnected | Noted, Field(discriminator="type")]

# --- to the agent ---------------------------------------------------------------------------------


class Introduced(Model):
    """First message on every connection: who this worker is and what it holds."""

    type: Literal["introduced"] = "introduced"
    vm: VmId
    host: HostId
    generation: Generation
    role: Role
    pid: int
    qemu_pid: int = 0
    """0 until there is one."""
    qemu_start_ticks: int = 0
    """Start time of that process, in clock ticks since boot: a reused pid is not taken for it."""
    facts: VmFacts | None = None
    """Of a primary's VM, whose monitor only the worker can ask now."""
    qmp_socket: str = ""


class Reported(Model):
    """The worker's present report."""

    type: Literal["reported"] = "reported"
    report: WorkerReport


class WantClaim(Model):
    """Ask the arbiter; repeated until decided."""

    type: Literal["want-claim"] = "want-claim"
    claim: Claim


class WantSeeded(Model):
    """Output is held and the first checkpoint acknowledged; repeated until noted."""

    type: Literal["want-seeded"] = "want-seeded"
    generation: Generation


class WantSeedingFailed(Model):
    """This backup could not be filled; repeated until noted."""

    type: Literal["want-seeding-failed"] = "want-seeding-failed"
    generation: Generation
    reason: str


class Happened(Model):
    """Something to be remembered as an event."""

    type: Literal["happened"] = "happened"
    event: EventReport


class PeerTurnedAway(Model):
    """Somebody who connected was not the primary that is expected, and why."""

    type: Literal["peer-turned-away"] = "peer-turned-away"
    reason: str


class Finished(Model):
    """The worker's last word; it exits after this."""

    type: Literal["finished"] = "finished"
    outcome: str
    vm_lives: bool
    """The VM goes on running on this host (promoted, alone or released)."""


ToAgent = Annotated[
    Introduced
    | Reported
    | WantClaim
    | WantSeeded
    | WantSeedingFailed
    | Happened
    | PeerTurnedAway
    | Finished,
    Field(discriminator="type"),
]

TO_WORKER: TypeAdapter[ToWorker] = TypeAdapter(ToWorker)
TO_AGENT: TypeAdapter[ToAgent] = TypeAdapter(ToAgent)
