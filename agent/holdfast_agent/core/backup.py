"""The backup's side of a protection: what to acknowledge, when to suspect, claim, promote. Pure.

Events in, ordered actions out. The machine is made for one generation and never survives it.

    RECEIVING ──suspicion / farewell / final checkpoint──▶ CLAIMING ──won──▶ PROMOTING ──▶ OVER
        └──suspicion before the first checkpoint, released, guest ended──▶ OVER (destroyed)

Formulas:

    INV-2  acknowledged means whole, verified, staged: `Acknowledge(n)` is only given for a
           checkpoint reported whole, and n rises by one
    INV-3  after a suspicion nothing is acknowledged in this generation, and only then is claimed:
           no action list has `Acknowledge` after the state left RECEIVING
    committed = acknowledged: the staged checkpoint is applied before promotion

Source: docs/invariants.md.
"""

from dataclasses import dataclass
from enum import Enum

from holdfast_agent.core.actions import (
    Acknowledge,
    Action,
    Apply,
    AskClaim,
    Decision,
    DestroyVm,
    Farewell,
    Finish,
    Promote,
)
from holdfast_api.words import ClaimReason, Epoch, Generation


class BackupState(Enum):
    """Where the backup stands in its generation."""

    RECEIVING = "receiving"
    CLAIMING = "claiming"
    PROMOTING = "promoting"
    OVER = "over"


@dataclass
class BackupMachine:
    """State of one generation's backup. `acknowledged` and `applied` are epochs."""

    generation: Generation
    state: BackupState = BackupState.RECEIVING
    acknowledged: Epoch = 0
    applied: Epoch = 0
    claim_reason: ClaimReason | None = None
    outcome: str = ""

    def checkpoint_whole(self, epoch: Epoch, *, final: bool) -> list[Action]:
        """Checkpoint `epoch` has arrived completely, was verified and lies staged.

        With `final` the primary has stopped its guest for good and hands over.
        """
        if self.state is not BackupState.RECEIVING:  # INV-3
            return []
        if epoch != self.acknowledged + 1:
            return self.suspect(ClaimReason.PEER_FAILED)
        self.acknowledged = epoch
        actions: list[Action] = [Acknowledge(epoch), Apply(epoch)]
        if final:
            actions += self._claim(ClaimReason.HANDOVER)
        return actions

    def applied_checkpoint(self, epoch: Epoch) -> list[Action]:
        """The staged checkpoint stands in the standby's memory now."""
        assert epoch == self.acknowledged == self.applied + 1, (epoch, self)
        self.applied = epoch
        return []

    def suspect(self, reason: ClaimReason) -> list[Action]:
        """The primary is silent, gone or wrong: stop acknowledging for good, then claim."""
        if self.state is not BackupState.RECEIVING:
            return []
        if self.acknowledged == 0:  # nothing to promote from; INV-7 would refuse us anyway
            return self._destroy(f"seeding ended: {reason.value}")
        return self._claim(reason)

    def farewell(self, code: str) -> list[Action]:
        """The primary ended the connection in order and said why."""
        if self.state is not BackupState.RECEIVING:
            return []
        if code == "vm-failed":
            return self.suspect(ClaimReason.VM_FAILED)
        return self._destroy(f"the primary said {code}")

    def decided(self, decision: Decision) -> list[Action]:
        """The arbiter spoke: a verdict, or an assignment of a newer generation.

        An answer of our own generation or an older one decides nothing (INV-5).
        """
        if self.state in (BackupState.PROMOTING, BackupState.OVER):
            return []
        if decision.generation <= self.generation:
            return []
        if not (decision.is_primary and decision.is_live):  # INV-6
            return self._destroy("another host goes on with this VM")
        # Only our own claim can have made us primary of a newer generation (INV-4).
        assert self.state is BackupState.CLAIMING, self
        assert self.applied == self.acknowledged > 0, self
        self.state = BackupState.PROMOTING
        return [Promote(self.applied)]

    def standby_failed(self, why: str) -> list[Action]:
        """The standby cannot be promoted any more; the primary must know at once (INV-2)."""
        if self.state not in (BackupState.RECEIVING, BackupState.CLAIMING):
            return []
        return [Farewell("standby-failed"), *self._destroy(why)]

    def claim_refused(self) -> list[Action]:
        """The arbiter decided that this side may not go on in the record's present state."""
        if self.state is not BackupState.CLAIMING:
            return []
        return self._destroy("the claim was refused")

    def promoted(self) -> list[Action]:
        """The guest runs here and has announced itself."""
        assert self.state is BackupState.PROMOTING, self
        self._over("promoted")
        return [Finish(self.outcome)]

    def promotion_failed(self, why: str) -> list[Action]:
        """The standby could not be brought to life; the VM is lost, and that is said plainly."""
        assert self.state is BackupState.PROMOTING, self
        return self._destroy(f"promotion failed: {why}")

    def _claim(self, reason: ClaimReason) -> list[Action]:
        self.state = BackupState.CLAIMING
        self.claim_reason = reason
        return [AskClaim(reason)]

    def _destroy(self, outcome: str) -> list[Action]:
        self._over(outcome)
        return [DestroyVm(), Finish(outcome)]

    def _over(self, outcome: str) -> None:
        self.state = BackupState.OVER
        self.outcome = outcome
