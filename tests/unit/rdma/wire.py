"""A pair of links whose NICs are this process: what pyverbs would do, with real memory.

Writes happen when `deliver` lets them, so that a test can hold them back, damage or refuse them.
A word that finds no receive request is a failed test: that is what credits are for.
"""

import ctypes
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from holdfast_agent.core.ring import RingShape
from holdfast_agent.transport.rdma.link import OwnRing, PeerRing
from holdfast_agent.transport.rdma.stream import RdmaStream
from holdfast_agent.transport.rdma.verbs import Completion, Region


class WireRegion(Region):
    """Memory that this NIC may touch."""

    def __init__(self, owner: "WireLink", address: int, size_bytes: int) -> None:
        self.address = address
        self.size_bytes = size_bytes
        self.local_key = self.remote_key = owner.next_key
        self._owner = owner
        owner.next_key += 1
        owner.regions[self.local_key] = self

    def close(self) -> None:
        self._owner.regions.pop(self.local_key, None)


class WireQueue:
    """A completion queue with a descriptor of its own."""

    def __init__(self) -> None:
        self.done: deque[Completion] = deque()
        self.is_armed = False
        self.event = os.eventfd(0, os.EFD_NONBLOCK)

    def fileno(self) -> int:
        return self.event

    def arm(self) -> None:
        self.is_armed = True

    def disarm(self) -> None:
        os.eventfd_read(self.event)

    def poll(self) -> list[Completion]:
        return [self.done.popleft() for _ in range(min(4, len(self.done)))]

    def put(self, completion: Completion) -> None:
        self.done.append(completion)
        if self.is_armed:
            self.is_armed = False
            os.eventfd_write(self.event, 1)


@dataclass
class WireLink:
    """One end; `peer` is the other."""

    has_immediate: bool = True
    sends: WireQueue = field(default_factory=WireQueue)
    receives: WireQueue = field(default_factory=WireQueue)
    regions: dict[int, Region] = field(default_factory=dict)
    posted_receives: deque[tuple[int, int]] = field(default_factory=deque)
    pending: deque[Callable[[], None]] = field(default_factory=deque)
    holds_back: bool = False
    next_key: int = 1
    is_closed: bool = False
    ended: OSError | None = None
    hang_up_event: int = field(default_factory=lambda: os.eventfd(0, os.EFD_NONBLOCK))
    peer: "WireLink" = field(init=False, repr=False)
    copied_bytes: int = 0
    """What was read out of the bounce buffer."""
    bounce_key: int = 0

    def hang_up_fileno(self) -> int:
        return self.hang_up_event

    def hang_up(self) -> OSError | None:
        os.eventfd_read(self.hang_up_event)
        return self.ended

    def end(self, error: OSError) -> None:
        """Let RDMA CM say that it is over."""
        self.ended = error
        os.eventfd_write(self.hang_up_event, 1)

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
        self.check(self.regions[local_key], address, length)
        if local_key == self.bounce_key:
            self.copied_bytes += length

        def deliver() -> None:
            if length:
                self.check(self.peer.regions[remote_key], remote_address, length)
                ctypes.memmove(remote_address, address, length)
            if word is not None:
                self.peer.take_word(word)
            if signaled:
                self.sends.put(Completion(request, 0, None))

        self._post(deliver)

    def send(self, *, address: int, length: int, local_key: int, request: int) -> None:
        self.check(self.regions[local_key], address, length)

        def deliver() -> None:
            assert self.peer.posted_receives, "no receive request: overrun"
            slot, target = self.peer.posted_receives.popleft()
            ctypes.memmove(target, address, length)
            self.peer.receives.put(Completion(slot, 0, None))
            self.sends.put(Completion(request, 0, None))

        self._post(deliver)

    def receive(self, *, address: int, length: int, local_key: int, request: int) -> None:
        self.check(self.regions[local_key], address, length)
        self.posted_receives.append((request, address))

    def take_word(self, word: int) -> None:
        assert self.posted_receives, "no receive request: overrun"
        self.receives.put(Completion(self.posted_receives.popleft()[0], 0, word))

    def register(self, address: int, size_bytes: int) -> Region:
        return WireRegion(self, address, size_bytes)

    def deliver(self, count: int | None = None) -> None:
        """Carry out what was held back."""
        while self.pending and (count is None or count > 0):
            self.pending.popleft()()
            count = None if count is None else count - 1

    def close(self) -> None:
        self.is_closed = True
        self.peer.end(ConnectionResetError(104, "RDMA: the peer hung up"))

    @staticmethod
    def check(region: Region, address: int, length: int) -> None:
        assert region.address <= address, "outside of registered memory"
        assert address + length <= region.address + region.size_bytes, "outside"

    def _post(self, deliver: Callable[[], None]) -> None:
        if self.holds_back:
            self.pending.append(deliver)
        else:
            deliver()


@dataclass
class End:
    """One side: its stream and what is below."""

    stream: RdmaStream
    link: WireLink
    ring: OwnRing


def half(link: WireLink, shape: RingShape) -> OwnRing:
    ring = OwnRing(shape)
    ring.region = link.register(ring.address, ring.memory.nbytes)
    ring.bounce_region = link.register(int(ring.bounce.ctypes.data), ring.bounce.nbytes)
    link.bounce_key = ring.bounce_region.local_key
    ring.post_receives(link)
    return ring


def lent(ring: OwnRing) -> PeerRing:
    assert ring.region is not None
    return PeerRing(ring.address, ring.region.remote_key, ring.shape)


def pair(primary: RingShape, backup: RingShape, *, has_immediate: bool = True) -> tuple[End, End]:
    """Return the two ends of a stream; the shapes are of the rings that each lends."""
    links = WireLink(has_immediate), WireLink(has_immediate)
    links[0].peer, links[1].peer = links[1], links[0]
    rings = half(links[0], primary), half(links[1], backup)
    return (
        End(RdmaStream(links[0], rings[0], lent(rings[1])), links[0], rings[0]),
        End(RdmaStream(links[1], rings[1], lent(rings[0])), links[1], rings[1]),
    )
