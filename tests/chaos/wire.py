"""The rules over what passes the lab's switch: who speaks for a guest, and what it may say. Pure.

`Wire.see` is called for each frame that enters the switch, in order. Order is all it needs: what
depends on something passes later than that, as the hosts share nothing but this switch. A frame
that a cut makes vanish behind its port was seen; that makes rules milder, never wrong.

**R1, one speaker.** A guest's address speaks from one host at a time. It may move from X to Y if
the wire has shown an acknowledged link from X to Y (`evidence.py`) newer than the generation in
which X began to speak, whose next generation nobody but Y is known to have won; or a chain of such
links. A move whose claim was not seen is counted. What X still says later is *late* if it is a TCP
packet that depends on nothing beyond X's last acknowledged epoch: X's worker or QEMU may have been
stopped between the acknowledgement and the tap, and all of that is in the state from which Y went
on. That is counted and bounded; anything else from X is a violation.

**R2, output commit.** Each packet of a guest's flow carries how much of its client's bytes the
guest had heard. The newest of those passed the switch as packet t0. While the host is bound, an
epoch must have been acknowledged whose first frame passed after t0: an epoch's frames leave after
its capture, so a request that passed after the first of them can not be part of it. Why this is
never wrong: request before guest, guest before capture, capture before the first frame, all frames
before the acknowledgement, acknowledgement before release, each over this switch or within a host.
Pure acknowledgements are judged too: a client that was told "received" never sends again. And no
epoch is acknowledged before its CHECKPOINT frame has passed whole.

**R3, the stream never contradicts itself**: see `flows.py`.

**R4, the dead are silent**: nothing comes from an address declared lost.

What can not be judged is counted and never a violation: connections joined in the middle, frames
the kernel dropped (`lose_track`: everything about present streams is forgotten, and R1 and R2 begin
again with the next connection of each VM).

Source: docs/invariants.md, INV-1, INV-2, INV-4.
"""

import json
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tests.chaos.evidence import Link, VmEvidence
from tests.chaos.flows import GuestFlow
from tests.chaos.packets import (
    ACK,
    FIN,
    RST,
    SYN,
    Packet,
    Segment,
    host_of,
    is_guest,
    numbered,
    read_packet,
    spelled,
)
from tests.chaos.replication import Connection
from tests.chaos.streams import ANSWER_BEGINS, AnswerWalker, LostTrack, Reassembly, SeenFrame

from holdfast_agent.core.frames import FrameKind
from holdfast_lab.clients import REDIS_PORT
from holdfast_lab.services import CONTROLLER_PORT, PEER_PORT

VIOLATIONS_KEPT = 200
GUESTS_MAX = 1024
FLOWS_MAX = 512
CONNECTIONS_MAX = 256
ANSWERS_MAX = 512
VMS_MAX = 256
LATE_PACKETS_MAX = 256
"""Of one host after one change: far more than two epochs of a few clients hold."""

COUNTED = (
    "packets",
    "guest packets",
    "guest packets overtaken",
    "replies checked",
    "replies outside of protection",
    "replies unchecked",
    "replies of unnamed guests",
    "checkpoints",
    "acknowledgements",
    "connections",
    "connections not followed",
    "claims won",
    "speaker changes",
    "speaker changes without a claim seen",
    "speaker changes unchecked",
    "late packets",
    "times track was lost",
    "violations",
)

Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass
class _Guest:
    """One address of a guest."""

    vm: str | None = None
    speaker: str | None = None
    since: int = 0
    """The generation in which the speaker became it."""
    late: dict[str, int] = field(default_factory=dict)
    """Hosts that spoke before, and how many late packets came from each."""
    is_lost: bool = False


