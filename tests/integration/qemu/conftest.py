"""Small real QEMUs: a bare machine, or a busybox guest that pings or powers off; and a tap outside.

Guests boot the kernel of /boot with an initramfs built into the cache. The guest at 10.77.0.2
pings 10.77.0.1 (an address nobody has, with a fixed MAC) several times a second: its sequence
numbers show what left, in which order, and that a promoted guest went on where it was.
"""

import contextlib
import hashlib
import os
import platform
import select
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import IPRoute

from holdfast_agent.core.failures import VirtualMachineGone
from holdfast_agent.hypervisor.qmp import QmpConnection
from holdfast_agent.network.taps import create_tap, remove_tap

GUEST_MAC = "52:54:00:77:00:02"
PEER_MAC = "02:00:00:77:00:01"
MODULES = (
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci",
    "net/core/failover",
    "drivers/net/net_failover",
    "drivers/net/virtio_net",
)
INIT = f"""#!/bin/sh
mount -t proc proc /proc
mount -t devtmpfs dev /dev
case "$(cat /proc/cmdline)" in *poweroff*) poweroff -f ;; esac
for m in {" ".join(Path(m).name for m in MODULES)}; do insmod /$m.ko; done
ip link set eth0 up
ip addr add 10.77.0.2/24 dev eth0
arp -s 10.77.0.1 {PEER_MAC}
echo ready > /dev/ttyS0
ping -i 0.05 -s 8 10.77.0.1 > /dev/null
"""


def _kernel() -> tuple[Path, str]:
    kernels = sorted(Path("/boot").glob("vmlinuz-*"))
    for kernel in reversed(kernels):
        release = kernel.name.removeprefix("vmlinuz-")
        if Path("/lib/modules", release, "kernel").is_dir():
            return kernel, release
    pytest.fail("no kernel in /boot with modules: apt install linux-image-cloud-amd64")


