"""The control plane of a scenario: one record, the table of its transitions, and agents that ask.

The arbiter decides as the controller does: a claim is won by `transitions.claim`, lost when the
record has gone on without the claimant, and undecided otherwise. The agent repeats until it is
decided, tells its worker, and passes orders on, as the supervisor and the client do.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from tests.scenarios.simulation import MS, World

from holdfast_agent.checkpoint.worker_messages import (
    Decided,
    Happened,
    Noted,
    Ordered,
    ToAgent,
    ToWorker,
    WantClaim,
    WantSeeded,
    WantSeedingFailed,
)
from holdfast_api import transitions
from holdfast_api.messages import Assignment, Claim, ClaimVerdict
from holdfast_api.records import ClaimStamp, PlacementNote, Policy, ProtectionRecord
from holdfast_api.transitions import Outcome
from holdfast_api.words import Role

VM = "vm"
PRIMARY = "primary"
BACKUP = "backup"
STORE_NS = 1 * MS
RETRY_NS = 100 * MS
ORDER_NS = 3 * MS


def record_of(outcome: Outcome) -> ProtectionRecord:
    assert isinstance(outcome, ProtectionRecord), outcome
    return outcome


class Arbiter:
    """The record, and who is told when it changes."""

    def __init__(self, world: World, policy: Policy) -> None:
        self._world = world
        self.is_up = True
        self.listeners: list[Callable[[], None]] = []
        begun = transitions.begin(
            vm=VM,
            primary=PRIMARY,
            policy=policy,
            policy_name=None,
            previous=None,
            now_seconds=0.0,
        )
        note = PlacementNote(chosen=BACKUP)
        self.record = record_of(transitions.assign_backup(record_of(begun), note))

    def change(self, outcome: Outcome) -> Outcome:
        """Store what a transition gave; a refusal changes nothing."""
        if isinstance(outcome, ProtectionRecord) and outcome != self.record:
            assert outcome.generation >= self.record.generation
            self.record = outcome
            text = f"generation {outcome.generation}: {outcome.phase}, primary {outcome.primary}"
            if outcome.backup:
                text += f", backup {outcome.backup}"
            if outcome.handover:
                text += ", handover wanted"
            self._world.log("store", text)
            for listener in self.listeners:
                listener()
        return outcome

    def decide(self, claim: Claim) -> ClaimVerdict | None:
        """Return the verdict; None while nothing is decided."""
        record = self.record
        outcome = self.change(
            transitions.claim(
                record,
                host=claim.host,
                generation=claim.generation,
                stamp=ClaimStamp(claim=claim.claim, host=claim.host, reason=claim.reason),
                reason=claim.reason,
                now_seconds=0.0,
            )
        )
        if isinstance(outcome, ProtectionRecord):
            return ClaimVerdict(won=True, record=outcome, explanation="won")
        if record.generation > claim.generation or record.role_of(claim.host) is Role.NONE:
            return ClaimVerdict(won=False, record=record, explanation=outcome.explanation)
        return None

    def assignment_of(self, host: str) -> Assignment:
        record = self.record
        role = record.role_of(host)
        peers = {Role.PRIMARY: record.backup, Role.BACKUP: record.primary, Role.NONE: None}
        return Assignment(
            vm=VM,
            generation=record.generation,
            role=role,
            phase=record.phase,
            policy=record.policy,
            peer=peers[role],
            handover=record.handover,
        )


@dataclass
class Agent:
    """Port `AgentPort` for one worker after the other of one host."""

    world: World
    arbiter: Arbiter
    host: str
    has_power: bool = True
    reaches_store: bool = True
    answers_lost: int = 0
    """So many answers of the store do not arrive: what was asked is done all the same."""
    verdict_delay_ns: int = STORE_NS
    has_asked: bool = False
    on_order: Callable[[Assignment], None] = lambda _: None
    is_drained: bool = True
    _inbox: list[ToWorker] = field(default_factory=list)
    _asked: dict[str, ClaimVerdict | None] = field(default_factory=dict)
    _under_way: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._descriptor = self.world.descriptor(lambda: bool(self._inbox))
        self.arbiter.listeners.append(
            lambda: self.world.after(ORDER_NS, self.pass_order_on)  # the long poll
        )

    # --- port AgentPort ---------------------------------------------------------------------------

    def filenos(self) -> list[int]:
        return [self._descriptor]

    def receive(self) -> list[tuple[ToWorker, int | None]]:
        messages, self._inbox = self._inbox, []
        return [(message, None) for message in messages]

    def flush(self) -> None:
        """Nothing is queued."""

    def send(self, message: ToAgent) -> None:
        match message:
            case WantClaim(claim=claim):
                self._claim(claim)
            case WantSeeded(generation=generation):
                self._report(
                    "seeded", lambda r: transitions.become_protected(r, self.host, generation)
                )
            case WantSeedingFailed(generation=generation, reason=reason):
                self._report(
                    "seeding-failed",
                    lambda r: transitions.drop_seeding_backup(
                        r, self.host, generation, setback=reason
                    ),
                )
            case Happened(event=event):
                self.world.log(self.host, f"tells: {event.kind}")
            case _:
                """Reports are for people."""

    # --- what it asks of the store ----------------------------------------------------------------

    def _claim(self, claim: Claim) -> None:
        verdict = self._asked.get(claim.claim)
        if verdict is not None:
            self._tell(Decided(claim=claim.claim, verdict=verdict))
        elif claim.claim not in self._asked:
            self._asked[claim.claim] = None
            self.has_asked = True
            self.world.log(self.host, f"claims: {claim.reason}")
            self.world.after(STORE_NS, lambda: self._try_claim(claim))

    def _try_claim(self, claim: Claim) -> None:
        if not self.has_power:
            return
        verdict = self.arbiter.decide(claim) if self._can_ask() else None
        if verdict is None or self._loses_answer():
            self.world.after(RETRY_NS, lambda: self._try_claim(claim))
            return
        self._asked[claim.claim] = verdict
        self.world.after(self.verdict_delay_ns, lambda: self._decided(claim, verdict))

    def _decided(self, claim: Claim, verdict: ClaimVerdict) -> None:
        if self.has_power:
            self.world.log(self.host, f"the claim is {'won' if verdict.won else 'lost'}")
            self._tell(Decided(claim=claim.claim, verdict=verdict))

    def _report(self, what: str, change: Callable[[ProtectionRecord], Outcome]) -> None:
        if what not in self._under_way:
            self._under_way.add(what)
            self.world.log(self.host, f"reports {what}")
            self.world.after(STORE_NS, lambda: self._try_report(what, change))

    def _try_report(self, what: str, change: Callable[[ProtectionRecord], Outcome]) -> None:
        if not self.has_power:
            return
        if self._can_ask():
            self.arbiter.change(change(self.arbiter.record))
            if not self._loses_answer():
                self._under_way.discard(what)
                self._tell(Noted.model_validate({"what": what}))
                return
        self.world.after(RETRY_NS, lambda: self._try_report(what, change))

    def _can_ask(self) -> bool:
        return self.arbiter.is_up and self.reaches_store

    def _loses_answer(self) -> bool:
        if self.answers_lost:
            self.answers_lost -= 1
            self.world.log(self.host, "does not get the store's answer")
            return True
        return False

    # --- what it tells its worker -----------------------------------------------------------------

    def pass_order_on(self) -> None:
        if not self.has_power:
            return
        if not self._can_ask():
            self.world.after(RETRY_NS, self.pass_order_on)
            return
        assignment = self.arbiter.assignment_of(self.host)
        self._tell(Ordered(assignment=assignment))
        self.on_order(assignment)

    def _tell(self, message: ToWorker) -> None:
        self._inbox.append(message)
