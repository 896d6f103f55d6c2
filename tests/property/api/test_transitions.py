"""Random lives of one protection: whatever is asked in whatever order, the safety rules hold."""

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from holdfast_api import transitions
from holdfast_api.records import ClaimStamp, PlacementNote, Policy, ProtectionRecord
from holdfast_api.transitions import LIVE, Outcome, Refusal
from holdfast_api.words import ClaimReason, Phase, Role

HOSTS = ("h1", "h2", "h3")
hosts = st.sampled_from(HOSTS)
claim_names = st.sampled_from([f"claim-000{n}" for n in range(4)])
offsets = st.sampled_from([-2, -1, 0, 0, 0, 0, 1])
LEGAL = {
    None: {Phase.UNPROTECTED},
    Phase.UNPROTECTED: {Phase.UNPROTECTED, Phase.SEEDING, Phase.ENDED, Phase.RELEASING},
    Phase.SEEDING: {
        Phase.SEEDING,
        Phase.PROTECTED,
        Phase.UNPROTECTED,
        Phase.ENDED,
        Phase.RELEASING,
    },
    Phase.PROTECTED: {Phase.PROTECTED, Phase.UNPROTECTED, Phase.ENDED, Phase.RELEASING},
    Phase.RELEASING: {Phase.RELEASING, Phase.RETIRED},
    Phase.ENDED: {Phase.ENDED, Phase.RETIRED, Phase.UNPROTECTED},
    Phase.RETIRED: {Phase.RETIRED, Phase.UNPROTECTED},
}


@dataclass(frozen=True)
class Won:
    """A claim that won, as the store's history shows it."""

    host: str
    generation: int
    """The one that it was made in."""
    claim: str
    reason: ClaimReason


