"""What enters the ports of a lab's switch, frame by frame, as the kernel sees it pass.

Needs CAP_NET_RAW and CAP_SYS_ADMIN; opens one packet socket in the switch's namespace, filtered.

The socket is in the namespace, the process is not: a lab that goes down ends what runs in its
namespaces. A frame is seen when it enters its port, before the bridge and before a cut's rule, and
in the order in which these entered: what depends on a frame is queued behind it. Only incoming
frames are wanted, as each comes out of several ports again.

Ports vanish and come back with another number; a number's name is asked for once, when its first
frame is read. A frame whose port has gone by then has no name and is counted as dropped.

Source: packet(7), `linux/filter.h` (classic BPF, the ancillary load of the packet type).
"""

import array
import ctypes
import errno
import fcntl
import os
import socket
import struct
from typing import NamedTuple

from tests.chaos.packets import GUESTS_FIRST, GUESTS_LAST

from holdfast_lab import namespaces
from holdfast_lab.services import CONTROLLER_PORT, PEER_PORT

ETH_P_ALL = 3
SOL_PACKET = 263
PACKET_STATISTICS = 6
PACKET_OUTGOING = 4
SO_ATTACH_FILTER = 26
SO_RCVBUFFORCE = 33
SIOCGIFNAME = 0x8910
MSG_TRUNC = 0x20
INTERFACE_NAME_SIZE = 16
LINK_ADDRESS_SIZE = 20
"""Of `struct sockaddr_ll`, which Python's own recvfrom turns into a name, with a call each time."""
INTERFACE_NUMBER = struct.Struct("i")
INTERFACE_NUMBER_AT = 4

QUEUE_BYTES = 128 << 20
"""Some seconds of replication, for when this process has no turn."""
FRAME_BYTES_MAX = 256 << 10
INNER = frozenset({"br0", "sink0", "sink1", "lo", ""})
"""Interfaces of the switch that are no ports: they repeat what a port has shown."""

_LOAD_WORD, _LOAD_HALF, _LOAD_BYTE = 0x20, 0x28, 0x30
_LOAD_HALF_INDEXED, _INDEX_IP_HEADER = 0x48, 0xB1
_EQUAL, _GREATER, _ANY_BIT, _RETURN = 0x15, 0x25, 0x45, 0x06
_PACKET_TYPE = 0xFFFFF004

_PROGRAM: tuple[tuple[str, int, int, str, str], ...] = (
    # label, operation, operand, then go to (if true), else go to; "" is the next line
    ("", _LOAD_WORD, _PACKET_TYPE, "", ""),
    ("", _EQUAL, PACKET_OUTGOING, "drop", ""),
    ("", _LOAD_HALF, 12, "", ""),
    ("", _EQUAL, 0x0806, "arp", ""),
    ("", _EQUAL, 0x0800, "", "drop"),
    ("", _LOAD_WORD, 26, "", ""),  # IPv4 source
    ("", _GREATER, GUESTS_LAST, "to", ""),
    ("", _GREATER, GUESTS_FIRST - 1, "accept", ""),
    ("to", _LOAD_WORD, 30, "", ""),  # IPv4 destination
    ("", _GREATER, GUESTS_LAST, "tcp", ""),
    ("", _GREATER, GUESTS_FIRST - 1, "accept", ""),
    ("tcp", _LOAD_BYTE, 23, "", ""),
    ("", _EQUAL, 6, "", "drop"),
    ("", _LOAD_HALF, 20, "", ""),
    ("", _ANY_BIT, 0x1FFF, "drop", ""),  # a later fragment has no ports
    ("", _INDEX_IP_HEADER, 14, "", ""),
    ("", _LOAD_HALF_INDEXED, 14, "", ""),
    ("", _EQUAL, PEER_PORT, "accept", ""),
    ("", _EQUAL, CONTROLLER_PORT, "accept", ""),
    ("", _LOAD_HALF_INDEXED, 16, "", ""),
    ("", _EQUAL, PEER_PORT, "accept", "drop"),
    ("arp", _LOAD_WORD, 28, "", ""),  # ARP sender
    ("", _GREATER, GUESTS_LAST, "drop", ""),
    ("", _GREATER, GUESTS_FIRST - 1, "accept", "drop"),
    ("accept", _RETURN, FRAME_BYTES_MAX, "", ""),
    ("drop", _RETURN, 0, "", ""),
)


