"""A guest with two NICs, the holder of its output, and everybody outside, over the model kernel.

The oracle knows of each packet which checkpoint explains it: the first one captured whole after it
was sent. After every step nothing is outside that no acknowledged checkpoint explains, and what is
outside stands in the order in which it was sent, with no gap.
"""

from dataclasses import replace

from tests.property.network.plug_kernel import Packet, PlugKernel, StillSense

from holdfast_agent.core.failures import VirtualMachineFailed
from holdfast_agent.network.qdisc_plug import QdiscPlug

TAPS = ("tap0", "tap1")
LIMIT_BYTES = 1 << 30
EVERYTHING = 10_000


class Course:
    """What happens to one VM's output."""

    def __init__(self) -> None:
        self.outside: dict[str, list[Packet]] = {tap: [] for tap in TAPS}
        self.sent: dict[str, list[Packet]] = {tap: [] for tap in TAPS}
        self.kernel = PlugKernel(lambda packet: self.outside[packet.tap].append(packet))
        self.sense = StillSense()
        self.holding = False
        self.captured = self.acknowledged = 0
        self.plug = self.new_plug()
        self.plug.install()

    def new_plug(self) -> QdiscPlug:
        self.sense = StillSense()
        return QdiscPlug(
            TAPS,
            limit_bytes=LIMIT_BYTES,
            links=self.kernel,
            switches=self.kernel,
            sense=self.sense,
            wait=self.kernel.wait,
            now=lambda: self.kernel.now,
        )

    # --- the guest and the processors ---

    def send(self, counts: tuple[int, int]) -> None:
        for tap, count in zip(TAPS, counts, strict=True):
            for _ in range(count):
                epoch = self.captured + 1 if self.holding else 0
                packet = Packet(tap, len(self.sent[tap]), epoch)
                self.sent[tap].append(packet)
                self.kernel.send(packet)
        self.check()

    def serve(self, budget: int) -> None:
        self.kernel.serve(budget)
        self.check()

    def settle(self) -> None:
        """All that may leave leaves: it is exactly what is explained."""
        self.serve(EVERYTHING)
        for tap in TAPS:
            explained = [p for p in self.sent[tap] if p.epoch <= self.acknowledged]
            if not self.holding:
                explained = self.sent[tap]
            assert len(self.outside[tap]) == len(explained), "explained output waits"

    # --- epochs ---

    def hold(self) -> None:
        self.plug.hold()
        self.holding = True
        self.captured = self.acknowledged
        self.check()

    def capture(self, *, saves: bool = True, obeys: int = -1, refuses: bool = False) -> bool:
        """Capture an epoch; return whether it is whole."""
        self.kernel.obeys, self.kernel.refuses_links = obeys, refuses
        try:
            self.plug.close_epoch()
        except VirtualMachineFailed:
            saves = False
        self.kernel.obeys, self.kernel.refuses_links = -1, False
        if saves:
            self.captured += 1
        else:
            self.plug.reopen_epoch()
            self.plug.reopen_epoch()
        self.check()
        return saves

    def acknowledge(self, *, obeys: int = -1, loses: bool = False, stalls: bool = False) -> None:
        self.acknowledged = self.captured
        self.kernel.is_stalled = stalls
        self.kernel.obeys, self.kernel.loses_release = obeys, loses
        self.plug.release_one()
        self.kernel.obeys, self.kernel.loses_release = -1, False
        self.kernel.is_stalled = False
        self.check()

    # --- ends ---

    def release_all(self, *, loses: bool = False) -> None:
        self.acknowledged = self.captured = self.captured + 1
        self.holding = False
        self.kernel.loses_release = loses
        self.plug.release_all()
        self.kernel.loses_release = False
        self.settle()

    def replace_holder(self) -> None:
        """The holder dies; its heir finds what it left and has decided nothing yet."""
        self.plug.close()
        self.plug = self.new_plug()
        self.plug.install()
        assert self.plug.leftover_held == self.holding
        self.check()

    def inherit(self) -> None:
        """The heir holds: what nobody saw acknowledged is its first epoch."""
        self.captured = self.acknowledged
        for tap in TAPS:
            self.sent[tap] = [
                replace(p, epoch=min(p.epoch, self.captured + 1)) for p in self.sent[tap]
            ]
        self.hold()

    def take_out(self) -> None:
        self.plug.remove()
        assert self.kernel.is_bare()
        self.plug = self.new_plug()
        self.plug.install()

    # --- always ---

    def check(self) -> None:
        for tap in TAPS:
            numbers = [p.number for p in self.outside[tap]]
            assert numbers == list(range(len(numbers))), "packets overtook each other"
            left = self.sent[tap][: len(numbers)]
            early = [p for p in left if p.epoch > self.acknowledged]
            assert not early, f"{early} left, acknowledged is {self.acknowledged}"
