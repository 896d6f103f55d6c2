"""A kernel with taps, IFBs and `plug` qdiscs, as far as they matter to a plug's holder. Pure.

The queue follows `net/sched/sch_plug.c` of Linux 6.1 line by line: three counts, two flags, and
changes that take no lock. Where a change can meet the sending of packets on another processor,
the model takes the worse outcome: a released packet too many, or a release that is lost.
"""

import errno
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from holdfast_agent.core.failures import VirtualMachineFailed
from holdfast_agent.network.qdisc_links import Found, Ifb
from holdfast_agent.network.qdisc_netlink import RTM_GETQDISC, PlugAction, PlugStatistics


@dataclass(frozen=True)
class Packet:
    tap: str
    number: int
    epoch: int
    """The checkpoint that will explain it; 0 when it was sent while nothing was held."""
    size_bytes: int = 100


@dataclass
class Queue:
    """`struct plug_sched_data` and its queue."""

    limit_bytes: int
    packets: list[Packet] = field(default_factory=list)
    current_epoch: int = 0
    last_epoch: int = 0
    to_release: int = 0
    unplug_indefinite: bool = False
    throttled: bool = True
    sent_bytes: int = 0
    dropped: int = 0

    @property
    def held_bytes(self) -> int:
        return sum(packet.size_bytes for packet in self.packets)

    def enqueue(self, packet: Packet) -> None:
        if self.held_bytes + packet.size_bytes > self.limit_bytes:
            self.dropped += 1
            return
        if not self.unplug_indefinite:
            self.current_epoch += 1
        self.packets.append(packet)

    def dequeue(self) -> Packet | None:
        if self.throttled:
            return None
        if not self.unplug_indefinite:
            if not self.to_release:
                self.throttled = True
                return None
            self.to_release -= 1
        if not self.packets:
            return None
        packet = self.packets.pop(0)
        self.sent_bytes += packet.size_bytes
        return packet

    def change(self, action: PlugAction, limit_bytes: int, *, loses: bool) -> None:
        match action:
            case PlugAction.BUFFER:
                self.last_epoch, self.current_epoch = self.current_epoch, 0
                if self.unplug_indefinite:
                    self.throttled = True
                self.unplug_indefinite = False
            case PlugAction.RELEASE_ONE:
                races = self.to_release > 0
                self.to_release += self.last_epoch + races
                self.last_epoch = 0
                self.throttled = False
            case PlugAction.RELEASE_INDEFINITE:
                races = not self.throttled and loses
                self.unplug_indefinite = True
                self.to_release = self.last_epoch = self.current_epoch = 0
                self.throttled = races
            case PlugAction.LIMIT:
                self.limit_bytes = limit_bytes

    def statistics(self) -> PlugStatistics:
        return PlugStatistics(self.sent_bytes, self.held_bytes, len(self.packets), self.dropped)


class PlugKernel:
    """Ports `Links` and `Switches`; owns what outlives a holder."""

    def __init__(self, leave: Callable[[Packet], None]) -> None:
        self._leave = leave
        self.queues: dict[int, tuple[Ifb, Queue]] = {}
        self.aimed: dict[str, int] = {}
        self.ingress: set[str] = set()
        self._next_index = 1
        self.now = 0.0
        self.obeys = -1
        """So many messages of the next exchange are obeyed, then one is refused; -1: all are."""
        self.refuses_links = False
        self.loses_release = False
        self.is_stalled = False
        """Packets do not go on while somebody waits for them."""
        self.made_count = 0

    def is_bare(self) -> bool:
        """Nothing of a plug is there."""
        return not self.queues and not self.aimed and not self.ingress

    # --- the guest and the processors ---

    def send(self, packet: Packet) -> None:
        index = self.aimed.get(packet.tap)
        if index is None:
            self._leave(packet)
            return
        _, queue = self.queues[index]
        queue.enqueue(packet)
        self.serve(1, index)

    def serve(self, budget: int, index: int | None = None) -> None:
        """Let so many packets of each queue go on."""
        for number, (_, queue) in sorted(self.queues.items()):
            for _ in range(budget if index in (None, number) else 0):
                packet = queue.dequeue()
                if packet is None:
                    break
                self._leave(packet)

    def wait(self, seconds: float) -> None:
        self.now += seconds
        if not self.is_stalled:
            self.serve(2)

    # --- Switches ---

    def exchange(self, messages: Sequence[bytes]) -> list[PlugStatistics]:
        answers = []
        for message in messages:
            if self.obeys == 0:
                self.obeys = -1
                raise OSError(errno.ENOBUFS, "refused")
            self.obeys -= self.obeys > 0
            kind, index = struct.unpack_from("=H", message, 4)[0], message_interface(message)
            if index not in self.queues:
                raise OSError(errno.ENODEV, "no such interface")
            _, queue = self.queues[index]
            if kind != RTM_GETQDISC:
                action, limit_bytes = struct.unpack_from("=iI", message, len(message) - 8)
                queue.change(PlugAction(action), limit_bytes, loses=self.loses_release)
                self.loses_release = False
            answers.append(queue.statistics())
        return answers

    # --- Links ---

    def find(self, tap: str) -> Found:
        ours = sorted(ifb for ifb, _ in self.queues.values() if ifb.tap == tap)
        index = self.aimed.get(tap)
        if index is None:
            return Found((), None, tuple(ours))
        return Found(
            tuple(ifb for ifb in ours if ifb.index < index),
            self.queues[index][0],
            tuple(ifb for ifb in ours if ifb.index > index),
        )

    def prepare(self, tap: str) -> bool:
        self.ingress.add(tap)
        return True

    def make(self, tap: str, limit_bytes: int, *, is_ingress_ours: bool) -> Ifb:
        self._maybe_refuse()
        ifb = Ifb(self._next_index, f"ifb{self._next_index}", tap, None, is_ingress_ours)
        self._next_index += 1
        self.made_count += 1
        self.queues[ifb.index] = ifb, Queue(limit_bytes)
        return ifb

    def aim(self, tap: str, ifb: Ifb) -> None:
        self._maybe_refuse()
        assert ifb.index in self.queues
        self.aimed[tap] = ifb.index

    def release(self, tap: str) -> None:
        self._maybe_refuse()
        self.aimed.pop(tap, None)

    def delete(self, ifb: Ifb) -> None:
        assert ifb.index not in self.aimed.values(), "packets would be lost from here on"
        self.queues.pop(ifb.index, None)

    def restore(self, tap: str) -> None:
        assert tap not in self.aimed
        self.ingress.discard(tap)

    def clear(self, tap: str) -> None:
        self.aimed.pop(tap, None)
        self.ingress.discard(tap)
        for index in [i for i, (ifb, _) in self.queues.items() if ifb.tap == tap]:
            del self.queues[index]

    def close(self) -> None:
        """Nothing of the kernel's goes with a holder."""

    def _maybe_refuse(self) -> None:
        if self.refuses_links:
            self.refuses_links = False
            raise VirtualMachineFailed("refused")


def message_interface(message: bytes) -> int:
    return int(struct.unpack_from("=i", message, 20)[0])


class StillSense:
    """Port `Senses` of which only the state counts."""

    def __init__(self) -> None:
        self.has_come = True
        self.is_listening = True

    def fileno(self) -> int:
        return -1

    def open(self, taps: object) -> None:
        """The kernel of the model knows by itself who sends."""

    def drain(self) -> bool:
        return self.has_come

    def rest(self) -> None:
        self.is_listening = False

    def listen(self) -> None:
        self.is_listening = True

    def close(self) -> None:
        """Nothing is open."""
