"""One replication connection, as it passes the wire: both directions, frame by frame. Pure.

Begins with the SYN. What was joined in the middle or lost track is *blind*: it is remembered, so
that it is counted once, and nothing is concluded from it.
"""

import json
from typing import Protocol

from tests.chaos.evidence import Link
from tests.chaos.packets import ACK, FIN, RST, SYN, Segment
from tests.chaos.streams import FrameWalker, LostTrack, Reassembly, SeenFrame

from holdfast_agent.core.frames import FrameKind
from holdfast_api.words import Role

FREEING_FAREWELLS = frozenset({"released", "guest-ended"})


class Listener(Protocol):
    """Who is told what a connection says."""

    def greeted(self, link: Link) -> None:
        """A HELLO has passed."""

    def began(self, link: Link, frame: SeenFrame) -> None:
        """The header of a frame of an epoch has passed."""

    def acknowledged(self, link: Link, epoch: int) -> None:
        """An ACKNOWLEDGE has passed."""

    def freed(self, link: Link) -> None:
        """The primary bade farewell and goes on without its backup."""


class Connection:
    """Follows one connection from its SYN on."""

    def __init__(self, primary: str, opened: Segment | None, listener: Listener) -> None:
        """Begin with the primary's SYN, or with None: blind."""
        self.primary = primary
        self.link: Link | None = None
        self.is_blind = opened is None
        self.is_over = False
        self._listener = listener
        self._opened_at = None if opened is None else opened.sequence
        self._to_backup: Reassembly | None = None
        self._to_primary: Reassembly | None = None
        if opened is not None:
            walker = FrameWalker(Role.PRIMARY, self._primary_begins, self._primary_ends)
            self._to_backup = Reassembly(opened.sequence + 1, walker.take)

    def was_opened_by(self, segment: Segment) -> bool:
        """Return whether this SYN is the one that opened this connection, perhaps again."""
        return self._opened_at == segment.sequence

    def hear(self, segment: Segment, *, to_backup: bool) -> None:
        """See a segment of either side. Raises LostTrack; the caller calls `go_blind` then."""
        if segment.flags & (FIN | RST):
            self.is_over = True
        if self.is_blind or segment.flags & RST:
            return
        if segment.flags & SYN:
            if not to_backup and segment.flags & ACK and self._to_primary is None:
                walker = FrameWalker(Role.BACKUP, _nothing, self._backup_ends)
                self._to_primary = Reassembly(segment.sequence + 1, walker.take)
            return
        if not len(segment.payload):
            return
        direction = self._to_backup if to_backup else self._to_primary
        if direction is None:
            raise LostTrack("it answers and was not accepted")
        direction.add(segment.sequence, segment.payload)

    def go_blind(self) -> None:
        """Conclude nothing more from this connection."""
        self.is_blind = True
        self._to_backup = self._to_primary = None

    def _primary_begins(self, frame: SeenFrame) -> None:
        if frame.kind is FrameKind.HELLO:
            return
        link = self._known(frame)
        if frame.kind in (FrameKind.PAGES, FrameKind.CHECKPOINT):
            self._listener.began(link, frame)

    def _primary_ends(self, frame: SeenFrame, payload: bytes) -> None:
        if frame.kind is FrameKind.HELLO:
            self.link = _read_hello(payload)
            self._listener.greeted(self.link)
            return
        link = self._known(frame)
        if frame.kind is FrameKind.CHECKPOINT:
            link.whole = max(link.whole, frame.epoch)
        if frame.kind is FrameKind.FAREWELL and _code(payload) in FREEING_FAREWELLS:
            self._listener.freed(link)

    def _backup_ends(self, frame: SeenFrame, _: bytes) -> None:
        if frame.kind is not FrameKind.ACKNOWLEDGE:
            return
        if self._to_backup is None or self._to_backup.has_gap:
            raise LostTrack("an acknowledgement of what was not seen")
        self._listener.acknowledged(self._known(frame), frame.epoch)

    def _known(self, frame: SeenFrame) -> Link:
        if self.link is None or self.link.generation != frame.generation:
            raise LostTrack(f"{frame.kind.name} of generation {frame.generation}")
        return self.link


def _nothing(_: SeenFrame) -> None:
    """Take no notice."""


def _read_hello(payload: bytes) -> Link:
    """Return what a HELLO says. Raises LostTrack."""
    hello = _object(payload)
    names = [hello.get(name) for name in ("vm", "primary", "backup")]
    generation = hello.get("generation")
    if not isinstance(generation, int) or not all(isinstance(name, str) for name in names):
        raise LostTrack(f"a HELLO that is none: {payload[:80]!r}")
    vm, primary, backup = map(str, names)
    return Link(vm, generation, primary, backup)


def _code(payload: bytes) -> object:
    return _object(payload).get("code")


def _object(payload: bytes) -> dict[str, object]:
    try:
        document = json.loads(payload)
    except ValueError as error:
        raise LostTrack(f"not JSON: {payload[:80]!r}") from error
    return document if isinstance(document, dict) else {}
