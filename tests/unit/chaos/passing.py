"""Frames as they pass a switch, made by hand: of hosts, a controller, a guest and a client.

Everything that a test lets happen is one call; what passes goes into a `Wire` at once.
"""

import json
import struct
from ipaddress import IPv4Address
from typing import Any

from tests.chaos.packets import ACK, FIN, RST, SYN
from tests.chaos.wire import Wire

from holdfast_agent.core.frames import FrameEncoder, FrameKind, Part
from holdfast_agent.core.payloads import Hello, PagesTally, Welcome, encode_checkpoint
from holdfast_agent.core.preface import Preface, encode_preface
from holdfast_api.messages import Assignment, Assignments, ClaimVerdict
from holdfast_api.records import ClaimStamp, Policy, ProtectionRecord
from holdfast_api.words import Phase, Role
from holdfast_lab.network import guest_address, party_address
from holdfast_lab.services import CONTROLLER_PORT, PEER_PORT

__all__ = ["ACK", "FIN", "RST", "SYN"]

GUEST = guest_address(1, 0)
CLIENT = party_address("client")
VM = "vm"
WRAP = 1 << 32


def ip_frame(
    source: str,
    destination: str,
    payload: bytes,
    *,
    protocol: int = 6,
    padding: int = 0,
    fragment: int = 0x4000,
) -> bytes:
    """Return an Ethernet frame with an IPv4 packet."""
    head = struct.pack(
        "!BBHHHBBHII",
        0x45, 0, 20 + len(payload), 0, fragment, 64, protocol, 0,
        int(IPv4Address(source)), int(IPv4Address(destination)),
    )  # fmt: skip
    return bytes(12) + b"\x08\x00" + head + payload + bytes(padding)


def arp_frame(sender: str) -> bytes:
    """Return an ARP request of this sender."""
    body = struct.pack("!HHBBH6sI6sI", 1, 0x0800, 6, 4, 1, bytes(6), int(IPv4Address(sender)),
                       bytes(6), 0)  # fmt: skip
    return b"\xff" * 6 + bytes(6) + b"\x08\x06" + body + bytes(18)


def tcp_frame(
    source: tuple[str, int],
    destination: tuple[str, int],
    sequence: int,
    acknowledgement: int,
    *,
    flags: int = ACK,
    payload: bytes = b"",
) -> bytes:
    """Return an Ethernet frame with a TCP segment; it has options, as most do."""
    head = struct.pack(
        "!HHIIBBHHH12s",
        source[1], destination[1], sequence % WRAP, acknowledgement % WRAP,
        8 << 4, flags, 500, 0, 0, bytes(12),
    )  # fmt: skip
    return ip_frame(source[0], destination[0], head + payload, padding=6 * (not payload))


class Flow:
    """A TCP connection: what either side has sent so far. Opened by `opener` unless told not to."""

    def __init__(
        self,
        wire: Wire,
        opener: tuple[str, str, int],
        accepter: tuple[str, str, int],
        *,
        sequences: tuple[int, int] = (1000, 5000),
        opens: bool = True,
    ) -> None:
        """Each side is (port of the switch, address, TCP port)."""
        self.wire = wire
        self.sides = {0: opener, 1: accepter}
        self.next = {0: sequences[0], 1: sequences[1]}
        if opens:
            self.send(0, flags=SYN, length=1)
            self.send(1, flags=SYN | ACK, length=1)
            self.send(0)

    def frame(
        self, side: int, sequence: int, payload: bytes = b"", flags: int = ACK, heard: int = 0
    ) -> bytes:
        """Return a frame of one side; it acknowledges all that the other sent, minus `heard`."""
        _, *source = self.sides[side]
        _, *destination = self.sides[1 - side]
        acknowledgement = self.next[1 - side] - heard if flags & ACK else 0
        return tcp_frame(
            (source[0], source[1]),  # type: ignore[arg-type]
            (destination[0], destination[1]),  # type: ignore[arg-type]
            sequence,
            acknowledgement,
            flags=flags,
            payload=payload,
        )

    def send(
        self,
        side: int,
        payload: bytes = b"",
        *,
        flags: int = ACK,
        length: int = 0,
        port: str | None = None,
        heard: int = 0,
    ) -> None:
        """Let one side send, in order; `port` is where it enters, if not where that side is."""
        frame = self.frame(side, self.next[side], payload, flags, heard)
        self.next[side] += len(payload) + length
        self.wire.see(port or self.sides[side][0], frame)

    def again(self, side: int, size: int, payload: bytes, port: str | None = None) -> None:
        """Let one side send its last `size` bytes again (or say other ones in their place)."""
        frame = self.frame(side, self.next[side] - size, payload)
        self.wire.see(port or self.sides[side][0], frame)


