"""Taps without a VM behind them and the network they are on, for tests of the kernel's plug."""

import fcntl
import os
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from holdfast_agent.host.processes import start_ticks_of
from holdfast_agent.network.qdisc_links import Owner
from holdfast_agent.network.qdisc_plug import QdiscPlug
from holdfast_agent.network.selection import make_qdisc_plug

IPV4, IPV6, ARP, LLDP, MARK = 0x0800, 0x86DD, 0x0806, 0x88CC, 0x88B5
KINDS = (IPV4, IPV6, ARP, LLDP)
TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI, IFF_MULTI_QUEUE = 0x2, 0x1000, 0x100
OUTSIDE_MAC = bytes.fromhex("02000000ee01")
MARK_MAC = bytes.fromhex("02000000ee02")
DEADLINE_SECONDS = 20.0
LIMIT_BYTES = 1 << 20

Heard = tuple[int, int, int]
"""(number of the guest's NIC, ether type, number of the frame)."""


def sh(command: str) -> str:
    """Run a command that must succeed; return what it printed."""
    done = subprocess.run(
        ["sh", "-c", command], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def frame(nic: int, kind: int, number: int, size_bytes: int = 64) -> bytes:
    """Return a frame of the guest's NIC `nic` to a station that the bridge does not know."""
    head = OUTSIDE_MAC + bytes((2, 0, 0, 0, 0xAA, nic)) + struct.pack(">HI", kind, number)
    return head.ljust(size_bytes, b"\0")


@dataclass
class Network:
    """Taps on a bridge, and a station on it that hears what leaves them."""

    taps: tuple[str, ...]
    queues: list[list[int]]
    """The guest's ends: one descriptor for each queue of each tap."""
    station: socket.socket
    bridge: socket.socket
    marks: int = 0
    sent: list[Heard] = field(default_factory=list)

    def say(self, *kinds: int, nic: int = 0, queue: int = 0, size_bytes: int = 64) -> list[Heard]:
        """Let the guest send a frame of each kind; return what will be heard of it."""
        said = []
        for kind in kinds:
            entry = (nic, kind, len(self.sent))
            os.write(self.queues[nic][queue], frame(*entry, size_bytes))
            self.sent.append(entry)
            said.append(entry)
        return said

    def hear(self) -> list[Heard]:
        """Return what left since the last time: all that was sent before this call, or is held.

        A mark goes through the bridge behind it; there is one processor, so it is heard last.
        """
        self.marks += 1
        self.bridge.send(OUTSIDE_MAC + MARK_MAC + struct.pack(">HI", MARK, self.marks) + bytes(50))
        heard: list[Heard] = []
        while True:
            data = self.station.recv(2048)
            kind, number = struct.unpack_from(">HI", data, 12)
            if kind == MARK and data[6:12] == MARK_MAC and number == self.marks:
                return heard
            if data[6:11] == b"\2\0\0\0\xaa":
                heard.append((data[11], kind, number))

    def expect(self, due: list[Heard], *, in_order: bool = True) -> None:
        """See that exactly `due` leaves; the kernel may take its time over it."""
        heard = self.hear()
        deadline = time.monotonic() + DEADLINE_SECONDS
        while len(heard) < len(due) and time.monotonic() < deadline:
            heard += self.hear()
        heard += self.hear()
        assert (heard if in_order else sorted(heard)) == (due if in_order else sorted(due))

    def answer(self, nic: int = 0) -> None:
        """Send a frame to the guest, and see that it arrives."""
        mac = bytes((2, 0, 0, 0, 0xAA, nic))
        text = mac + OUTSIDE_MAC + struct.pack(">H", LLDP + 1) + b"to the guest".ljust(50)
        self.station.send(text)
        wait_for(lambda: text in self._arrived(nic))

    def _arrived(self, nic: int) -> list[bytes]:
        frames = []
        try:
            while True:
                frames.append(os.read(self.queues[nic][0], 2048))
        except BlockingIOError:
            return frames


def wait_for(condition: Callable[[], bool]) -> None:
    """Return when the condition holds; fail when it does not in time."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "did not become true in time"
        time.sleep(0.005)


def state_of(taps: tuple[str, ...]) -> str:
    """Return all links, qdiscs and filters: what a plug must leave as it found it."""
    filters = "; ".join(f"tc filter show dev {tap} ingress" for tap in taps)
    return sh(f"ip -o link show; tc qdisc show; {filters}")


def open_plug(
    taps: tuple[str, ...], limit_bytes: int = LIMIT_BYTES, pid: int | None = None
) -> QdiscPlug:
    """Return a plug that holds for process `pid`, or this one."""
    pid = os.getpid() if pid is None else pid
    owner = Owner(pid, start_ticks_of(pid))
    return make_qdisc_plug(owner, taps, limit_bytes=limit_bytes)


@contextmanager
def network(tap_count: int = 1, queue_count: int = 1, first: int = 0) -> Iterator[Network]:
    """Make taps, from t`first` on, on a bridge with a station; remove them all afterwards."""
    with ExitStack() as stack:
        taps = tuple(f"t{first + number}" for number in range(tap_count))
        flags = IFF_TAP | IFF_NO_PI | (IFF_MULTI_QUEUE if queue_count > 1 else 0)
        queues: list[list[int]] = []
        for tap in taps:
            ends = []
            for _ in range(queue_count):
                end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
                stack.callback(os.close, end)
                fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", tap.encode(), flags))
                ends.append(end)
            queues.append(ends)
        quiet = "for i in all default; do echo 1 > /proc/sys/net/ipv6/conf/$i/disable_ipv6; done"
        bridge_name, near, far = (f"{kind}{first}" for kind in ("br", "near", "far"))
        stack.callback(sh, f"ip link del {near}; ip link del {bridge_name}")
        sh(
            f"{quiet}; ip link add {bridge_name} type bridge; "
            f"ip link add {near} type veth peer name {far}; "
            f"for i in {near} {' '.join(taps)}; do ip link set $i master {bridge_name} up; done; "
            f"ip link set {far} up; ip link set {bridge_name} up"
        )
        station, bridge = (_packet_socket(name) for name in (far, bridge_name))
        stack.callback(station.close)
        stack.callback(bridge.close)
        made = Network(taps, queues, station, bridge)
        wait_for(lambda: made.say(IPV4)[0] in made.hear())
        # The kernel says so a while after it is: what is compared later must have settled.
        wait_for(lambda: "state UP" in sh(f"ip -o link show {bridge_name}"))
        yield made


def _packet_socket(interface: str) -> socket.socket:
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    end.settimeout(DEADLINE_SECONDS)
    end.setsockopt(263, 23, 1)  # PACKET_IGNORE_OUTGOING
    end.bind((interface, 0x0003))
    return end
