"""What the two machines of a protection ask to be done. Pure.

The driver performs the actions of one answer in the order given, each finished before the next
begins: the order carries the safety rules (acknowledge only after whole, release only after
acknowledged, destroy before anything else).
"""

from dataclasses import dataclass

from holdfast_api.words import ClaimReason, Epoch

# --- primary --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HoldOutput:
    """From now on nothing leaves; the first epoch begins."""


@dataclass(frozen=True)
class Capture:
    """Take checkpoint `epoch` and send it; with `final` the guest is not resumed after it."""

    epoch: Epoch
    final: bool = False


@dataclass(frozen=True)
class MarkAcknowledged:
    """The pages of `epoch` are the backup's now; they are no longer owed."""

    epoch: Epoch


@dataclass(frozen=True)
class ReleaseOutput:
    """Let the output of `epoch` leave."""

    epoch: Epoch


@dataclass(frozen=True)
class ReleaseAll:
    """Let all held output leave and hold nothing more."""


@dataclass(frozen=True)
class StopGuest:
    """The guest stands still until it is decided who goes on."""


@dataclass(frozen=True)
class ResumeGuest:
    """The guest runs on."""


@dataclass(frozen=True)
class ReportSeeded:
    """Tell the control plane that output is held and the first checkpoint acknowledged."""


@dataclass(frozen=True)
class ReportSeedingFailed:
    """Tell the control plane that this backup could not be filled; nothing was ever held."""

    reason: str


@dataclass(frozen=True)
class QuitVm:
    """End the QEMU of a guest that shut down on purpose."""


# --- backup ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Acknowledge:
    """Tell the primary that checkpoint `epoch` is whole, verified and can be promoted from."""

    epoch: Epoch


@dataclass(frozen=True)
class Apply:
    """Write the staged checkpoint `epoch` into the standby's memory."""

    epoch: Epoch


@dataclass(frozen=True)
class Promote:
    """Load the device state of `epoch` into the standby and let it run."""

    epoch: Epoch


# --- both -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AskClaim:
    """Ask the arbiter for the claim, again and again until it is decided."""

    reason: ClaimReason


@dataclass(frozen=True)
class Farewell:
    """Tell the peer, if it still listens, that this connection ends and why."""

    code: str


@dataclass(frozen=True)
class DestroyVm:
    """End this side's QEMU now; no output of it may leave any more."""


@dataclass(frozen=True)
class Finish:
    """This worker is done; `outcome` says how, for the agent and for people."""

    outcome: str


Action = (
    HoldOutput
    | Capture
    | MarkAcknowledged
    | ReleaseOutput
    | ReleaseAll
    | StopGuest
    | ResumeGuest
    | ReportSeeded
    | ReportSeedingFailed
    | QuitVm
    | Acknowledge
    | Apply
    | Promote
    | AskClaim
    | Farewell
    | DestroyVm
    | Finish
)


@dataclass(frozen=True)
class Decision:
    """What the arbiter decided, as one side of a protection must understand it.

    It comes from a claim's verdict or from an assignment of a newer generation: both tell the same
    truth, whichever arrives first.
    """

    generation: int
    """Of the record that was read."""
    is_primary: bool
    """This host is the record's primary."""
    is_live: bool
    """The record's VM may run: neither ended nor handed to others."""