class Life(RuleBasedStateMachine):
    """The record as the store holds it, and everything that was ever won."""

    def __init__(self) -> None:
        super().__init__()
        self.record: ProtectionRecord | None = None
        self.won: dict[int, Won] = {}

    def take(self, outcome: Outcome) -> ProtectionRecord | None:
        """Do what the store does with an outcome; check what holds for every step."""
        before = self.record
        if isinstance(outcome, Refusal):
            assert outcome.explanation
            assert self.record is before
            return None
        # As the store would: through JSON and all its validation.
        after = ProtectionRecord.model_validate_json(outcome.model_dump_json())
        assert after == outcome
        assert after.phase in LEGAL[None if before is None else before.phase]
        if before is not None:
            assert after.generation in (before.generation, before.generation + 1)
            if (after.primary, after.backup) != (before.primary, before.backup):
                assert after.generation == before.generation + 1, "a role changed without a fence"
        self.record = after
        return after

    @initialize(manual=st.booleans())
    def begin_first(self, manual: bool) -> None:
        self.begin("h1", manual)

    @rule(host=hosts, manual=st.booleans())
    def begin(self, host: str, manual: bool) -> None:
        before = self.record
        after = self.take(
            transitions.begin(
                vm="vm",
                primary=host,
                policy=Policy(reprotect="manual" if manual else "auto"),
                policy_name=None,
                previous=before,
                now_seconds=1.0,
            )
        )
        running = before is not None and before.phase in LIVE | {Phase.RELEASING}
        assert (after is None) == running
        assert after is None or after.backup_wanted

    @rule(host=hosts)
    def assign(self, host: str) -> None:
        before = self.record
        assert before is not None
        after = self.take(transitions.assign_backup(before, PlacementNote(chosen=host)))
        allowed = before.phase is Phase.UNPROTECTED and host != before.primary
        assert (after is not None) == allowed

    @rule(host=hosts, offset=offsets)
    def seeded(self, host: str, offset: int) -> None:
        before = self.record
        assert before is not None
        outcome = transitions.become_protected(before, host, before.generation + offset)
        after = self.take(outcome)
        if after is not None:
            assert (offset, host) == (0, before.primary)
            assert before.phase in (Phase.SEEDING, Phase.PROTECTED)

    @rule(host=hosts, offset=offsets, why=st.sampled_from([None, "disk full"]))
    def seeding_failed(self, host: str, offset: int, why: str | None) -> None:
        before = self.record
        assert before is not None
        after = self.take(
            transitions.drop_seeding_backup(before, host, before.generation + offset, setback=why)
        )
        if after is not None:
            assert (offset, host, before.phase) == (0, before.primary, Phase.SEEDING)
            assert after.backup_wanted == (before.policy.reprotect == "auto")
            assert (len(after.setbacks) > 0) or why is None
            assert why is None or after.setbacks[-1].host == before.backup

    @rule(host=hosts, offset=offsets, name=claim_names, reason=st.sampled_from(list(ClaimReason)))
    def claim(self, host: str, offset: int, name: str, reason: ClaimReason) -> None:
        before = self.record
        assert before is not None
        self.decide(Won(host, max(0, before.generation + offset), name, reason))

    @rule(back=st.integers(0, 3))
    def retry_an_old_claim(self, back: int) -> None:
        made = sorted(self.won)
        if back < len(made):
            self.decide(self.won[made[-1 - back]])

    def decide(self, claim: Won) -> None:
        """Put one claim before the record; hold the outcome against the history."""
        before = self.record
        assert before is not None
        after = self.take(
            transitions.claim(
                before,
                host=claim.host,
                generation=claim.generation,
                stamp=ClaimStamp(claim=claim.claim, host=claim.host, reason=claim.reason),
                reason=claim.reason,
                now_seconds=2.0,
            )
        )
        if after is None:
            latest = self.won[max(self.won)] if self.won else None
            stands = latest == claim and before.primary == claim.host
            assert not stands, "the winner of the last claim was told that it had lost"
        elif after == before:
            assert self.won[claim.generation] == claim, "a stranger was told that it had won"
            assert after.primary == claim.host
        else:
            assert claim.generation not in self.won, "two claims of one generation won"
            assert claim.generation == before.generation
            assert before.phase in LIVE
            assert claim.host in (before.primary, before.backup)
            if claim.host == before.backup:
                assert before.phase is Phase.PROTECTED
                assert claim.reason is not ClaimReason.GUEST_ENDED
            assert after.role_of(claim.host) is Role.PRIMARY
            assert after.backup is None
            self.won[claim.generation] = claim

    @rule(to=st.sampled_from([None, *HOSTS]))
    def switch_over(self, to: str | None) -> None:
        before = self.record
        assert before is not None
        after = self.take(transitions.request_handover(before, to))
        allowed = before.phase is Phase.PROTECTED and to in (None, before.backup)
        assert (after is not None) == allowed

    @rule(manual=st.booleans())
    def change_policy(self, manual: bool) -> None:
        assert self.record is not None
        policy = Policy(reprotect="manual" if manual else "auto")
        after = self.take(transitions.change_policy(self.record, policy, "p"))
        assert after is None or after.backup_wanted or manual

    @rule()
    def ask_again(self) -> None:
        assert self.record is not None
        after = self.take(transitions.want_backup(self.record))
        assert after is None or after.backup_wanted

    @rule()
    def note(self) -> None:
        before = self.record
        assert before is not None
        after = self.take(transitions.note_placement(before, PlacementNote(chosen=None)))
        assert (after is not None) == (before.phase is Phase.UNPROTECTED)

    @rule()
    def release(self) -> None:
        assert self.record is not None
        after = self.take(transitions.release(self.record))
        assert after is not None
        assert after.phase in (Phase.RELEASING, Phase.RETIRED)

    @rule(host=hosts, offset=offsets)
    def retire(self, host: str, offset: int) -> None:
        before = self.record
        assert before is not None
        after = self.take(transitions.retire(before, host, before.generation + offset))
        if after is not None:
            assert (offset, host) == (0, before.primary)
            assert before.phase in (Phase.RELEASING, Phase.RETIRED)

    @rule(offset=offsets)
    def lose(self, offset: int) -> None:
        before = self.record
        assert before is not None
        after = self.take(transitions.lose(before, before.generation + offset))
        allowed = offset == 0 and before.phase in transitions.LIVE
        assert (after is not None) == allowed

    @invariant()
    def protected_is_not_counted_as_unprotected(self) -> None:
        if self.record is not None and self.record.phase is Phase.PROTECTED:
            assert self.record.unprotected_since is None
            assert self.record.setbacks == ()
        if self.record is not None and self.record.phase in (Phase.UNPROTECTED, Phase.SEEDING):
            assert self.record.unprotected_since is not None


Life.TestCase.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
TestLife = Life.TestCase


def record(phase: Phase, **changes: object) -> ProtectionRecord:
    backup = "h2" if phase in (Phase.SEEDING, Phase.PROTECTED) else None
    fields = {"vm": "vm", "generation": 7, "phase": phase, "primary": "h1", "backup": backup}
    return ProtectionRecord.model_validate(fields | {"policy": Policy()} | changes)


def claim_of(before: ProtectionRecord, host: str, reason: ClaimReason) -> Outcome:
    stamp = ClaimStamp(claim="claim-0001", host=host, reason=reason)
    return transitions.claim(
        before, host=host, generation=7, stamp=stamp, reason=reason, now_seconds=5.0
    )


