"""What faults of one episode leave of a VM: whether it may be lost, by the rules of the game. Pure.

A protected VM exists twice, so it outlives whatever happens to one of its two hosts, and whatever
happens to the control plane. It may be lost when something was *destroyed* (power, QEMU, the worker
with the last checkpoint) and a second host of its own was *disturbed* in the same episode: whoever
was slow may just have lost the claim to the one that is destroyed then.

Theory of operation: an episode begins with all VMs protected and ends when all are, or are lost.
Between, a VM may have moved: after the first disturbance every host may be one of its two.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Standing:
    """What was done to one VM in this episode."""

    pair: tuple[str, ...] = ()
    """The hosts that it exists on, as of the last look."""
    disturbed: set[str] = field(default_factory=set)
    is_destroyed: bool = False
    """Something of it was."""
    was_alone: bool = False
    """It existed once only when something of it was destroyed."""

    def look(self, hosts: Iterable[str]) -> None:
        """Note where the VM exists at this moment: two hosts while it is protected."""
        self.pair = tuple(hosts)

    def act(self, host: str, *, destroys: bool) -> None:
        """Note what is about to be done to a host, or to this VM on it."""
        if host not in self.pair and not self.disturbed:
            return
        self.disturbed.add(host)
        if destroys:
            self.is_destroyed = True
            self.was_alone |= len(self.pair) < 2

    @property
    def may_be_lost(self) -> bool:
        """Whether nobody can demand that it lives on."""
        return self.was_alone or (self.is_destroyed and len(self.disturbed) > 1)