class Wire:
    """What has passed, judged. Everything in it is bounded."""

    def __init__(self) -> None:
        """Nothing has passed yet."""
        self.violations: list[str] = []
        """The first ones, as sentences; the summary has the number of all."""
        self._counts: Counter[str] = Counter()
        self._now = 0
        self._guests: OrderedDict[int, _Guest] = OrderedDict()
        self._vms: OrderedDict[str, VmEvidence] = OrderedDict()
        self._flows: OrderedDict[tuple[int, int, int], GuestFlow] = OrderedDict()
        self._connections: OrderedDict[tuple[int, int, int], Connection] = OrderedDict()
        self._answers: OrderedDict[tuple[int, int, int], Reassembly] = OrderedDict()

    # --- what the owner says ----------------------------------------------------------------------

    def name_guest(self, address: str, vm: str) -> None:
        """Say which VM speaks with this address; a new address of a VM is a new life of it."""
        guest = self._guest(numbered(address))
        if guest.vm == vm:
            return
        guest.vm = vm
        evidence = self._evidence(vm)
        evidence.begin_anew()
        guest.since = evidence.newest_generation

    def declare_lost(self, address: str) -> None:
        """Say that the VM behind this address is lost: nothing may come from it any more."""
        self._guest(numbered(address)).is_lost = True

    def lose_track(self) -> None:
        """Say that frames were missed: what is known of present streams can not be trusted."""
        self._counts["times track was lost"] += 1
        for connection in self._connections.values():
            self._stop_following(connection)
        for evidence in self._vms.values():
            evidence.lose_track()
        self._answers.clear()
        self._flows.clear()

    def summary(self) -> dict[str, int]:
        """Return all counts."""
        return {name: self._counts[name] for name in COUNTED}

    # --- what passes ------------------------------------------------------------------------------

    def see(self, interface: str, frame: bytes | memoryview) -> None:
        """See the next frame that enters the switch, at this port."""
        self._now += 1
        self._counts["packets"] += 1
        packet = read_packet(frame)
        if packet is None:
            return
        if is_guest(packet.source):
            self._hear_guest(interface, packet)
            return
        segment = packet.segment
        if segment is None:
            return
        if is_guest(packet.destination):
            if segment.destination_port == REDIS_PORT:
                self._ask_guest(packet, segment)
        elif PEER_PORT in (segment.destination_port, segment.source_port):
            self._hear_replication(packet, segment)
        elif segment.source_port == CONTROLLER_PORT:
            self._hear_controller(packet, segment)

    def _violated(self, rule: str, sentence: str) -> None:
        self._counts["violations"] += 1
        if len(self.violations) < VIOLATIONS_KEPT:
            self.violations.append(f"{rule}: {sentence} (packet {self._now})")

    def _guest(self, address: int) -> _Guest:
        return _touched(self._guests, address, _Guest(), GUESTS_MAX)

    def _evidence(self, vm: str) -> VmEvidence:
        return _touched(self._vms, vm, VmEvidence(), VMS_MAX)

    # --- guests and their clients -----------------------------------------------------------------

    def _ask_guest(self, packet: Packet, segment: Segment) -> None:
        key = (packet.source, segment.source_port, packet.destination)
        flow = self._flows.get(key)
        opens = segment.flags & (SYN | ACK) == SYN
        if flow is None or (opens and flow.client_began != segment.sequence):
            flow = GuestFlow(segment if opens else None)
            self._flows.pop(key, None)
        _touched(self._flows, key, flow, FLOWS_MAX).ask(segment, self._now)

    def _hear_guest(self, interface: str, packet: Packet) -> None:
        self._counts["guest packets"] += 1
        guest = self._guest(packet.source)
        if guest.is_lost:
            self._violated("R4", f"{self._name(packet)} is lost and spoke from {interface}")
            return
        segment, flow = packet.segment, None
        if segment is not None and segment.source_port == REDIS_PORT:
            key = (packet.destination, segment.destination_port, packet.source)
            flow = _touched(self._flows, key, GuestFlow(), FLOWS_MAX)
        heard_at = 0 if flow is None or segment is None else flow.heard_at(segment)
        if not self._may_speak(guest, interface, packet, heard_at if flow is not None else None):
            return
        if flow is None or segment is None:
            return
        said = flow.say(segment, interface, is_late=interface != guest.speaker)
        self._counts["guest packets overtaken"] += said.overtaken
        if said.contradiction is not None:
            self._violated(
                "R3",
                f"{self._name(packet)} on {interface} contradicts itself: {said.contradiction}; "
                f"{_spelled_segment(packet, segment)}",
            )
        self._check_commit(guest, interface, packet, heard_at, is_new=said.is_new)

    def _check_commit(
        self, guest: _Guest, interface: str, packet: Packet, heard_at: int, *, is_new: bool
    ) -> None:
        evidence = self._vms.get(guest.vm or "")
        if evidence is None:
            self._counts["replies of unnamed guests"] += is_new
            return
        link = evidence.bound.get(interface)
        if link is None:
            unsure = evidence.is_unsure or self._has_blind(interface)
            kind = "replies unchecked" if unsure else "replies outside of protection"
            self._counts[kind] += is_new
            return
        self._counts["replies checked"] += is_new
        if heard_at > link.covered_at:
            assert packet.segment is not None
            self._violated(
                "R2",
                f"{self._name(packet)} on {interface} in generation {link.generation} answered "
                f"what passed as packet {heard_at}, but epoch {link.acknowledged}, the newest one "
                f"acknowledged by {link.backup}, began with packet {link.covered_at}; "
                f"{_spelled_segment(packet, packet.segment)}",
            )

    def _may_speak(
        self, guest: _Guest, interface: str, packet: Packet, heard_at: int | None
    ) -> bool:
        """R1. `heard_at` is None for what can not be judged by R2."""
        if guest.speaker is None:
            guest.speaker = interface
        if interface == guest.speaker:
            return True
        evidence = self._vms.get(guest.vm or "")
        if evidence is None:
            return self._change_unchecked(guest, interface, guest.since)
        route = evidence.route(guest.speaker, guest.since, interface)
        certain = route is not None and route.claim_seen
        if not certain and self._is_late(guest, evidence, interface, heard_at):
            return True
        if route is not None:
            self._change_speaker(guest, interface, route.generation)
            self._counts["speaker changes without a claim seen"] += not route.claim_seen
            link = evidence.bound.get(interface)
            if link is not None and link.generation < route.generation:
                evidence.free(link)
            return True
        if evidence.is_unsure or self._has_blind(guest.speaker):
            return self._change_unchecked(guest, interface, evidence.newest_generation)
        self._violated(
            "R1",
            f"{self._name(packet)} spoke from {interface}; {guest.speaker} speaks for it since "
            f"generation {guest.since}, and nothing showed that it went to {interface}",
        )
        return False

    def _is_late(
        self, guest: _Guest, evidence: VmEvidence, interface: str, heard_at: int | None
    ) -> bool:
        if interface not in guest.late or heard_at is None:
            return False
        if guest.late[interface] >= LATE_PACKETS_MAX:
            return False
        link = evidence.bound.get(interface)
        if link is None and not evidence.is_unsure:
            return False
        if link is not None and heard_at > link.covered_at:
            return False
        guest.late[interface] += 1
        self._counts["late packets"] += 1
        return True

    def _change_speaker(self, guest: _Guest, interface: str, generation: int) -> None:
        assert guest.speaker is not None
        self._counts["speaker changes"] += 1
        guest.late[guest.speaker] = 0
        guest.speaker, guest.since = interface, generation

    def _change_unchecked(self, guest: _Guest, interface: str, generation: int) -> bool:
        self._counts["speaker changes unchecked"] += 1
        self._change_speaker(guest, interface, generation)
        return True

    def _name(self, packet: Packet) -> str:
        vm = self._guests[packet.source].vm
        return f"{vm or 'a guest'} ({spelled(packet.source)})"

    # --- replication ------------------------------------------------------------------------------

    def _hear_replication(self, packet: Packet, segment: Segment) -> None:
        to_backup = segment.destination_port == PEER_PORT
        primary, backup = packet.source, packet.destination
        port = segment.source_port
        if not to_backup:
            primary, backup, port = backup, primary, segment.destination_port
        key = (primary, port, backup)
        connection = self._connections.get(key)
        opens = to_backup and segment.flags & (SYN | ACK) == SYN
        if opens and (connection is None or not connection.was_opened_by(segment)):
            self._connections.pop(key, None)
            connection = Connection(host_of(primary) or "", segment, self)
        elif connection is None:
            if segment.flags & (FIN | RST):
                return  # the last words of one that was refused, or is forgotten
            connection = Connection(host_of(primary) or "", None, self)
            self._counts["connections not followed"] += 1
        _touched(self._connections, key, connection, CONNECTIONS_MAX)
        try:
            connection.hear(segment, to_backup=to_backup)
        except LostTrack:
            self._stop_following(connection)

    def _stop_following(self, connection: Connection) -> None:
        if connection.is_blind or connection.is_over:
            return
        self._counts["connections not followed"] += 1
        connection.go_blind()
        if connection.link is not None:
            self._evidence(connection.link.vm).lose_track(connection.link)

    def _has_blind(self, primary: str) -> bool:
        """Return whether a connection of this primary is open of which nothing is known."""
        return any(
            each.primary == primary and each.is_blind and not each.is_over and each.link is None
            for each in self._connections.values()
        )

    def greeted(self, link: Link) -> None:
        """Note a HELLO."""
        self._counts["connections"] += 1
        self._evidence(link.vm).greet(link)

    def began(self, link: Link, frame: SeenFrame) -> None:
        """Note a frame of an epoch."""
        self._counts["checkpoints"] += frame.kind is FrameKind.CHECKPOINT
        link.begin(frame.epoch, self._now)

    def acknowledged(self, link: Link, epoch: int) -> None:
        """Note an acknowledgement."""
        self._counts["acknowledgements"] += 1
        wrong = self._evidence(link.vm).acknowledge(link, epoch)
        if wrong is not None:
            self._violated("R2", wrong)

    def freed(self, link: Link) -> None:
        """Note that a primary said that it goes on alone."""
        self._evidence(link.vm).free(link)

    # --- controllers ------------------------------------------------------------------------------

    def _hear_controller(self, packet: Packet, segment: Segment) -> None:
        host = host_of(packet.destination)
        if host is None:
            return
        key = (packet.source, packet.destination, segment.destination_port)
        stream = self._answers.get(key)
        if segment.flags & (SYN | RST):
            self._answers.pop(key, None)
            if segment.flags & SYN:
                stream = self._answers_from(segment.sequence + 1, host)
                _touched(self._answers, key, stream, ANSWERS_MAX)
            return
        if not len(segment.payload):
            return
        if stream is None:
            # Connections are kept for a long time: begin with any answer.
            if segment.payload[: len(ANSWER_BEGINS)] != ANSWER_BEGINS:
                return
            stream = self._answers_from(segment.sequence, host)
        _touched(self._answers, key, stream, ANSWERS_MAX)
        try:
            stream.add(segment.sequence, segment.payload)
        except LostTrack:
            del self._answers[key]

    def _answers_from(self, sequence: int, host: str) -> Reassembly:
        return Reassembly(sequence, AnswerWalker(lambda body: self._read_answer(host, body)).take)

    def _read_answer(self, host: str, body: bytes) -> None:
        if b'"won"' not in body and b'"assignments"' not in body:
            return
        try:
            answer = json.loads(body)
            if "won" in answer:
                self._read_verdict(host, answer)
            for assignment in answer.get("assignments", ()):
                if assignment["role"] == "primary":
                    evidence = self._evidence(assignment["vm"])
                    evidence.own(host, int(assignment["generation"]), is_told=True)
        except (ValueError, KeyError, TypeError, AttributeError):
            return  # no answer of ours: what it may have been is not known

    def _read_verdict(self, host: str, verdict: dict[str, Any]) -> None:
        record = verdict["record"]
        if record is None:
            return
        evidence = self._evidence(record["vm"])
        primary, generation = record["primary"], int(record["generation"])
        evidence.own(primary, generation, is_told=host == primary)
        stamp = record["claimed"]
        if verdict["won"] and stamp is not None:
            self._counts["claims won"] += evidence.win(stamp["host"], int(stamp["generation"]))


def _touched(table: OrderedDict[Key, Value], key: Key, new: Value, limit: int) -> Value:
    """Return the entry, or `new` as the entry, as the newest one; the oldest give way."""
    value = table.setdefault(key, new)
    table.move_to_end(key)
    while len(table) > limit:
        table.popitem(last=False)
    return value


def _spelled_segment(packet: Packet, segment: Segment) -> str:
    return (
        f"to {spelled(packet.destination)}:{segment.destination_port}, sequence "
        f"{segment.sequence}, {len(segment.payload)} bytes, acknowledges {segment.acknowledgement}"
    )
