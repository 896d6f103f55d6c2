"""What the wire has shown about the protections of one VM: connections, epochs, who owns it. Pure.

A *link* is one replication connection, as its HELLO describes it. A host is *bound* by a link from
the first acknowledgement on it: from then on its output waits for acknowledgements. Nothing that
happens to the connection unbinds it, neither its end nor another connection; only

* a controller's answer to that host that shows it as primary of a newer generation: its claim was
  won, or it was ordered to go on alone. The answer to the claim may be lost and the order come
  first, in a heartbeat's answer; so both count, and both pass the wire before anything is let go;
* a FAREWELL `released` or `guest-ended` of that host on that link, which says the same.

So a bound host that says too much is found out also when its backup is dead, when its connection
has ended, and when another host has taken over.
"""

from dataclasses import dataclass, field

LINKS_MAX = 32
OWNERS_MAX = 64
EPOCHS_BEGUN_MAX = 8


@dataclass
class Link:
    """A replication connection whose HELLO was understood."""

    vm: str
    generation: int
    primary: str
    backup: str
    begun: dict[int, int] = field(default_factory=dict)
    """Epochs not acknowledged yet, and as which packet the first frame of each passed."""
    whole: int = 0
    """The newest epoch whose CHECKPOINT has passed to its last byte."""
    acknowledged: int = 0
    covered_at: int = 0
    """As which packet the newest acknowledged epoch began to pass."""
    is_free: bool = False
    """Its primary may go on without it."""

    def begin(self, epoch: int, now: int) -> None:
        """Note the first frame of an epoch, which leaves after the capture is complete."""
        if epoch > self.acknowledged and len(self.begun) < EPOCHS_BEGUN_MAX:
            self.begun.setdefault(epoch, now)

    def acknowledge(self, epoch: int) -> str | None:
        """Note an acknowledgement; return what is wrong with it."""
        if epoch != self.acknowledged + 1 or epoch > self.whole or epoch not in self.begun:
            return (
                f"{self.backup} acknowledged epoch {epoch} of {self.vm} in generation "
                f"{self.generation}; acknowledged was {self.acknowledged}, and whole on the wire "
                f"was {self.whole}"
            )
        self.acknowledged = epoch
        self.covered_at = self.begun[epoch]
        self.begun = {other: at for other, at in self.begun.items() if other > epoch}
        return None


@dataclass(frozen=True)
class Route:
    """How a VM may have come from one host to another."""

    generation: int
    """The one in which it arrived."""
    claim_seen: bool


class VmEvidence:
    """Everything seen about one VM; bounded."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self.links: dict[int, Link] = {}
        self.owners: dict[int, str] = {}
        """The primary of each generation, from the controllers' answers."""
        self.claims: set[int] = set()
        """Generations that were won by a claim."""
        self.bound: dict[str, Link] = {}
        self.is_unsure = False
        """A connection of it could not be followed, and no newer one has begun."""

    @property
    def newest_generation(self) -> int:
        """The newest generation that was seen anywhere."""
        return max(max(self.links, default=0), max(self.owners, default=0))

    def greet(self, link: Link) -> None:
        """Note a HELLO; a second one in a generation takes the first one's place."""
        newest = self._newest_of(link.primary)
        link.is_free = newest > link.generation
        self.links[link.generation] = link
        self.is_unsure = False
        while len(self.links) > LINKS_MAX:
            del self.links[min(self.links)]

    def acknowledge(self, link: Link, epoch: int) -> str | None:
        """Note an acknowledgement; return what is wrong with it. It binds the primary."""
        wrong = link.acknowledge(epoch)
        if wrong is None and not link.is_free:
            before = self.bound.get(link.primary)
            if before is None or before.generation <= link.generation:
                self.bound[link.primary] = link
        return wrong

    def own(self, host: str, generation: int, *, is_told: bool) -> None:
        """Note that a host is primary of a generation; `is_told` if that host itself was told."""
        self.owners[generation] = host
        while len(self.owners) > OWNERS_MAX:
            del self.owners[min(self.owners)]
        if not is_told:
            return
        for link in self.links.values():
            if link.primary == host and link.generation < generation:
                self.free(link)

    def win(self, host: str, generation: int) -> bool:
        """Note a claim that won this generation; return whether it is news."""
        self.owners[generation] = host
        if generation in self.claims:
            return False
        self.claims.add(generation)
        self.claims &= set(self.owners)
        return True

    def free(self, link: Link) -> None:
        """Let the primary of a link go on without it."""
        link.is_free = True
        if self.bound.get(link.primary) is link:
            del self.bound[link.primary]

    def begin_anew(self) -> None:
        """The VM was started anew: what bound its former life does not bind this one."""
        self.bound.clear()
        for link in self.links.values():
            link.is_free = True

    def lose_track(self, link: Link | None = None) -> None:
        """Bind nobody (or not by this link): what follows would be judged by half of it."""
        self.is_unsure = True
        for each in [link] if link is not None else list(self.bound.values()):
            self.free(each)

    def route(self, start: str, generation: int, target: str) -> Route | None:
        """Return how `target` may be the VM's host, if `start` was since `generation`.

        Over one link or several, each newer than the one before, acknowledged, and not won by
        somebody else: a host on the way may have died before its guest said a word.
        """
        reached = {start: Route(generation, claim_seen=True)}
        for link in sorted(self.links.values(), key=lambda each: each.generation):
            before = reached.get(link.primary)
            if before is None or not link.acknowledged or link.generation <= before.generation:
                continue
            owner = self.owners.get(link.generation + 1)
            if owner not in (None, link.backup):
                continue
            seen = before.claim_seen and owner is not None
            known = reached.get(link.backup)
            if seen or known is None or not known.claim_seen or link.backup == start:
                reached[link.backup] = Route(link.generation + 1, seen)
        return reached.get(target)

    def _newest_of(self, host: str) -> int:
        return max((each for each, owner in self.owners.items() if owner == host), default=0)
