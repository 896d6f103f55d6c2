"""Identifiers and enumerations, one word for one thing. Pure.

The glossary in docs/architecture.md gives their meaning; nothing here decides anything.
"""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

NAME_PATTERN = r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$"
"""Names of hosts, VMs and policies: what fits in a URL segment, a file name and an etcd key."""

HostId = Annotated[str, Field(pattern=NAME_PATTERN)]
VmId = Annotated[str, Field(pattern=NAME_PATTERN)]
PolicyName = Annotated[str, Field(pattern=NAME_PATTERN)]
Generation = Annotated[int, Field(ge=0)]
"""Fencing token of a protection, from 1; 0 stands for "none seen yet"."""
Epoch = Annotated[int, Field(ge=0)]
"""Ordinal of a checkpoint within a generation, from 1; 0 stands for "none"."""
BEAT_SECONDS_MAX = 60.0
"""However many hosts there are, each is asked for a heartbeat at least so often."""


class Role(StrEnum):
    """The part a host plays in one protection; `NONE` tells a former holder to let go."""

    PRIMARY = "primary"
    BACKUP = "backup"
    NONE = "none"


class Phase(StrEnum):
    """Where a protection stands. The legal successions are in `transitions`."""

    UNPROTECTED = "unprotected"
    """The primary runs alone; the planner looks for a backup (unless the policy says manual)."""
    SEEDING = "seeding"
    """A backup is being filled; output flows; the backup may not claim."""
    PROTECTED = "protected"
    """Output is held until acknowledged; the backup may claim."""
    ENDED = "ended"
    """The guest was shut down on purpose, or its QEMU ended while nobody could take over."""
    RELEASING = "releasing"
    """The operator asked to unprotect; the primary is taking its plugs out."""
    RETIRED = "retired"
    """Not protected any more. Kept so that generations never go back."""


class ClaimReason(StrEnum):
    """Why a side asks to go on alone."""

    PEER_SILENT = "peer-silent"
    STREAM_BROKEN = "stream-broken"
    PEER_FAILED = "peer-failed"
    HANDOVER = "handover"
    GUEST_ENDED = "guest-ended"
    VM_FAILED = "vm-failed"
    """The primary's QEMU died by itself; only the backup claims with it."""


class WorkerPhase(StrEnum):
    """What a worker is doing, as its agent reports it."""

    STARTING = "starting"
    CONNECTING = "connecting"
    SEEDING = "seeding"
    PROTECTING = "protecting"
    CLAIMING = "claiming"
    PROMOTING = "promoting"
    RUNNING_ALONE = "running-alone"
    ENDED = "ended"
    FAILED = "failed"


class Severity(StrEnum):
    """How a preflight issue weighs: a blocking one refuses protection."""

    BLOCKING = "blocking"
    WARNING = "warning"


class EventKind(StrEnum):
    """Kinds of events, in the past tense; stable, they are part of the API."""

    HOST_APPEARED = "HostAppeared"
    HOST_WENT_SILENT = "HostWentSilent"
    HOST_RETURNED = "HostReturned"
    HOST_CHANGED = "HostChanged"
    PROTECTION_REQUESTED = "ProtectionRequested"
    PROTECTION_CHANGED = "ProtectionChanged"
    PROTECTION_RELEASED = "ProtectionReleased"
    BACKUP_ASSIGNED = "BackupAssigned"
    BACKUP_DROPPED = "BackupDropped"
    NO_BACKUP_FOUND = "NoBackupFound"
    PROTECTED = "Protected"
    PROMOTED = "Promoted"
    CLAIM_WON = "ClaimWon"
    CLAIM_LOST = "ClaimLost"
    FAILED_OVER = "FailedOver"
    SWITCHOVER_REQUESTED = "SwitchoverRequested"
    GUEST_ENDED = "GuestEnded"
    OUTPUT_DROPPED = "OutputDropped"
    TRANSPORT_FELL_BACK = "TransportFellBack"
    VM_LOST = "VmLost"
    VM_DESTROYED = "VmDestroyed"
    WORKER_FAILED = "WorkerFailed"
    POLICY_STORED = "PolicyStored"
    POLICY_REMOVED = "PolicyRemoved"