class EnteredFrame(NamedTuple):
    """A frame, valid until the next one is taken, and the port that it entered."""

    port: str
    data: memoryview


class Capture:
    """A packet socket on a switch. Owns the socket."""

    def __init__(self, namespace: str) -> None:
        """Listen from now on."""
        self.drops = 0
        """Frames that were missed, as far as `note_drops` has asked."""
        self._names: dict[int, str] = {}
        self._buffer = bytearray(FRAME_BYTES_MAX)
        self._view = memoryview(self._buffer).toreadonly()
        self._pointer = (ctypes.c_char * FRAME_BYTES_MAX).from_buffer(self._buffer)
        self._address = ctypes.create_string_buffer(LINK_ADDRESS_SIZE)
        self._address_size = ctypes.c_uint()
        self._receive = ctypes.CDLL(None, use_errno=True).recvfrom
        self._receive.restype = ctypes.c_ssize_t
        self._socket = namespaces.open_socket(
            namespace, socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)
        )
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, QUEUE_BYTES)
            program = array.array("B", assemble(_PROGRAM))
            attached = struct.pack("HL", len(program) // 8, program.buffer_info()[0])
            self._socket.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, attached)
        except OSError:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """Return the descriptor to poll."""
        return self._socket.fileno()

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()

    def take(self) -> EnteredFrame | None:
        """Return the next frame that entered a port, or None when none waits. Raises OSError."""
        while True:
            self._address_size.value = LINK_ADDRESS_SIZE
            size = self._receive(
                self._socket.fileno(),
                self._pointer,
                ctypes.c_size_t(FRAME_BYTES_MAX),
                socket.MSG_DONTWAIT | MSG_TRUNC,
                self._address,
                ctypes.byref(self._address_size),
            )
            if size < 0:
                number = ctypes.get_errno()
                if number in (errno.EAGAIN, errno.EINTR):
                    return None
                if number == errno.ENETDOWN:  # said once of a port that vanished
                    continue
                raise OSError(number, os.strerror(number))
            port = self._name(INTERFACE_NUMBER.unpack_from(self._address, INTERFACE_NUMBER_AT)[0])
            if port in INNER:
                self.drops += port == ""
                continue
            if size > FRAME_BYTES_MAX:
                self.drops += 1
                continue
            return EnteredFrame(port, self._view[:size])

    def note_drops(self) -> int:
        """Ask the kernel for frames that found the queue full; return all drops so far."""
        statistics = self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8)
        self.drops += struct.unpack("II", statistics)[1]
        return self.drops

    def _name(self, number: int) -> str:
        known = self._names.get(number)
        if known is not None:
            return known
        request = struct.pack(f"{INTERFACE_NAME_SIZE}si20x", b"", number)
        try:
            answer = fcntl.ioctl(self._socket, SIOCGIFNAME, request)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            return ""
        name = answer[:INTERFACE_NAME_SIZE].rstrip(b"\0").decode()
        self._names[number] = name  # grows by one at each power loss
        return name


def assemble(program: tuple[tuple[str, int, int, str, str], ...]) -> bytes:
    """Return a classic BPF program as the kernel wants it."""
    lines = {label: line for line, (label, *_) in enumerate(program) if label}

    def distance(line: int, target: str) -> int:
        return lines[target] - line - 1 if target else 0

    return b"".join(
        struct.pack("HBBI", operation, distance(line, then), distance(line, other), operand)
        for line, (_, operation, operand, then, other) in enumerate(program)
    )
