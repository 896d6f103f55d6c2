"""One TCP connection between two workers, that can be cut, slowed and healed in each direction.

`PeerEnd` is the port `Peer`. What is sent into a cut waits, as TCP repeats it, and arrives when the
cut is healed; a host without power sends no farewell and no reset. Rows handed out are spoiled by
`release_buffers`, so that nobody who looks at them later goes unnoticed.
"""

from collections import deque
from collections.abc import Callable  # noqa: TC003 - as elsewhere
from dataclasses import dataclass, field

import numpy as np
from tests.scenarios.simulation import MS, World

from holdfast_agent.core.encoding import Encoding
from holdfast_agent.core.failures import PeerLost
from holdfast_agent.core.memory_map import PageIndexes, PageRows
from holdfast_agent.core.peer_messages import (
    AcknowledgementArrived,
    CheckpointArrived,
    FarewellArrived,
    PagesArrived,
    PeerMessage,
)
from holdfast_agent.transport.connection import ConnectionCounters
from holdfast_agent.transport.liveness import KeepaliveTimer, SilenceJudge
from holdfast_agent.transport.page_coding import CodingCounters
from holdfast_api.words import ClaimReason

LATENCY_NS = 200_000
SEND_NS = 100_000
SEEDING_SILENCE_NS = 3_000 * MS


@dataclass(frozen=True)
class KeptAlive:
    """A sign of life."""


@dataclass(frozen=True)
class HungUp:
    """The other end closed the connection, or its process ended."""


WireMessage = PeerMessage | KeptAlive | HungUp


@dataclass
class Direction:
    """What is under way from one end to the other."""

    latency_ns: int = LATENCY_NS
    is_cut: bool = False
    under_way: deque[tuple[int, WireMessage]] = field(default_factory=deque)


class PeerEnd:
    """One end of the connection, as a worker sees it."""

    def __init__(self, world: World, host: str, keepalive_ms: int, silence_limit_ms: int) -> None:
        self._world = world
        self._host = host
        self._silence_limit_ms = silence_limit_ms
        self._keepalive = KeepaliveTimer(keepalive_ms * MS, world.now())
        self._judge = SilenceJudge(SEEDING_SILENCE_NS, world.now())
        self._inbox: deque[WireMessage] = deque()
        self._kept: list[PagesArrived] = []
        self._descriptor = world.descriptor(lambda: bool(self._inbox))
        self._is_closed = False
        self.has_power = True
        self.out = Direction()
        self.counters = ConnectionCounters()
        self.coding = CodingCounters()
        self.other: PeerEnd
        self.on_checkpoint: Callable[[int], None] = lambda _: None
        self.on_acknowledge: Callable[[int], None] = lambda _: None

    # --- the wire ---------------------------------------------------------------------------------

    def transmit(self, message: WireMessage) -> None:
        if self.has_power:
            self._keepalive.sent(self._world.now())
            due_ns = self._world.now() + self.out.latency_ns
            if self.out.under_way:
                due_ns = max(due_ns, self.out.under_way[-1][0])
            self.out.under_way.append((due_ns, message))
            self._world.at(due_ns, self._arrive)

    def _arrive(self) -> None:
        way = self.out.under_way
        while way and not self.out.is_cut and way[0][0] <= self._world.now():
            self.other.deliver(way.popleft()[1])

    def cut(self) -> None:
        self.out.is_cut = True

    def heal(self) -> None:
        self.out.is_cut = False
        self._world.after(self.out.latency_ns, self._arrive)

    def deliver(self, message: WireMessage) -> None:
        if self._is_closed:
            return
        self._inbox.append(message)

    def lose_power(self) -> None:
        self.has_power = False
        self._is_closed = True

    # --- port Peer --------------------------------------------------------------------------------

    def fileno(self) -> int:
        assert not self._is_closed
        return self._descriptor

    def use_encoding(self, encoding: Encoding) -> None:
        """Pages travel as they are: how they do is nothing that a driver could see."""

    def send_pages(
        self, epoch: int, indexes: PageIndexes, rows: PageRows, zero_indexes: PageIndexes
    ) -> None:
        assert not self._is_closed
        if len(indexes) + len(zero_indexes):
            self._world.sleep(SEND_NS)
            if epoch == 0:
                self._world.log(self._host, f"seeds {len(indexes)} pages")
            self.transmit(PagesArrived(epoch, indexes.copy(), rows.copy(), zero_indexes.copy()))

    def send_checkpoint(self, epoch: int, device_state: bytes, *, final: bool) -> None:
        assert not self._is_closed
        self._world.sleep(SEND_NS)
        last = ", the last one" if final else ""
        self._world.log(self._host, f"sends checkpoint {epoch}{last}")
        self.on_checkpoint(epoch)
        self.transmit(CheckpointArrived(epoch, final, device_state))

    def send_acknowledgement(self, epoch: int) -> None:
        assert not self._is_closed
        self._world.log(self._host, f"acknowledges {epoch}")
        self.on_acknowledge(epoch)
        self.transmit(AcknowledgementArrived(epoch))

    def send_farewell(self, code: str, explanation: str) -> None:
        self._world.log(self._host, f"says farewell: {code}")
        self.transmit(FarewellArrived(code, explanation))

    def receive(self) -> PeerMessage | None:
        while self._inbox:
            message = self._inbox.popleft()
            if isinstance(message, HungUp):
                raise PeerLost(ClaimReason.STREAM_BROKEN, "the peer hung up")
            self._judge.heard(self._world.now())
            if isinstance(message, PagesArrived):
                assert all(kept.epoch == message.epoch for kept in self._kept), "never released"
                self._kept.append(message)
            if not isinstance(message, KeptAlive):
                return message
        return None

    def be_strict(self) -> None:
        self._judge = SilenceJudge(self._silence_limit_ms * MS, self._world.now())

    def tend(self, now_ns: int) -> None:
        if now_ns >= self._keepalive.due_at_ns:
            self.transmit(KeptAlive())
        if self._judge.is_suspicious(now_ns):
            raise PeerLost(ClaimReason.PEER_SILENT, "nothing heard")

    def next_due_ns(self) -> int:
        return min(self._keepalive.due_at_ns, self._judge.due_at_ns)

    def release_buffers(self) -> None:
        for pages in self._kept:
            pages.rows[:] = np.uint8(0xEE)
        self._kept.clear()

    def close(self) -> None:
        if not self._is_closed:
            self.transmit(HungUp())
            self._is_closed = True


def connect(
    world: World, first: str, second: str, *, keepalive_ms: int, silence_limit_ms: int
) -> tuple[PeerEnd, PeerEnd]:
    """Return both ends of a new connection."""
    ends = (
        PeerEnd(world, first, keepalive_ms, silence_limit_ms),
        PeerEnd(world, second, keepalive_ms, silence_limit_ms),
    )
    ends[0].other, ends[1].other = ends[1], ends[0]
    return ends