class Link:
    """A replication connection of `vm` from `primary` to `backup`."""

    def __init__(
        self,
        wire: Wire,
        primary: str,
        backup: str,
        generation: int,
        *,
        port: int = 40000,
        opens: bool = True,
    ) -> None:
        """Connect, greet and be welcomed."""
        self.wire = wire
        self.flow = Flow(
            wire,
            (primary, party_address(primary), port),
            (backup, party_address(backup), PEER_PORT),
            sequences=(WRAP - 700, WRAP - 20),
            opens=opens,
        )
        self.sender = FrameEncoder(sender=Role.PRIMARY, generation=generation)
        self.receiver = FrameEncoder(sender=Role.BACKUP, generation=generation)
        self.epoch = 0
        hello = Hello(
            vm=VM,
            generation=generation,
            primary=primary,
            backup=backup,
            keepalive_ms=10,
            silence_limit_ms=50,
            blocks=(("ram", 4096 * 16),),
        )
        preface = encode_preface(Preface(VM, generation, tls=False))
        for piece in (preface[:70], preface[70:77], preface[77:]):
            self.flow.send(0, piece)
        self.say(FrameKind.HELLO, 0, [hello.model_dump_json().encode()])
        self.answer(FrameKind.WELCOME, 0, [Welcome(connection=7).model_dump_json().encode()])

    def bytes_of(self, kind: FrameKind, epoch: int = 0, parts: list[Part] | None = None) -> bytes:
        """Return a frame of the primary, which must be sent then."""
        return b"".join(self.sender.encode(kind, epoch, parts or [])[0])

    def say(self, kind: FrameKind, epoch: int = 0, parts: list[Part] | None = None) -> None:
        """Let the primary send a frame."""
        self.flow.send(0, self.bytes_of(kind, epoch, parts))

    def answer(self, kind: FrameKind, epoch: int = 0, parts: list[Part] | None = None) -> None:
        """Let the backup send a frame."""
        self.flow.send(1, b"".join(self.receiver.encode(kind, epoch, parts or [])[0]))

    def pages(self, epoch: int, size: int = 9000) -> None:
        """Let pages of an epoch pass."""
        self.say(FrameKind.PAGES, epoch, [bytes(size)])

    def checkpoint(self, epoch: int, *, pages: bool = True) -> None:
        """Let a whole checkpoint pass."""
        if pages:
            self.pages(epoch)
        self.say(FrameKind.CHECKPOINT, epoch, encode_checkpoint(PagesTally(), b"", final=False))

    def acknowledge(self, epoch: int) -> None:
        """Let its acknowledgement pass."""
        self.epoch = epoch
        self.answer(FrameKind.ACKNOWLEDGE, epoch)

    def commit(self) -> None:
        """Let the next checkpoint and its acknowledgement pass."""
        self.checkpoint(self.epoch + 1)
        self.acknowledge(self.epoch + 1)

    def farewell(self, code: str) -> None:
        """Let the primary leave."""
        self.say(FrameKind.FAREWELL, 0, [json.dumps({"code": code}).encode()])


class Controller:
    """A controller's connection to a host's agent, kept for all answers."""

    def __init__(self, wire: Wire, host: str, *, port: int = 50000, opens: bool = True) -> None:
        self.host = host
        self.flow = Flow(
            wire,
            (host, party_address(host), port),
            ("controller-1", party_address("controller-1"), CONTROLLER_PORT),
            opens=opens,
        )

    def answer(self, document: dict[str, Any], pieces: int = 1) -> None:
        """Let an HTTP answer pass, in so many segments."""
        body = json.dumps(document).encode()
        head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nserver: x\r\n\r\n" % len(body)
        self.flow.send(0, b"POST /v1/agent/claims HTTP/1.1\r\n\r\n")
        whole = head + body
        step = -(-len(whole) // pieces)
        for at in range(0, len(whole), step):
            self.flow.send(1, whole[at : at + step])

    def verdict(self, winner: str, generation: int, *, won: bool = True, pieces: int = 1) -> None:
        """Tell the host who won a generation."""
        record = ProtectionRecord(
            vm=VM,
            generation=generation,
            phase=Phase.UNPROTECTED,
            primary=winner,
            policy=Policy(),
            claimed=ClaimStamp(
                claim="claim-12", host=winner, reason="peer-silent", generation=generation
            ),
        )
        verdict = ClaimVerdict(won=won, record=record, explanation="decided")
        self.answer(verdict.model_dump(mode="json"), pieces)

    def order(self, generation: int, role: Role = Role.PRIMARY) -> None:
        """Tell the host its orders."""
        order = Assignment(
            vm=VM, generation=generation, role=role, phase=Phase.UNPROTECTED, policy=Policy()
        )
        self.answer(Assignments(position=1, assignments=(order,)).model_dump(mode="json"))


class Talk:
    """A client's connection to the guest: one request, one reply."""

    def __init__(self, wire: Wire, host: str, *, port: int = 30000, opens: bool = True) -> None:
        """Connect to the guest on a host."""
        self.wire = wire
        self.host = host
        self.count = 0
        self.flow = Flow(
            wire,
            ("client", CLIENT, port),
            (host, GUEST, 6379),
            sequences=(WRAP - 30, WRAP - 10),
            opens=opens,
        )

    def ask(self) -> None:
        """Let a request pass."""
        self.flow.send(0, b"*2\r\n$4\r\nINCR\r\n$5\r\ncount\r\n")

    def reply(self, port: str | None = None) -> None:
        """Let the next reply pass."""
        self.count += 1
        self.flow.send(1, b":%d\r\n" % self.count, port=port or self.host)


def speak(wire: Wire, port: str, address: str = GUEST) -> None:
    """Let the guest speak without TCP: an ARP message."""
    wire.see(port, arp_frame(address))


def protected(wire: Wire, primary: str = "h1", backup: str = "h2", generation: int = 2) -> Link:
    link = Link(wire, primary, backup, generation, port=40000 + generation)
    link.pages(0)
    link.commit()
    return link


def fail_over(wire: Wire, winner: str = "h2", generation: int = 3) -> None:
    controller = Controller(wire, winner, port=50000 + generation, opens=False)
    controller.verdict(winner, generation)


def no_violation(wire: Wire) -> bool:
    assert wire.violations == []
    return wire.summary()["violations"] == 0


def broken(wire: Wire, rule: str) -> bool:
    """Exactly one violation, of this rule."""
    assert [each[:2] for each in wire.violations] == [rule], wire.violations
    return wire.summary()["violations"] == 1
