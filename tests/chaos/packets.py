"""Ethernet frames as the witness needs them: who sent it, and the TCP segment in it. Pure.

Only IPv4 and ARP; fragments and headers that are cut off count as nothing. A frame may be longer
than its packet (padding), and a segment as long as 64 KiB: nothing has cut it into pieces yet.

Source: RFC 791, RFC 826, RFC 9293.
"""

import struct
from ipaddress import IPv4Address
from typing import NamedTuple

from holdfast_lab.network import HOSTS_MAX, guest_address, host_address

FIN, SYN, RST, ACK = 1, 2, 4, 16

_ETHER_TYPE_AT = 12
_ETHER_SIZE = 14
_IPV4, _ARP = 0x0800, 0x0806
_TCP = 6
_IP = struct.Struct("!BBHHHBBHII")
_TCP_HEAD = struct.Struct("!HHIIBB")
_ARP_SENDER_AT = _ETHER_SIZE + 14
_ARP_END = _ARP_SENDER_AT + 4
_FRAGMENT = 0x3FFF

GUESTS_FIRST = int(IPv4Address(guest_address(0, 0)))
GUESTS_LAST = GUESTS_FIRST | 0xFFFF
"""Of the first NIC: all of the lab's network but the lowest 256 addresses, the parties' own."""
_HOST_NUMBER_ZERO = int(IPv4Address(host_address("h0")))

SEQUENCES = 1 << 32
_HALF = 1 << 31


class Segment(NamedTuple):
    """A TCP segment. `payload` is a view of the frame: it must not be kept."""

    source_port: int
    destination_port: int
    sequence: int
    acknowledgement: int
    flags: int
    payload: memoryview

    @property
    def length(self) -> int:
        """Sequence numbers that it takes."""
        return len(self.payload) + bool(self.flags & SYN) + bool(self.flags & FIN)


class Packet(NamedTuple):
    """What an IPv4 packet or an ARP message says of itself."""

    source: int
    destination: int
    """0 for ARP."""
    segment: Segment | None
    """None if it is not TCP."""


def read_packet(frame: bytes | memoryview) -> Packet | None:
    """Return what is in an Ethernet frame, or None if the witness has no use for it."""
    view = memoryview(frame)
    if len(view) < _ETHER_SIZE:
        return None
    ether_type = view[_ETHER_TYPE_AT] << 8 | view[_ETHER_TYPE_AT + 1]
    if ether_type == _ARP and len(view) >= _ARP_END:
        return Packet(int.from_bytes(view[_ARP_SENDER_AT:_ARP_END], "big"), 0, None)
    if ether_type != _IPV4 or len(view) < _ETHER_SIZE + _IP.size:
        return None
    first, _, total, _, fragment, _, protocol, _, source, destination = _IP.unpack_from(
        view, _ETHER_SIZE
    )
    segment_at = _ETHER_SIZE + (first & 15) * 4
    # 0 stands for "longer than 64 KiB".
    end = min(len(view), _ETHER_SIZE + total) if total else len(view)
    segment = None
    if protocol == _TCP and not fragment & _FRAGMENT:
        segment = _read_segment(view[segment_at:end])
    return Packet(source, destination, segment)


def _read_segment(view: memoryview) -> Segment | None:
    if len(view) < _TCP_HEAD.size:
        return None
    source, destination, sequence, acknowledgement, offset, flags = _TCP_HEAD.unpack_from(view)
    payload = view[(offset >> 4) * 4 :]
    return Segment(source, destination, sequence, acknowledgement, flags, payload)


def is_guest(address: int) -> bool:
    """Return whether an address is of the lab's guests (their first NIC)."""
    return GUESTS_FIRST <= address <= GUESTS_LAST


def host_of(address: int) -> str | None:
    """Return the name of the lab's host that has this address."""
    number = address - _HOST_NUMBER_ZERO
    return f"h{number}" if 0 < number <= HOSTS_MAX else None


def spelled(address: int) -> str:
    """Return an address as people write it."""
    return str(IPv4Address(address))


def numbered(address: str) -> int:
    """Return an address as packets carry it. Raises ValueError."""
    return int(IPv4Address(address))


def near(sequence: int, reference: int) -> int:
    """Return the number that is `sequence` modulo 2^32 and nearest to `reference`."""
    return reference + (sequence - reference + _HALF) % SEQUENCES - _HALF
