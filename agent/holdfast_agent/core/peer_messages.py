"""What a worker hears from its peer, once the frames are checked and decoded. Pure."""

from dataclasses import dataclass

from holdfast_agent.core.memory_map import PageIndexes, PageRows
from holdfast_api.words import Epoch


@dataclass(frozen=True)
class PagesArrived:
    """Pages of `epoch` (0: seeding); the views stay valid until the stage is cleared."""

    epoch: Epoch
    indexes: PageIndexes
    rows: PageRows
    zero_indexes: PageIndexes
    """Pages that are all zero; they travel without content."""


@dataclass(frozen=True)
class CheckpointArrived:
    """Everything of `epoch` has arrived, and its counts and digest fit."""

    epoch: Epoch
    final: bool
    device_state: bytes


@dataclass(frozen=True)
class AcknowledgementArrived:
    """The backup holds `epoch` whole."""

    epoch: Epoch


@dataclass(frozen=True)
class FarewellArrived:
    """The peer ends the connection in order."""

    code: str
    explanation: str


PeerMessage = PagesArrived | CheckpointArrived | AcknowledgementArrived | FarewellArrived
