"""Both cores of a protection, the arbiter's table and a bad network, driven at random.

The world remembers which output left, and from where. What must hold at every moment is in the
invariants at the end; each rule above them is one thing that can happen.
"""

from collections import deque

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from holdfast_agent.core import actions as act
from holdfast_agent.core.backup import BackupMachine, BackupState
from holdfast_agent.core.epoch import PrimaryMachine, PrimaryState
from holdfast_api import transitions
from holdfast_api.records import ClaimStamp, PlacementNote, Policy, ProtectionRecord
from holdfast_api.words import ClaimReason, Phase, Role

A, B = "a", "b"


class Protection(RuleBasedStateMachine):
    """One generation of one VM on hosts a (primary) and b (backup)."""

    record: ProtectionRecord

    @initialize()
    def begin(self) -> None:
        record = transitions.begin(
            vm="v", primary=A, policy=Policy(), policy_name=None, previous=None, now_seconds=0
        )
        assert isinstance(record, ProtectionRecord)
        self.change(transitions.assign_backup(record, PlacementNote(chosen=B)))
        self.generation = self.record.generation
        self.primary = PrimaryMachine(self.generation)
        self.backup = BackupMachine(self.generation)
        self.to_backup: deque[tuple[str, int, bool]] = deque()
        self.to_primary: deque[int] = deque()
        self.asked: dict[str, ClaimReason] = {}
        self.verdicts: dict[str, list[ProtectionRecord]] = {A: [], B: []}
        self.is_holding = False
        self.left: list[int] = []
        self.everything_left = False
        self.primary_lives = True
        self.guest_stands = False
        self.seeded_wanted = False
        self.promoted_from: int | None = None
        self.standby_lives = True
        self.was_suspected = False

    def change(self, outcome: transitions.Outcome) -> None:
        if isinstance(outcome, ProtectionRecord):
            if hasattr(self, "record"):
                assert outcome.generation >= self.record.generation
            self.record = outcome

    # --- performing -------------------------------------------------------------------------------

    def perform_primary(self, actions: list[act.Action]) -> None:  # noqa: C901 - a flat table
        for action in actions:
            match action:
                case act.HoldOutput():
                    self.is_holding = True
                case act.Capture(epoch, final):
                    assert self.is_holding, "captured before output was held (INV-7)"
                    assert not self.guest_stands
                    self.guest_stands = final
                    self.to_backup.append(("checkpoint", epoch, final))
                case act.ReleaseOutput(epoch):
                    assert self.primary_lives
                    self.left.append(epoch)
                case act.ReleaseAll():
                    assert self.primary_lives
                    assert self.record.primary == A, "released all without being primary (INV-4)"
                    assert self.record.generation > self.generation
                    self.everything_left = True
                    self.is_holding = False
                case act.StopGuest():
                    self.guest_stands = True
                case act.ResumeGuest():
                    assert self.record.primary == A
                    self.guest_stands = False
                case act.ReportSeeded():
                    self.seeded_wanted = True
                case act.AskClaim(reason):
                    self.asked[A] = reason
                case act.Farewell(code):
                    self.to_backup.append((code, 0, False))
                case act.DestroyVm() | act.QuitVm():
                    self.primary_lives = False
                case _:
                    pass

    def perform_backup(self, actions: list[act.Action]) -> None:
        for action in actions:
            match action:
                case act.Acknowledge(epoch):
                    assert not self.was_suspected, "acknowledged after suspicion (INV-3)"
                    self.to_primary.append(epoch)
                case act.Apply(epoch):
                    self.perform_backup(self.backup.applied_checkpoint(epoch))
                case act.AskClaim(reason):
                    self.asked[B] = reason
                case act.Promote(epoch):
                    assert self.standby_lives
                    assert self.record.primary == B, "promoted without the claim (INV-4)"
                    self.promoted_from = epoch
                    self.perform_backup(self.backup.promoted())
                case act.DestroyVm():
                    self.standby_lives = False
                case _:
                    pass

    # --- the primary's side -----------------------------------------------------------------------

    @rule()
    def seeding_is_small_enough(self) -> None:
        self.perform_primary(self.primary.seeding_small_enough())

    @rule()
    def a_checkpoint_is_due(self) -> None:
        if not self.guest_stands:
            self.perform_primary(self.primary.checkpoint_due())

    @rule()
    def an_acknowledgement_arrives(self) -> None:
        if self.to_primary:
            self.perform_primary(self.primary.acknowledgement(self.to_primary.popleft()))

    @rule(epoch=st.integers(0, 5))
    def a_wrong_acknowledgement_arrives(self, epoch: int) -> None:
        if epoch != self.primary.acknowledged + 1:
            before = list(self.left)
            self.perform_primary(self.primary.acknowledgement(epoch))
            assert self.left == before

    @rule(reason=st.sampled_from([ClaimReason.PEER_SILENT, ClaimReason.STREAM_BROKEN]))
    def the_primary_loses_its_peer(self, reason: ClaimReason) -> None:
        self.to_primary.clear()
        self.perform_primary(self.primary.peer_lost(reason))

    @rule()
    def the_guest_shuts_down(self) -> None:
        if self.primary_lives and not self.guest_stands:
            self.perform_primary(self.primary.guest_shut_down())

    @rule()
    def the_vm_crashes(self) -> None:
        if self.primary_lives:
            self.primary_lives = False
            self.perform_primary(self.primary.vm_gone())

    @rule()
    def a_handover_is_ordered(self) -> None:
        self.change(transitions.request_handover(self.record, None))
        if self.record.handover and self.record.generation == self.generation:
            self.perform_primary(self.primary.handover_ordered())

    @rule()
    def a_handover_times_out(self) -> None:
        self.perform_primary(self.primary.handover_timed_out())

    @precondition(lambda self: self.seeded_wanted)
    @rule()
    def the_control_plane_notes_that_it_is_seeded(self) -> None:
        self.change(transitions.become_protected(self.record, A, self.generation))

    # --- the backup's side ------------------------------------------------------------------------

    @rule()
    def a_message_reaches_the_backup(self) -> None:
        if self.to_backup:
            kind, epoch, final = self.to_backup.popleft()
            if kind == "checkpoint":
                self.perform_backup(self.backup.checkpoint_whole(epoch, final=final))
            else:
                self.perform_backup(self.backup.farewell(kind))

    @rule(reason=st.sampled_from([ClaimReason.PEER_SILENT, ClaimReason.STREAM_BROKEN]))
    def the_backup_suspects(self, reason: ClaimReason) -> None:
        self.was_suspected = True
        self.to_backup.clear()
        self.perform_backup(self.backup.suspect(reason))

    @rule()
    def the_standby_crashes(self) -> None:
        if self.standby_lives and self.promoted_from is None:
            self.perform_backup(self.backup.standby_failed("it crashed"))

    # --- the arbiter ------------------------------------------------------------------------------

    @rule(host=st.sampled_from([A, B]))
    def the_arbiter_hears_a_claim(self, host: str) -> None:
        if host in self.asked:
            stamp = ClaimStamp(claim=f"claim-{host}", host=host, reason=self.asked[host])
            self.change(
                transitions.claim(
                    self.record,
                    host=host,
                    generation=self.generation,
                    stamp=stamp,
                    reason=self.asked[host],
                    now_seconds=0,
                )
            )
            self.verdicts[host].append(self.record)

    @rule(host=st.sampled_from([A, B]))
    def a_verdict_arrives(self, host: str) -> None:
        if self.verdicts[host]:
            self.decide(host, self.verdicts[host].pop(0))

    @rule(host=st.sampled_from([A, B]))
    def an_order_arrives(self, host: str) -> None:
        if self.record.generation > self.generation:
            self.decide(host, self.record)

    def decide(self, host: str, record: ProtectionRecord) -> None:
        decision = act.Decision(
            generation=record.generation,
            is_primary=record.role_of(host) is Role.PRIMARY,
            is_live=record.phase is not Phase.ENDED,
        )
        if host == A:
            self.perform_primary(self.primary.decided(decision))
        elif decision.generation <= self.generation:
            self.perform_backup(self.backup.claim_refused())
        else:
            self.perform_backup(self.backup.decided(decision))

    @rule()
    def the_operator_releases(self) -> None:
        self.change(transitions.release(self.record))

    @rule()
    def the_planner_gives_the_primary_another_backup(self) -> None:
        if self.record.primary == A:
            self.change(transitions.assign_backup(self.record, PlacementNote(chosen="c")))

    # --- what must hold ---------------------------------------------------------------------------

    @invariant()
    def nothing_that_left_is_unknown_to_the_one_that_goes_on(self) -> None:
        if self.promoted_from is not None:
            assert not self.everything_left
            assert max(self.left, default=0) <= self.promoted_from

    @invariant()
    def only_one_goes_on(self) -> None:
        alone = self.primary.state is PrimaryState.OVER and self.everything_left
        assert not (alone and self.promoted_from is not None)

    @invariant()
    def released_acknowledged_and_captured_are_in_order(self) -> None:
        p = self.primary
        assert p.released <= p.acknowledged <= p.captured <= p.acknowledged + 1
        assert p.acknowledged <= self.backup.acknowledged
        assert self.left == sorted(set(self.left))
        assert max(self.left, default=0) <= self.backup.acknowledged

    @invariant()
    def a_destroyed_vm_says_nothing(self) -> None:
        if self.record.primary == B and self.primary.state is PrimaryState.OVER:
            assert not self.primary_lives or not self.everything_left

    @invariant()
    def a_backup_that_is_over_lives_only_if_it_was_promoted(self) -> None:
        if self.backup.state is BackupState.OVER and self.promoted_from is None:
            assert not self.standby_lives


def test_whatever_happens_at_most_one_side_goes_on_and_knows_all_that_left() -> None:
    run_state_machine_as_test(
        Protection, settings=settings(max_examples=800, stateful_step_count=40, deadline=None)
    )
