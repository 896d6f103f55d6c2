"""What a stream over RDMA is made of: a link, the peer's ring, our own. Sets memory aside.

`Link` is a connected queue pair with all that belongs to it (`opening.VerbsLink`).
"""

import struct
from typing import NamedTuple, Protocol

import numpy as np

from holdfast_agent.core.ring import RingShape
from holdfast_agent.transport.rdma.verbs import Completion, Depths, Region

BOUNCE_BYTES = 2 << 20
"""Memory through which goes what is not registered."""
SEND_REQUESTS = 256
WORD = struct.Struct("<I")
WORD_ROOM_BYTES = 64


class Queue(Protocol):
    """A completion queue, see `verbs.CompletionQueue`."""

    def fileno(self) -> int:
        """Return the descriptor that is readable after a completion, once armed."""

    def arm(self) -> None:
        """Let the next completion make the descriptor readable."""

    def disarm(self) -> None:
        """Take the event that made it readable."""

    def poll(self) -> list[Completion]:
        """Return some finished requests; empty means that there are no more."""


class Receiver(Protocol):
    """What takes receive requests."""

    def receive(self, *, address: int, length: int, local_key: int, request: int) -> None:
        """Post a receive of one message or one word."""


class Link(Receiver, Protocol):
    """A connected queue pair."""

    @property
    def has_immediate(self) -> bool:
        """Whether a write can carry a word."""

    @property
    def sends(self) -> Queue:
        """Where finished writes and sends are found."""

    @property
    def receives(self) -> Queue:
        """Where words that came are found."""

    def hang_up_fileno(self) -> int:
        """Return the descriptor to look at for `hang_up`."""

    def hang_up(self) -> OSError | None:
        """Say how the connection ended; None while it has not. Never waits."""

    def write(
        self,
        *,
        address: int,
        length: int,
        local_key: int,
        remote_address: int,
        remote_key: int,
        request: int = 0,
        signaled: bool = False,
        word: int | None = None,
    ) -> None:
        """Post an RDMA WRITE, with `word` as immediate data if given."""

    def send(self, *, address: int, length: int, local_key: int, request: int) -> None:
        """Post a SEND, signaled."""

    def register(self, address: int, size_bytes: int) -> Region:
        """Let the NIC read this memory."""

    def close(self) -> None:
        """Tell the peer, and destroy everything: nothing of ours is written any more."""


class PeerRing(NamedTuple):
    """The ring that the peer lends us."""

    address: int
    key: int
    shape: RingShape


class OwnRing:
    """The ring that we lend to the peer, room for words behind it, and a bounce buffer.

    The regions are set by whoever registers the memory, before it is used.
    """

    def __init__(self, shape: RingShape) -> None:
        """Set memory aside."""
        self.shape = shape
        words = shape.receive_requests * WORD_ROOM_BYTES
        self.memory = np.zeros(shape.size_bytes + words, dtype=np.uint8)
        words = (SEND_REQUESTS + 1) * WORD_ROOM_BYTES
        self.bounce = np.zeros(BOUNCE_BYTES + words, dtype=np.uint8)
        self.region: Region | None = None
        self.bounce_region: Region | None = None

    @property
    def depths(self) -> Depths:
        """How many requests its queue pair must bear."""
        return Depths(SEND_REQUESTS, self.shape.receive_requests)

    @property
    def address(self) -> int:
        """Where it lies."""
        return int(self.memory.ctypes.data)

    def post_receives(self, link: Receiver) -> None:
        """Post every receive request; the queue pair must be initialised and not yet connected."""
        for slot in range(self.shape.receive_requests):
            self.post_receive(link, slot)

    def post_receive(self, link: Receiver, slot: int) -> None:
        """Post one receive request."""
        assert self.region is not None
        link.receive(
            address=self.address + self._word_offset(slot),
            length=WORD.size,
            local_key=self.region.local_key,
            request=slot,
        )

    def word(self, slot: int) -> int:
        """Return the word that came as a message."""
        value: int = WORD.unpack_from(self.memory.data, self._word_offset(slot))[0]
        return value

    def close(self) -> None:
        """End the registrations, after the queue pair was closed. Idempotent."""
        for region in (self.region, self.bounce_region):
            if region is not None:
                region.close()

    def _word_offset(self, slot: int) -> int:
        return self.shape.size_bytes + slot * WORD_ROOM_BYTES
