"""What a worker wants from the control plane, repeated until it is answered. Over the agent's port.

A claim keeps its own name through all repetitions, so that the arbiter recognises a retry of one it
has already granted. Nothing here decides: verdicts and assignments become a `Decision` for a core.
"""

from collections.abc import Callable

from holdfast_agent.checkpoint.ports import AgentPort
from holdfast_agent.checkpoint.waiting import FOREVER_NS
from holdfast_agent.checkpoint.worker_messages import (
    ToAgent,
    WantClaim,
    WantSeeded,
    WantSeedingFailed,
)
from holdfast_agent.core.actions import Decision
from holdfast_api.messages import Assignment, Claim, ClaimVerdict, EventReport
from holdfast_api.words import ClaimReason, Epoch, EventKind, Generation, HostId, Phase, Role, VmId

REPEAT_NS = 500_000_000

Evidence = dict[str, str | int | float | bool | None]


def decision_of_verdict(verdict: ClaimVerdict, host: HostId) -> Decision | None:
    """Return what a verdict decides; None when it carries no record and so decides nothing."""
    record = verdict.record
    if record is None:
        return None
    return Decision(
        generation=record.generation,
        is_primary=record.role_of(host) is Role.PRIMARY,
        is_live=record.phase is not Phase.ENDED,
    )


def decision_of_order(assignment: Assignment) -> Decision:
    """Return what an assignment of a newer generation decides."""
    return Decision(
        generation=assignment.generation,
        is_primary=assignment.role is Role.PRIMARY,
        is_live=assignment.phase is not Phase.ENDED,
    )


class Wants:
    """The open wants of one worker."""

    def __init__(
        self,
        agent: AgentPort,
        *,
        vm: VmId,
        host: HostId,
        generation: Generation,
        new_claim_name: Callable[[], str],
    ) -> None:
        """Send through `agent`, in the name of this host and generation."""
        self._agent = agent
        self._vm = vm
        self._host = host
        self._generation = generation
        self._new_claim_name = new_claim_name
        self._claim: Claim | None = None
        self._open: dict[str, ToAgent] = {}
        self._repeat_at_ns = FOREVER_NS
        self.evidence: Evidence = {}
        """Grows until the claim is asked for; it travels with the claim and into events."""

    def claim(self, reason: ClaimReason, acknowledged: Epoch, now_ns: int) -> None:
        """Ask for the claim until `decided`."""
        assert self._claim is None, "one claim in a generation"
        self.evidence |= {"acknowledged_epoch": acknowledged, "asked_at_monotonic_ns": now_ns}
        self._claim = Claim(
            vm=self._vm,
            generation=self._generation,
            host=self._host,
            claim=self._new_claim_name(),
            reason=reason,
            evidence=self.evidence,
        )
        self._want("claim", WantClaim(claim=self._claim), now_ns)

    def seeded(self, now_ns: int) -> None:
        """Have it noted that output is held and the first checkpoint acknowledged."""
        self._want("seeded", WantSeeded(generation=self._generation), now_ns)

    def seeding_failed(self, reason: str, now_ns: int) -> None:
        """Have it noted that this backup could not be filled."""
        text = f"{reason}: {self.evidence.get('explanation', '')}"
        self._want(
            "seeding-failed", WantSeedingFailed(generation=self._generation, reason=text), now_ns
        )

    def noted(self, what: str) -> None:
        """The control plane knows; stop repeating."""
        self._open.pop(what, None)

    def is_mine(self, claim: str) -> bool:
        """Return whether a verdict answers our claim; the claim is decided then."""
        mine = self._claim is not None and self._claim.claim == claim
        if mine:
            self.noted("claim")
        return mine

    def next_due_ns(self) -> int:
        """Return when `tend` wants to be called."""
        return self._repeat_at_ns if self._open else FOREVER_NS

    def tend(self, now_ns: int) -> None:
        """Repeat what is open, now and then: the agent may have been away."""
        if self._open and now_ns >= self._repeat_at_ns:
            self._repeat_at_ns = now_ns + REPEAT_NS
            for message in self._open.values():
                self._agent.send(message)

    def event(self, kind: EventKind, message: str, evidence: Evidence) -> EventReport:
        """Return an event of this worker's VM."""
        return EventReport(
            kind=kind,
            host=self._host,
            vm=self._vm,
            generation=self._generation,
            message=message,
            evidence=evidence,
        )

    def _want(self, what: str, message: ToAgent, now_ns: int) -> None:
        self._open[what] = message
        self._repeat_at_ns = now_ns + REPEAT_NS
        self._agent.send(message)