@pytest.mark.parametrize("reason", [ClaimReason.HANDOVER, ClaimReason.VM_FAILED])
def test_only_a_backup_claims_for_reasons_that_only_it_can_have(reason: ClaimReason) -> None:
    refused = claim_of(record(Phase.PROTECTED), "h1", reason)
    assert isinstance(refused, Refusal)
    assert refused.code == "not-your-role"
    assert isinstance(claim_of(record(Phase.PROTECTED), "h2", reason), ProtectionRecord)


def test_a_backup_can_not_know_that_the_guest_ended() -> None:
    refused = claim_of(record(Phase.PROTECTED), "h2", ClaimReason.GUEST_ENDED)
    assert isinstance(refused, Refusal)
    assert refused.code == "not-your-role"


def test_a_stamp_names_the_generation_that_it_won() -> None:
    after = claim_of(record(Phase.PROTECTED), "h2", ClaimReason.PEER_SILENT)
    assert isinstance(after, ProtectionRecord)
    assert after.claimed is not None
    assert after.claimed.generation == after.generation == 8


def test_a_guest_that_ended_ends_the_protection() -> None:
    after = claim_of(record(Phase.PROTECTED), "h1", ClaimReason.GUEST_ENDED)
    assert isinstance(after, ProtectionRecord)
    assert (after.phase, after.generation, after.primary) == (Phase.ENDED, 8, "h1")


def test_a_claim_keeps_the_time_since_when_the_vm_is_unprotected() -> None:
    before = record(Phase.UNPROTECTED, unprotected_since=3.0)
    after = claim_of(before, "h1", ClaimReason.PEER_SILENT)
    assert isinstance(after, ProtectionRecord)
    assert after.unprotected_since == 3.0
    fresh = claim_of(record(Phase.PROTECTED), "h2", ClaimReason.PEER_SILENT)
    assert isinstance(fresh, ProtectionRecord)
    assert fresh.unprotected_since == 5.0


@pytest.mark.parametrize(
    ("phase", "host", "reason", "wanted"),
    [
        (Phase.PROTECTED, "h1", ClaimReason.STREAM_BROKEN, False),
        (Phase.PROTECTED, "h2", ClaimReason.PEER_SILENT, False),
        (Phase.PROTECTED, "h2", ClaimReason.HANDOVER, True),
        (Phase.SEEDING, "h1", ClaimReason.STREAM_BROKEN, False),
        (Phase.UNPROTECTED, "h1", ClaimReason.PEER_SILENT, True),
    ],
)
def test_a_manual_policy_wants_no_backup_after_one_was_lost(
    phase: Phase, host: str, reason: ClaimReason, wanted: bool
) -> None:
    after = claim_of(record(phase, policy=Policy(reprotect="manual")), host, reason)
    assert isinstance(after, ProtectionRecord)
    assert after.backup_wanted is wanted
    automatic = claim_of(record(phase), host, reason)
    assert isinstance(automatic, ProtectionRecord)
    assert automatic.backup_wanted is True


def test_setbacks_count_up_per_host_and_are_bounded() -> None:
    now = record(Phase.SEEDING)
    for number in range(40):
        dropped = transitions.drop_seeding_backup(now, "h1", now.generation, setback="no")
        assert isinstance(dropped, ProtectionRecord)
        chosen = PlacementNote(chosen=f"x{number}" if number % 2 else "h2")
        again = transitions.assign_backup(dropped, chosen)
        assert isinstance(again, ProtectionRecord)
        now = again
    assert len(now.setbacks) <= transitions.SETBACKS_KEPT
    assert {s.host: s.count for s in now.setbacks}["h2"] == 21
    protected = transitions.become_protected(now, "h1", now.generation)
    assert isinstance(protected, ProtectionRecord)
    assert protected.setbacks == ()


def test_a_backup_lost_while_it_was_filled_is_a_setback_and_a_lost_protected_one_is_none() -> None:
    seeding = claim_of(record(Phase.SEEDING), "h1", ClaimReason.STREAM_BROKEN)
    assert isinstance(seeding, ProtectionRecord)
    assert [(s.host, s.count) for s in seeding.setbacks] == [("h2", 1)]
    protected = claim_of(record(Phase.PROTECTED), "h1", ClaimReason.STREAM_BROKEN)
    assert isinstance(protected, ProtectionRecord)
    assert protected.setbacks == ()


def test_a_new_protection_inherits_the_stamp_of_its_own_primary_only() -> None:
    stamp = ClaimStamp(claim="claim-0001", host="h1", reason="peer-silent", generation=7)
    retired = record(Phase.RETIRED, claimed=stamp)
    for primary, inherited in (("h1", stamp), ("h2", None)):
        begun = transitions.begin(
            vm="vm",
            primary=primary,
            policy=Policy(),
            policy_name=None,
            previous=retired,
            now_seconds=1.0,
        )
        assert isinstance(begun, ProtectionRecord)
        assert (begun.claimed, begun.generation) == (inherited, 8)