@pytest.fixture(scope="session")
def guest_images() -> tuple[Path, Path]:
    """Return (kernel, initramfs), building the latter once."""
    kernel, release = _kernel()
    cache = Path(__file__).parents[3] / ".cache" / "qemu-tests"
    key = hashlib.sha256(f"{release}{INIT}".encode()).hexdigest()[:16]
    image = cache / f"initramfs-{key}.cpio"
    if not image.exists():
        root = cache / f"root-{os.getpid()}"
        shutil.rmtree(root, ignore_errors=True)
        for folder in ("bin", "proc", "dev"):
            (root / folder).mkdir(parents=True)
        shutil.copy(shutil.which("busybox") or "/bin/busybox", root / "bin/busybox")
        for applet in ("sh", "mount", "cat", "insmod", "ip", "arp", "ping", "poweroff"):
            (root / "bin" / applet).symlink_to("busybox")
        for module in MODULES:
            source = Path("/lib/modules", release, "kernel", f"{module}.ko")
            shutil.copy(source, root / source.name)
        (root / "init").write_text(INIT)
        (root / "init").chmod(0o755)
        names = b"\0".join(str(p.relative_to(root)).encode() for p in sorted(root.rglob("*")))
        packed = subprocess.run(
            ["cpio", "-o", "-0", "-H", "newc", "--quiet"],
            cwd=root,
            input=names,
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        draft = image.with_suffix(f".{os.getpid()}")
        draft.write_bytes(packed)
        draft.rename(image)
        shutil.rmtree(root)
    return kernel, image


@dataclass
class Qemu:
    """A QEMU of the test's, and where its monitor is; connections end with it at the latest."""

    process: subprocess.Popen[bytes]
    qmp_path: Path
    argv: tuple[str, ...]
    serial: Path
    connections: list[QmpConnection] = field(default_factory=list)

    def connect(self) -> QmpConnection:
        self.connections.append(QmpConnection.connect(self.qmp_path))
        return self.connections[-1]

    def console(self) -> bytes:
        return self.serial.read_bytes() if self.serial.exists() else b""

    def kill(self) -> None:
        for connection in self.connections:
            connection.close()
        self.process.kill()
        self.process.wait()


StartQemu = Callable[..., Qemu]


@pytest.fixture
def start_qemu(tmp_path: Path) -> Iterator[StartQemu]:
    """Return a function that starts a QEMU with more arguments and waits for its monitor."""
    started: list[Qemu] = []

    def start(*more: str, name: str = "vm") -> Qemu:
        qmp_path = tmp_path / f"{name}.qmp"
        serial = tmp_path / f"{name}.serial"
        argv = (
            *("qemu-system-x86_64", "-name", name, "-accel", "tcg", "-cpu", "max"),
            *("-nodefaults", "-nographic", "-serial", f"file:{serial}"),
            *("-qmp", f"unix:{qmp_path},server=on,wait=off", *more),
        )
        if not any(word in ("-machine", "-M") for word in more):
            argv = (*argv, "-machine", "q35", "-m", "128")
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
        qemu = Qemu(process, qmp_path, argv, serial)
        started.append(qemu)
        _wait_for(lambda: _answers(qmp_path), 10, "the monitor to answer")
        return qemu

    yield start
    for qemu in started:
        qemu.kill()


@pytest.fixture
def ping_argv(guest_images: tuple[Path, Path]) -> Callable[[str], tuple[str, ...]]:
    """Return a function that gives the arguments of a guest that pings over a tap."""
    kernel, image = guest_images

    def arguments(tap: str) -> tuple[str, ...]:
        return (
            *("-kernel", str(kernel), "-initrd", str(image)),
            *("-append", "console=ttyS0 quiet panic=-1 no_timer_check"),
            *("-netdev", f"tap,id=n0,ifname={tap},script=no,downscript=no"),
            *("-device", f"virtio-net-pci,netdev=n0,mac={GUEST_MAC},romfile="),
        )

    return arguments


def wait_booted(qemu: Qemu) -> None:
    """Wait until the guest says that it is ready."""
    _wait_for(lambda: b"ready" in qemu.console(), 90, "the guest to boot")


def _wait_for(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.01)


def _answers(qmp_path: Path) -> bool:
    try:
        QmpConnection.connect(qmp_path).close()
    except VirtualMachineGone:
        return False
    return True


@dataclass
class Outside:
    """A bridge with taps, and a port on it that sees what guests send."""

    bridge: str
    near: str
    far: str
    listener: socket.socket
    taps: list[str] = field(default_factory=list)

    def add_tap(self, *, up: bool = True) -> str:
        name = f"hfq{os.getpid() % 100000}t{len(self.taps)}"
        self.taps.append(name)
        create_tap(name, self.bridge)
        if up:
            with IPRoute() as netlink:
                netlink.link("set", ifname=name, state="up")
        return name

    def frames(self, seconds: float, *, enough: int = 1 << 30) -> list[bytes]:
        """Return the frames from the guest that arrive within `seconds`, or `enough` of them."""
        poller = select.poll()
        poller.register(self.listener, select.POLLIN)
        deadline = time.monotonic() + seconds
        seen: list[bytes] = []
        while len(seen) < enough:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not poller.poll(left_s * 1000):
                break
            frame = self.listener.recv(65536)
            if frame[6:12] == bytes.fromhex(GUEST_MAC.replace(":", "")):
                seen.append(frame)
        return seen

    def pings(self, seconds: float, *, enough: int = 1 << 30) -> list[int]:
        """Return the sequence numbers of the pings that arrive."""
        frames = self.frames(seconds, enough=enough)
        return [number for number in map(ping_number, frames) if number is not None]


def ping_number(frame: bytes) -> int | None:
    """Return the sequence number of an echo request."""
    if frame[12:14] != b"\x08\x00" or frame[23] != 1 or frame[34] != 8:
        return None
    (number,) = struct.unpack(">H", frame[40:42])
    return int(number)


@pytest.fixture
def outside() -> Iterator[Outside]:
    """Make a bridge and a listening port on it; remove both and all taps."""
    pid = os.getpid() % 100000
    bridge, near, far = f"hfq{pid}b", f"hfq{pid}n", f"hfq{pid}f"
    with IPRoute() as netlink:
        netlink.link("add", ifname=bridge, kind="bridge")
        netlink.link("add", ifname=near, kind="veth", peer=far)
        (master,) = netlink.link_lookup(ifname=bridge)
        netlink.link("set", ifname=near, master=master, state="up")
        netlink.link("set", ifname=far, state="up")
        netlink.link("set", ifname=bridge, state="up")
    listener = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    listener.setsockopt(socket.SOL_SOCKET, 33, 16 << 20)  # SO_RCVBUFFORCE
    listener.bind((far, 0))
    made = Outside(bridge, near, far, listener)
    yield made
    listener.close()
    for name in (*made.taps, near, bridge):
        with contextlib.suppress(OSError):
            remove_tap(name)


@pytest.fixture
def lib() -> Any:
    """Give tests the helpers of this file."""
    return _Helpers


class _Helpers:
    wait_booted = staticmethod(wait_booted)
    wait_for = staticmethod(_wait_for)
    ping_number = staticmethod(ping_number)
    release = platform.release()
