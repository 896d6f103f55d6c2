"""Decide claims: who may go on alone. Needs the store; reads are linearizable.

INV-4: the record moves from generation g to g+1 by one compare-and-swap, so exactly one claim of g
wins. INV-5: an answer is given only when it is decided; everything else is an error, and the
claimant asks again with the same claim, which recognises itself by its stamp.

A claim is *lost* when the record has gone on without the claimant, or never named it: the claimant
then destroys its VM (INV-6). A claim that is merely not allowed where the record stands (a backup
that is not filled yet, a reason that only the other side can give, a generation that does not
exist yet) is refused as an error: nothing was decided, and nobody destroys anything.
"""

import hashlib
import logging

from holdfast_api import transitions
from holdfast_api.errors import Refused, Unavailable
from holdfast_api.messages import Claim, ClaimVerdict
from holdfast_api.records import ClaimStamp, ProtectionRecord
from holdfast_api.transitions import Outcome, Refusal
from holdfast_api.words import ClaimReason, EventKind, Role
from holdfast_controller.adapters.store import Changed, EventDraft
from holdfast_controller.control import Control

logger = logging.getLogger(__name__)


class _Lost(Exception):  # noqa: N818 - reads as a sentence where it is raised
    """The claim is decided: lost, to `record`."""

    def __init__(self, record: ProtectionRecord | None, explanation: str) -> None:
        super().__init__(explanation)
        self.record = record
        self.explanation = explanation


async def decide_claim(control: Control, claim: Claim) -> ClaimVerdict:
    """Decide `claim`. Raises Unavailable while it is undecided, Refused if nobody may make it."""
    try:
        changed = await _try_to_win(control, claim)
    except _Lost as lost:
        control.metrics.claims.labels("lost").inc()
        logger.info("claim %s of %s for %s is lost", claim.claim, claim.host, claim.vm)
        await _tell_of_loss(control, claim, lost)
        return ClaimVerdict(won=False, record=lost.record, explanation=lost.explanation)
    except Refused:
        control.metrics.claims.labels("refused").inc()
        raise
    if changed.written:
        control.metrics.claims.labels("won").inc()
        logger.info("%s won %s at generation %d", claim.host, claim.vm, changed.record.generation)
    return ClaimVerdict(won=True, record=changed.record, explanation=_explain_win(claim, changed))


async def _try_to_win(control: Control, claim: Claim) -> Changed:
    stamp = ClaimStamp(claim=claim.claim, host=claim.host, reason=claim.reason)
    now = control.store.now_seconds()

    def claimed(record: ProtectionRecord) -> Outcome:
        return transitions.claim(
            record,
            host=claim.host,
            generation=claim.generation,
            stamp=stamp,
            reason=claim.reason,
            now_seconds=now,
        )

    def decide(record: ProtectionRecord | None) -> Outcome:
        if record is None:
            raise _Lost(None, f"there is no protection of {claim.vm}")
        outcome = claimed(record)
        if isinstance(outcome, Refusal) and _is_decided(record, claim):
            raise _Lost(record, outcome.explanation)
        return outcome

    def describe(before: ProtectionRecord | None, after: ProtectionRecord) -> EventDraft:
        assert before is not None
        return _event_of_win(claim, before, after)

    # A failover waits for this. To be won, the record must be the one that was decided on, so it
    # may as well be the one we know; everything else is decided on what the store says.
    guess = control.world.known_record(claim.vm)
    if guess is not None and (isinstance(won := claimed(guess[0]), Refusal) or won == guess[0]):
        guess = None
    return await control.store.change(claim.vm, decide, describe, guess=guess)


def _is_decided(record: ProtectionRecord, claim: Claim) -> bool:
    """Whether a refused claim has lost for good, rather than being out of place."""
    if record.generation > claim.generation:
        return True
    return record.generation == claim.generation and record.role_of(claim.host) is Role.NONE


def _event_of_win(claim: Claim, before: ProtectionRecord, after: ProtectionRecord) -> EventDraft:
    was_backup = before.role_of(claim.host) is Role.BACKUP
    if claim.reason is ClaimReason.GUEST_ENDED:
        kind, message = EventKind.GUEST_ENDED, f"the guest of {claim.vm} ended on {claim.host}"
    elif was_backup and claim.reason is ClaimReason.HANDOVER:
        kind = EventKind.CLAIM_WON
        message = f"{claim.vm} was handed over from {before.primary} to {claim.host}"
    elif was_backup:
        kind = EventKind.FAILED_OVER
        message = f"{claim.vm} failed over from {before.primary} to {claim.host}: {claim.reason}"
    else:
        kind = EventKind.CLAIM_WON
        message = f"{claim.host} goes on alone with {claim.vm}: {claim.reason}"
    own = {"reason": claim.reason, "from_primary": before.primary, "from_backup": before.backup}
    return EventDraft(
        kind=kind,
        message=message,
        vm=claim.vm,
        host=claim.host,
        generation=after.generation,
        evidence={**claim.evidence, **own},
    )


def _explain_win(claim: Claim, changed: Changed) -> str:
    won = claim.generation + 1
    if changed.written:
        return f"{claim.host} goes on alone at generation {won}"
    return f"{claim.host} won generation {won} already; it is {changed.record.generation} now"


async def _tell_of_loss(control: Control, claim: Claim, lost: _Lost) -> None:
    """Write one event however often the claim is retried; the verdict does not wait on it."""
    name = hashlib.sha256(f"{claim.vm} {claim.claim}".encode()).hexdigest()[:32]
    draft = EventDraft(
        kind=EventKind.CLAIM_LOST,
        message=f"{claim.host} lost its claim for {claim.vm}: {lost.explanation}",
        vm=claim.vm,
        host=claim.host,
        generation=claim.generation,
        evidence={**claim.evidence, "reason": claim.reason},
    )
    try:
        await control.store.add_event(draft, once=f"lost-{name}")
    except Unavailable as error:
        logger.warning("the loss of claim %s was not written down: %s", claim.claim, error)
