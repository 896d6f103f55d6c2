"""Both cores of a protection, the arbiter's table and a bad network, driven at random.

The world remembers which output left, and from where. What must hold at every moment is in the
invariants at the end; each rule above them is one thing that can happen. Most runs begin with a few
epochs behind them, one rule lets a whole epoch pass, and what ends a run early is drawn from a
small budget: so the time goes into what follows a suspicion, not into reaching one.
"""

from collections import deque
from itertools import pairwise

import hypothesis.strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from holdfast_agent.core import actions as act
from holdfast_agent.core.backup import BackupMachine, BackupState
from holdfast_agent.core.epoch import PrimaryMachine, PrimaryState
from holdfast_api import transitions
from holdfast_api.records import ClaimStamp, PlacementNote, Policy, ProtectionRecord
from holdfast_api.words import ClaimReason, Phase, Role

A, B, STRANGER = "a", "b", "c"
LOSSES = st.sampled_from([ClaimReason.PEER_SILENT, ClaimReason.STREAM_BROKEN])
SELDOM = st.sampled_from([False, False, True])
MISFORTUNES_MAX = 2


def a_misfortune_is_left(protection: "Protection") -> bool:
    return protection.misfortunes > 0


class Protection(RuleBasedStateMachine):
    """One generation of one VM on hosts a (primary) and b (backup)."""

    record: ProtectionRecord

    @initialize(
        epochs=st.integers(0, 3), noted=st.booleans(), misfortunes=st.integers(0, MISFORTUNES_MAX)
    )
    def begin(self, epochs: int, noted: bool, misfortunes: int) -> None:
        record = transitions.begin(
            vm="v", primary=A, policy=Policy(), policy_name=None, previous=None, now_seconds=0
        )
        assert isinstance(record, ProtectionRecord)
        self.record = record
        self.history = [record]
        self.won: dict[int, str] = {}
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
        self.save_fails = False
        self.seeded_wanted = False
        self.seeding_has_failed = False
        self.applied: list[int] = []
        self.promoted_from: int | None = None
        self.standby_lives = True
        self.was_suspected = False
        self.misfortunes = misfortunes
        for _ in range(epochs):
            self.an_epoch_passes()
        if noted:
            self.the_control_plane_notes_what_the_primary_reports()

    def change(self, outcome: transitions.Outcome) -> None:
        """Store the outcome as the control plane would; every change of role is a generation."""
        if isinstance(outcome, ProtectionRecord) and outcome != self.record:
            before, self.record = self.record, outcome
            self.history.append(outcome)
            assert outcome.generation in (before.generation, before.generation + 1)
            if (before.primary, before.backup) != (outcome.primary, outcome.backup):
                assert outcome.generation > before.generation, "a role changed without a fence"

    # --- performing -------------------------------------------------------------------------------

    def perform_primary(self, actions: list[act.Action]) -> None:  # noqa: C901, PLR0912 - flat
        for action in actions:
            match action:
                case act.HoldOutput():
                    self.is_holding = True
                case act.Capture(epoch, final):
                    assert self.is_holding, "captured before output was held (INV-7)"
                    assert not self.guest_stands
                    if self.save_fails:
                        self.perform_primary(self.primary.capture_failed())
                    else:
                        self.guest_stands = final
                        self.to_backup.append(("checkpoint", epoch, final))
                case act.ReleaseOutput(epoch):
                    assert self.primary_lives
                    assert A not in self.asked, "released while the claim is undecided (INV-4)"
                    assert epoch in self.applied, "the backup can not explain this output (INV-2)"
                    self.left.append(epoch)
                case act.ReleaseAll():
                    assert self.primary_lives
                    assert self.record.primary == A, "released all without being primary (INV-1)"
                    assert self.record.generation > self.generation, "released all too early"
                    self.everything_left = True
                    self.is_holding = False
                case act.StopGuest():
                    self.guest_stands = True
                case act.ResumeGuest():
                    assert self.record.primary == A
                    self.guest_stands = False
                case act.ReportSeeded():
                    self.seeded_wanted = True
                case act.ReportSeedingFailed():
                    self.seeding_has_failed = True
                case act.AskClaim(reason):
                    assert self.guest_stands, "the guest goes on while the claim is undecided"
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
                    assert B not in self.asked, "acknowledged after the claim (INV-3)"
                    assert epoch == len(self.applied) + 1, "acknowledged over a gap (INV-2)"
                    self.to_primary.append(epoch)
                case act.Apply(epoch):
                    self.applied.append(epoch)
                    self.perform_backup(self.backup.applied_checkpoint(epoch))
                case act.AskClaim(reason):
                    assert self.applied, "claims with nothing to go on from"
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
    def an_epoch_passes(self) -> None:
        """What happens nearly always, in one step."""
        if self.primary.state is PrimaryState.SEEDING:
            self.seeding_is_small_enough(save_fails=False)
        else:
            self.a_checkpoint_is_due(save_fails=False)
        self.a_message_reaches_the_backup()
        self.an_acknowledgement_arrives()

    @rule()
    def an_epoch_passes_up_to_its_acknowledgement(self) -> None:
        self.a_checkpoint_is_due(save_fails=False)
        self.a_message_reaches_the_backup()

    @rule(save_fails=st.booleans())
    def seeding_is_small_enough(self, save_fails: bool) -> None:
        self.save_fails = save_fails
        self.perform_primary(self.primary.seeding_small_enough())

    @rule(save_fails=st.booleans())
    def a_checkpoint_is_due(self, save_fails: bool) -> None:
        before = self.primary.captured
        waits = len(self.to_backup)
        self.save_fails = save_fails
        self.perform_primary(self.primary.checkpoint_due())
        sent = len(self.to_backup) - waits
        assert self.primary.captured == before + sent, "a capture that failed was counted"

    @rule()
    def an_acknowledgement_arrives(self) -> None:
        if self.to_primary:
            self.perform_primary(self.primary.acknowledgement(self.to_primary.popleft()))

    @precondition(a_misfortune_is_left)
    @rule(ahead=st.integers(-1, 2))
    def a_wrong_acknowledgement_arrives(self, ahead: int) -> None:
        p = self.primary
        epoch = max(0, p.acknowledged + ahead)
        if not p.acknowledged + 1 == epoch == p.captured:
            self.misfortunes -= 1
            before = list(self.left)
            self.perform_primary(p.acknowledgement(epoch))
            assert self.left == before, "a wrong acknowledgement released something (INV-2)"

    @rule(reason=LOSSES, what_is_under_way_is_lost=SELDOM)
    def the_primary_loses_its_peer(
        self, reason: ClaimReason, what_is_under_way_is_lost: bool
    ) -> None:
        if what_is_under_way_is_lost:
            self.to_primary.clear()
        self.perform_primary(self.primary.peer_lost(reason))

    @precondition(a_misfortune_is_left)
    @rule()
    def the_guest_shuts_down(self) -> None:
        if self.primary_lives and not self.guest_stands:
            self.misfortunes -= 1
            self.perform_primary(self.primary.guest_shut_down())

    @precondition(a_misfortune_is_left)
    @rule()
    def the_vm_crashes(self) -> None:
        if self.primary_lives:
            self.misfortunes -= 1
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

    @rule()
    def the_control_plane_notes_what_the_primary_reports(self) -> None:
        if self.seeded_wanted:
            self.change(transitions.become_protected(self.record, A, self.generation))
        if self.seeding_has_failed:
            self.change(transitions.drop_seeding_backup(self.record, A, self.generation))

    @rule(host=st.sampled_from([A, B, STRANGER]))
    def a_report_that_nobody_can_have_made_arrives(self, host: str) -> None:
        """Of how seeding went, when nobody seeds, or by somebody else."""
        before = self.record
        if host != before.primary or before.phase is not Phase.SEEDING:
            self.change(transitions.become_protected(before, host, before.generation))
            self.change(transitions.drop_seeding_backup(before, host, before.generation))
            assert self.record == before, "the arbiter believed a report that can not be"

    # --- the backup's side ------------------------------------------------------------------------

    @rule()
    def a_message_reaches_the_backup(self) -> None:
        if self.to_backup:
            kind, epoch, final = self.to_backup.popleft()
            if kind == "checkpoint":
                self.perform_backup(self.backup.checkpoint_whole(epoch, final=final))
            else:
                self.perform_backup(self.backup.farewell(kind))

    @precondition(a_misfortune_is_left)
    @rule(ahead=st.sampled_from([-1, 0, 2, 3]), final=st.booleans())
    def a_wrong_checkpoint_arrives(self, ahead: int, final: bool) -> None:
        """One was left out, or came twice: this primary is not to be trusted."""
        self.misfortunes -= 1
        epoch = max(0, self.backup.acknowledged + ahead)
        self.perform_backup(self.backup.checkpoint_whole(epoch, final=final))
        self.was_suspected = True

    @rule(reason=LOSSES, what_is_under_way_is_lost=SELDOM)
    def the_backup_suspects(self, reason: ClaimReason, what_is_under_way_is_lost: bool) -> None:
        self.was_suspected = True
        if what_is_under_way_is_lost:
            self.to_backup.clear()
        self.perform_backup(self.backup.suspect(reason))

    @precondition(a_misfortune_is_left)
    @rule()
    def the_standby_crashes(self) -> None:
        if self.standby_lives and self.promoted_from is None:
            self.misfortunes -= 1
            self.perform_backup(self.backup.standby_failed("it crashed"))

    # --- the arbiter ------------------------------------------------------------------------------

    @rule(host=st.sampled_from([A, B]))
    def the_arbiter_hears_a_claim(self, host: str) -> None:
        if host in self.asked:
            self.claim(host, self.generation, self.asked[host])
            self.verdicts[host].append(self.record)

    @rule(host=st.sampled_from([A, B, STRANGER]), generation=st.integers(0, 5), reason=LOSSES)
    def a_claim_that_nobody_can_have_made_arrives(
        self, host: str, generation: int, reason: ClaimReason
    ) -> None:
        """From a host without a role, or of a generation that is not the present one."""
        before = self.record
        if self.record.role_of(host) is Role.NONE or generation != self.record.generation:
            self.claim(host, generation, reason)
            assert self.record == before, "a claim won that nobody can have made (INV-4)"

    def claim(self, host: str, generation: int, reason: ClaimReason) -> None:
        before = self.record
        self.change(
            transitions.claim(
                self.record,
                host=host,
                generation=generation,
                stamp=ClaimStamp(claim=f"claim-{host}", host=host, reason=reason),
                reason=reason,
                now_seconds=0,
            )
        )
        if self.record != before:
            assert generation not in self.won, "two claims of one generation won (INV-4)"
            self.won[generation] = host
            assert before.role_of(host) is not Role.NONE, "a stranger won (INV-4)"
            if before.role_of(host) is Role.BACKUP:
                assert before.phase is Phase.PROTECTED, "unplugged, and a backup won (INV-7)"

    @rule(host=st.sampled_from([A, B]))
    def a_verdict_arrives(self, host: str) -> None:
        if self.verdicts[host]:
            self.decide(host, self.verdicts[host].pop(0), is_verdict=True)

    @rule(host=st.sampled_from([A, B]))
    def an_order_arrives(self, host: str) -> None:
        self.decide(host, self.record, is_verdict=False)

    @rule(host=st.sampled_from([A, B]), back=st.integers(1, 3))
    def an_order_arrives_late(self, host: str, back: int) -> None:
        if back < len(self.history):
            self.decide(host, self.history[-1 - back], is_verdict=False)

    def decide(self, host: str, record: ProtectionRecord, *, is_verdict: bool) -> None:
        is_primary = record.role_of(host) is Role.PRIMARY
        decision = act.Decision(
            generation=record.generation,
            is_primary=is_primary,
            is_live=record.phase is not Phase.ENDED,
        )
        is_newer = decision.generation > self.generation
        was_over = self.side_is_over(host)
        if host == B and is_verdict and not is_newer:
            self.perform_backup(self.backup.claim_refused())
            return
        machine = self.primary if host == A else self.backup
        actions = machine.decided(decision)
        # What follows from them is looked at first: it says more than that there were any.
        (self.perform_primary if host == A else self.perform_backup)(actions)
        assert is_newer or not actions, "an order of an older generation was followed"
        if is_newer and not is_primary and not was_over:
            assert actions[0] == act.DestroyVm(), "the loser did something else first (INV-6)"

    def side_is_over(self, host: str) -> bool:
        if host == A:
            return self.primary.state is PrimaryState.OVER
        return self.backup.state in (BackupState.PROMOTING, BackupState.OVER)

    @precondition(a_misfortune_is_left)
    @rule()
    def the_operator_releases(self) -> None:
        self.misfortunes -= 1
        self.change(transitions.release(self.record))

    @rule(chosen=st.sampled_from([B, STRANGER]))
    def the_planner_gives_the_primary_another_backup(self, chosen: str) -> None:
        if self.record.primary == A:
            self.change(transitions.assign_backup(self.record, PlacementNote(chosen=chosen)))

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
        assert all(earlier < later for earlier, later in pairwise(self.left))
        assert max(self.left, default=0) <= self.backup.acknowledged

    @invariant()
    def a_standby_has_every_checkpoint_that_was_acknowledged(self) -> None:
        assert self.applied == list(range(1, self.backup.acknowledged + 1))

    @invariant()
    def a_protected_vm_was_plugged_and_has_a_backup(self) -> None:
        if self.record.phase is Phase.PROTECTED:
            assert self.record.backup is not None
            assert self.record.generation == self.generation
            assert self.applied

    @invariant()
    def a_destroyed_vm_says_nothing(self) -> None:
        if self.record.primary == B and self.primary.state is PrimaryState.OVER:
            assert not self.primary_lives or not self.everything_left

    @invariant()
    def a_backup_that_is_over_lives_only_if_it_was_promoted(self) -> None:
        if self.backup.state is BackupState.OVER and self.promoted_from is None:
            assert not self.standby_lives, "a standby was given up and lives (INV-6)"
