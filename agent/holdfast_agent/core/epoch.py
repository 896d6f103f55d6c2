"""The primary's side of a protection: when to capture, release, claim, go on or give up. Pure.

Events in, ordered actions out. The machine is made for one generation and never survives it.

    SEEDING ──seeding_small_enough──▶ PROTECTING ──peer_lost / vm ends──▶ CLAIMING ──▶ OVER
       │                                 │    └──handover acknowledged──▶ HANDING_OVER ──▶ OVER
       └──peer_lost──▶ OVER (nothing was held, nothing needs a claim)

Formulas, each asserted where it could break:

    INV-1  output leaves only while this side is primary of its generation or of a newer one
    INV-2  released <= acknowledged <= captured
    INV-4  after loss of the peer nothing is released before a decision
    INV-7  nothing is captured before output is held
    one checkpoint unacknowledged at a time: captured <= acknowledged + 1

Source: docs/invariants.md; the shape follows the raft library's `Ready` (ordered obligations).
"""

from dataclasses import dataclass
from enum import Enum

from holdfast_agent.core.actions import (
    Action,
    AskClaim,
    Capture,
    Decision,
    DestroyVm,
    Farewell,
    Finish,
    HoldOutput,
    MarkAcknowledged,
    QuitVm,
    ReleaseAll,
    ReleaseOutput,
    ReportSeeded,
    ReportSeedingFailed,
    ResumeGuest,
    StopGuest,
)
from holdfast_api.words import ClaimReason, Epoch, Generation


class PrimaryState(Enum):
    """Where the primary stands in its generation."""

    SEEDING = "seeding"
    PROTECTING = "protecting"
    HANDING_OVER = "handing-over"
    CLAIMING = "claiming"
    OVER = "over"


@dataclass
class PrimaryMachine:
    """State of one generation's primary. `captured`, `acknowledged`, `released` are epochs."""

    generation: Generation
    state: PrimaryState = PrimaryState.SEEDING
    captured: Epoch = 0
    acknowledged: Epoch = 0
    released: Epoch = 0
    handover_wanted: bool = False
    guest_ended: bool = False
    vm_is_gone: bool = False
    claim_reason: ClaimReason | None = None
    outcome: str = ""

    # --- the epoch's round ------------------------------------------------------------------------

    def seeding_small_enough(self) -> list[Action]:
        """What is left of seeding fits into one pause: hold output, then capture epoch 1."""
        if self.state is not PrimaryState.SEEDING:
            return []
        self.state = PrimaryState.PROTECTING
        return [HoldOutput(), *self._capture()]  # INV-7: in this order

    def checkpoint_due(self) -> list[Action]:
        """The pacing asks for a checkpoint; refused while one is unacknowledged."""
        if self.state is not PrimaryState.PROTECTING or self.captured != self.acknowledged:
            return []
        return self._capture()

    def capture_failed(self) -> list[Action]:
        """QEMU could not save: the epoch stays open, its pages stay owed, the next one retries."""
        assert self.captured == self.acknowledged + 1
        self.captured -= 1
        if self.state is PrimaryState.HANDING_OVER:
            self.state = PrimaryState.PROTECTING
            self.handover_wanted = True
        return []

    def acknowledgement(self, epoch: Epoch) -> list[Action]:
        """The backup holds `epoch` whole. One that comes after loss of the peer changes nothing."""
        if self.state not in (PrimaryState.PROTECTING, PrimaryState.HANDING_OVER):
            return []
        if epoch != self.captured or epoch != self.acknowledged + 1:
            return self.peer_lost(ClaimReason.PEER_FAILED)
        self.acknowledged = epoch
        self.released = epoch
        self._check()
        actions: list[Action] = [MarkAcknowledged(epoch), ReleaseOutput(epoch)]  # INV-2
        if epoch == 1:
            actions.append(ReportSeeded())
        return actions

    def handover_ordered(self) -> list[Action]:
        """A planned switchover is wanted; the next checkpoint is the last one."""
        if self.state is PrimaryState.PROTECTING:
            self.handover_wanted = True
        return []

    # --- loss and decision ------------------------------------------------------------------------

    def peer_lost(self, reason: ClaimReason) -> list[Action]:
        """The backup is silent, gone or wrong."""
        if self.state is PrimaryState.SEEDING:
            self._over("seeding failed")
            return [ReportSeedingFailed(reason.value), Finish(self.outcome)]
        if self.state in (PrimaryState.PROTECTING, PrimaryState.HANDING_OVER):
            return self._claim(reason)
        return []

    def handover_timed_out(self) -> list[Action]:
        """The backup did not take over in time; whoever wins the claim goes on."""
        if self.state is not PrimaryState.HANDING_OVER:
            return []
        return self._claim(ClaimReason.PEER_SILENT)

    def guest_shut_down(self) -> list[Action]:
        """The guest ended itself on purpose; nobody may bring it back (but a backup that won)."""
        if self.state in (PrimaryState.OVER, PrimaryState.CLAIMING):
            self.guest_ended = self.guest_ended or self.state is PrimaryState.CLAIMING
            return []
        self.guest_ended = True
        return self._claim(ClaimReason.GUEST_ENDED)

    def vm_gone(self) -> list[Action]:
        """QEMU ended by itself, without a shutdown: the backup takes over at once."""
        if self.state is PrimaryState.OVER or self.guest_ended:
            self.vm_is_gone = True
            return []  # a guest that ended on purpose takes its QEMU with it; the claim goes on
        held = self.state is not PrimaryState.SEEDING
        self._over("QEMU ended by itself")
        tell: list[Action] = [Farewell("vm-failed")] if held else [Farewell("seeding-abandoned")]
        return [*tell, Finish(self.outcome)]

    def decided(self, decision: Decision) -> list[Action]:
        """The arbiter spoke: a verdict, or an assignment of a newer generation.

        An answer of our own generation or an older one decides nothing (INV-5).
        """
        if self.state is PrimaryState.OVER or decision.generation <= self.generation:
            return []
        if not decision.is_primary:  # INV-6: before anything else
            self._over("another host goes on with this VM")
            return [DestroyVm(), Finish(self.outcome)]
        if self.guest_ended:
            self._over("the guest ended")
            release: list[Action] = [] if self.vm_is_gone else [ReleaseAll()]
            return [*release, Farewell("guest-ended"), QuitVm(), Finish(self.outcome)]
        stands = self.state in (PrimaryState.CLAIMING, PrimaryState.HANDING_OVER)
        resume: list[Action] = [ResumeGuest()] if stands and not self.guest_ended else []
        self._over("this host goes on alone")
        return [ReleaseAll(), *resume, Farewell("released"), Finish(self.outcome)]

    # --- inside -----------------------------------------------------------------------------------

    def _capture(self) -> list[Action]:
        self.captured += 1
        self._check()
        final = self.handover_wanted and self.acknowledged > 0
        if final:
            self.handover_wanted = False
            self.state = PrimaryState.HANDING_OVER
        return [Capture(self.captured, final)]

    def _claim(self, reason: ClaimReason) -> list[Action]:
        self.state = PrimaryState.CLAIMING
        self.claim_reason = reason
        return [StopGuest(), AskClaim(reason)]

    def _over(self, outcome: str) -> None:
        self.state = PrimaryState.OVER
        self.outcome = outcome

    def _check(self) -> None:
        assert self.released <= self.acknowledged <= self.captured, self  # INV-2
        assert self.captured <= self.acknowledged + 1, self
