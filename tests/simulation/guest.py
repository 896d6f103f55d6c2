"""A guest whose every packet depends on all it ever did, and the QEMU that it lives in.

Each packet ends a *chain*: a digest of the chain before, the packet's content and all the work done
so far. Page 0 has the length and the end of the chain, so a memory of another moment, or registers
of another, say something else from then on. All chains that any copy ever made are kept in one
`History` of the VM; what the outside heard must be one path of it.

The VM may have a disk. It is local to its host, nothing replicates it, and the guest remembers in
memory how much it wrote: whoever continues elsewhere finds an empty one.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.scenarios.guest import DEVICE_PAGE, PAGE_COUNT, Packet, SimulatedVm
from tests.scenarios.plug import SimulatedPlug
from tests.scenarios.simulation import MS
from tests.simulation.kernel import Kernel, RuleBroken

BOOT_PAGES = 24
PACKETS_FIRST_PAGE = 1
PACKET_PAGES = 8
WORK_FIRST_PAGE = 40
DISK_PAGE = 39
TICK_NS_MIN = 10 * MS
TICK_NS_MAX = 160 * MS


@dataclass(frozen=True)
class Link:
    """One packet in the tree of all histories."""

    before: str
    index: int


@dataclass
class History:
    """Everything that copies of one VM ever said, and what the outside heard of it."""

    vm: str
    links: dict[str, Link] = field(default_factory=dict)
    heard: str = ""
    """The newest chain that was heard."""
    heard_count: int = 0

    def begin(self, incarnation: int) -> str:
        """Start anew: an operator boots the VM again after it was lost."""
        root = f"root-{incarnation}"
        self.links[root] = Link("", 0)
        self.heard = root
        return root

    def extend(self, chain: str, index: int, content: str) -> str:
        digest = hashlib.blake2b(f"{chain} {index} {content}".encode(), digest_size=8).hexdigest()
        self.links[digest] = Link(chain, index)
        return digest

    def hear(self, chain: str, host: str) -> None:
        """Take a packet that left; it must be of the one history that was heard so far."""
        self.heard_count += 1
        if self.descends(chain, self.heard):
            self.heard = chain
        elif not self.descends(self.heard, chain):
            raise RuleBroken(
                f"INV-2: packet {self.links[chain].index} of {self.vm}, from {host}, contradicts "
                f"packet {self.links[self.heard].index}, which was heard before"
            )

    def descends(self, chain: str, ancestor: str) -> bool:
        """Whether `chain` is `ancestor` or comes after it."""
        index = self.links[ancestor].index
        while self.links[chain].index > index:
            chain = self.links[chain].before
        return chain == ancestor


class GuestVm(SimulatedVm):
    """The VM of `tests/scenarios` with a guest that talks by itself."""

    def __init__(
        self,
        kernel: Kernel,
        host: str,
        nic: Callable[[Packet], None],
        history: History,
        talks: float,
    ) -> None:
        super().__init__(kernel, host, nic)
        self.kernel = kernel
        self.history = history
        self.has_disk = False
        self.disk_writes = 0
        self.on_kill: Callable[[], None] = lambda: None
        self._talks = talks

    def start(self, root: str) -> None:
        """Switch the machine on for the first time."""
        for page in range(PAGE_COUNT - BOOT_PAGES, PAGE_COUNT):
            self._write(page, f"page {page} of {root}")
        self._write(0, f"0 {root}")
        self.boot()

    def boot(self) -> None:
        self.is_running = True
        self._tick()

    def chain(self) -> tuple[int, str]:
        """Return how many packets were sent and the chain they end in."""
        count, chain = self.text_of(0).split()
        return int(count), chain

    @property
    def packet_count(self) -> int:
        return int(self.text_of(0).partition(" ")[0] or 0)

    def _tick(self) -> None:
        if not self.is_alive:
            return
        if self.is_running:
            self.work += 1
            page = WORK_FIRST_PAGE + self.work % (DEVICE_PAGE - WORK_FIRST_PAGE)
            self._write(page, str(self.work))
            if self.has_disk:
                self.disk_writes += 1
                self._write(DISK_PAGE, str(self.disk_writes))
            if self.kernel.chance(self._talks):
                self.say(f"work {self.work}")
        self.kernel.after(self.kernel.between_ns(TICK_NS_MIN, TICK_NS_MAX), self._tick)

    def _speak(self) -> None:
        while self._waiting and self.is_running and self.is_alive:
            count, before = self.chain()
            text = f"{self._waiting.popleft()} after {self.work}"
            chain = self.history.extend(before, count + 1, text)
            self._write(PACKETS_FIRST_PAGE + (count + 1) % PACKET_PAGES, text)
            self._write(0, f"{count + 1} {chain}")
            self.nic(Packet(count + 1, chain))

    def disk_of_memory(self) -> int:
        """Return how many disk writes the guest remembers."""
        return int(self.text_of(DISK_PAGE) or 0) if self.has_disk else 0

    def resume_if_ours(self) -> None:
        """Let a guest run that a worker left standing when it died."""
        if not self.is_running and not self.has_shut_down:
            self.resume()

    def kill(self) -> None:
        """End QEMU on the product's behalf; the rules judge whether it may."""
        if self.is_alive:
            self.on_kill()
        super().kill()


class TrackedPlug(SimulatedPlug):
    """The plug of `tests/scenarios`, which tells the rules what leaves, and why."""

    def __init__(self, kernel: Kernel, host: str) -> None:
        super().__init__(kernel, host, self._leaves)
        self._kernel = kernel
        self.epoch = 0
        """The epoch closed last, counted as the captures are."""
        self.is_releasing_one = False
        self.on_leave: Callable[[Packet], None] = lambda _: None
        self.on_release_one: Callable[[int], None] = lambda _: None
        self.on_hold: Callable[[], None] = lambda: None

    def _leaves(self, packet: Packet) -> None:
        self.on_leave(packet)

    def hold(self) -> None:
        self._kernel.hesitate()
        super().hold()
        self.epoch = 0
        self.on_hold()

    def close_epoch(self) -> None:
        self._kernel.hesitate()
        if not self.is_holding:
            raise RuleBroken("INV-7: captured before output was held")
        super().close_epoch()
        self.epoch += 1

    def reopen_epoch(self) -> None:
        self.epoch -= self._closed is not None
        super().reopen_epoch()

    def release_one(self) -> None:
        self._kernel.hesitate()
        if self._closed is None:
            raise RuleBroken("INV-2: an epoch was released twice, or none was closed")
        self.on_release_one(self.epoch)
        self.is_releasing_one = True
        super().release_one()
        self.is_releasing_one = False
        self._kernel.hesitate()

    def release_all(self) -> None:
        self._kernel.hesitate()
        super().release_all()

    @property
    def left_something(self) -> bool:
        """A worker that died has left output held."""
        return self.is_holding or self.is_walled
