"""Boots hosts: Linux kernels of Debian, emulated, on this machine's own root file system.

Needs root, the installed QEMU and what `./dev` put below `.cache/booted`. Leaves nothing behind.

Theory of operation: QEMU shows `/` to the host read-only over 9p; `init` lays a tmpfs over it, so
that the project, its environment and every installed program are there at their usual paths while
nothing written inside comes back, except below a folder that the caller shares. The host's runner
takes commands over a virtio-serial port (`channel`).

Everything that a host consists of hangs on QEMU's process: the control channel, QMP and the network
are socket pairs and the console is a memory file, handed over as descriptors, so that there is no
file to remove. QEMU gets SIGKILL when the thread that booted the host ends, however it ends: boot
from a thread that stays.

Two hosts are joined by a pair of datagram sockets, more by a `Switch` (`wires`). Addresses are
10.8.0.1, 10.8.0.2 and so on, on eth0.
"""

import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.lab.booted.channel import Channel
from tests.lab.booted.ingredients import (
    archive_of_a_boot,
    boot_files,
    python_path,
    qemu_program,
)
from tests.lab.booted.monitor import Monitor
from tests.lab.booted.wires import wired

BOOT_SECONDS_MAX = 120.0
"""It takes 3 s on an idle machine."""
ENDS_SECONDS_MAX = 10.0
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
KERNEL_WORDS = "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable no_timer_check"


class NotBootedError(AssertionError):
    """A host did not come up, twice; says what its console and QEMU said."""


@dataclass(frozen=True)
class Machine:
    """What to boot."""

    kernel: str = "6.1"
    """`6.1` (Debian 12: soft-dirty, no PAGEMAP_SCAN) or `6.12` (its backports: both)."""
    qemu: str = "7.2"
    """The QEMU that emulates the host: `7.2`, the installed one, or `10`, that of backports."""
    memory_mb: int = 2048
    """Half of it can be written to files outside of `shared`."""
    cpus: int = 1
    """A second one costs more than it gives where the machine has no core for it."""
    modules: tuple[str, ...] = ()
    """Kernel modules to load before the first command."""
    mtu: int = 9000
    """Of eth0, where there are several hosts."""


class BootedHost:
    """A host that runs. Made by `booted_host` and `booted_hosts`."""

    def __init__(
        self, machine: Machine, number: int, shared: Path | None, wire: socket.socket | None
    ) -> None:
        """Start QEMU; `wire` stays the caller's. Waits for nothing: see `wait_ready`."""
        self.machine = machine
        self.number = number
        self.address = f"10.8.0.{number}"
        self._shared = shared
        with contextlib.ExitStack() as held:
            self._console = _memory_file("console", held)
            self._errors = _memory_file("errors", held)
            control, control_of_qemu = socket.socketpair()
            monitor, monitor_of_qemu = socket.socketpair()
            with control_of_qemu, monitor_of_qemu, contextlib.ExitStack() as until_started:
                boot = _memory_file("boot", until_started)
                handed = [control_of_qemu, monitor_of_qemu, *([wire] if wire else [])]
                held.callback(control.close)
                held.callback(monitor.close)
                self._process = subprocess.Popen(
                    self._command(boot, control_of_qemu, monitor_of_qemu, wire),
                    stdin=subprocess.DEVNULL,
                    stdout=self._errors,
                    stderr=self._errors,
                    pass_fds=[boot, self._console, *(each.fileno() for each in handed)],
                )
            self._monitor = Monitor(monitor)
            held.callback(self._monitor.close)
            self._channel = Channel(control)
            held.callback(self._channel.close)
            held.callback(self.kill)
            self._held = held.pop_all()
        self.run = self._channel.run
        self.start = self._channel.start

    def _command(
        self,
        boot: int,
        control: socket.socket,
        monitor: socket.socket,
        wire: socket.socket | None,
    ) -> list[str]:
        machine = self.machine
        files = boot_files(machine.kernel)
        words = {
            "layers": len(files.layers),
            "python": Path(sys.executable).resolve(),
            "number": self.number,
            "address": f"{self.address}/24" if wire else "",
            "mtu": machine.mtu,
        }
        text = "".join(f"{name}={shlex.quote(str(value))}\n" for name, value in words.items())
        with open(boot, "wb", closefd=False) as archive:
            archive.write(files.archive)
            archive.write(archive_of_a_boot(text, json.dumps(environment_inside(self.number))))
        command = [
            *("setpriv", "--pdeathsig", "KILL", qemu_program(machine.qemu)),
            *("-name", f"booted{self.number}", "-nodefaults", "-no-user-config"),
            *("-display", "none", "-no-reboot", "-rtc", "base=utc"),
            *("-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max"),
            *("-smp", str(machine.cpus), "-m", f"{machine.memory_mb}M"),
            *("-kernel", str(files.image), "-initrd", f"/dev/fd/{boot}"),
            *("-append", KERNEL_WORDS, "-serial", f"file:/dev/fd/{self._console}"),
            *("-chardev", f"socket,id=monitor,fd={monitor.fileno()}"),
            *("-mon", "chardev=monitor,mode=control"),
            *("-device", "virtio-serial-pci"),
            *("-chardev", f"socket,id=control,fd={control.fileno()}"),
            *("-device", "virtserialport,chardev=control,name=control"),
            *_share("root", Path("/")),
        ]
        for index, layer in enumerate(files.layers):
            command += _share(f"layer{index}", layer)
        if self._shared is not None:
            command += _share("shared", self._shared, writable=True)
        if wire is not None:
            mac = f"52:54:00:08:00:{self.number:02x}"
            command += [
                *("-netdev", f"dgram,id=wire,local.type=fd,local.str={wire.fileno()}"),
                *("-device", f"virtio-net-pci,netdev=wire,mac={mac},host_mtu=9000,romfile="),
            ]
        return command

    def wait_ready(self) -> None:
        """Wait until it takes commands; mount what is shared and load modules.

        Raises NotBootedError.
        """
        if not self._channel.wait_ready(BOOT_SECONDS_MAX):
            raise NotBootedError(f"host {self.number} never reported\n{self.diagnosis()}")
        if self._shared is not None:
            options = "rw,trans=virtio,version=9p2000.L,msize=512000,cache=mmap"
            folder = str(self._shared)
            self.run(["mkdir", "-p", folder], folder="/").checked()
            self.run(["mount", "-t", "9p", "-o", options, "shared", folder], folder="/").checked()
        if self.machine.modules:
            self.run(["modprobe", "-a", *self.machine.modules]).checked()

    @property
    def is_alive(self) -> bool:
        """Tell whether QEMU runs."""
        return self._process.poll() is None

    def set_link(self, *, up: bool) -> None:
        """Pull the cable of eth0, or plug it in again. The other hosts' cards see no change."""
        self._monitor.execute("set_link", {"name": "wire", "up": up})

    def kill(self) -> None:
        """End the host as a power cut does; commands that run in it get the status 125."""
        self._process.kill()
        self._process.wait(ENDS_SECONDS_MAX)

    def diagnosis(self) -> str:
        """Return the ends of what the console and QEMU said."""
        return f"console: {_end_of(self._console)}\nQEMU: {_end_of(self._errors)}"

    def close(self) -> None:
        """End it and release all that it held; what was written to the shared folder is kept."""
        if self._shared is not None and self.is_alive:
            self.run(["sync"], folder="/", seconds_max=ENDS_SECONDS_MAX)
        self._held.close()


def environment_inside(number: int) -> dict[str, str]:
    """Return the environment of commands inside."""
    return {
        "HOME": os.environ.get("HOME", "/"),
        "PATH": f"{Path(sys.executable).parent}:{SYSTEM_PATH}",
        "PYTHONPATH": python_path(),
        "LANG": "C.UTF-8",
        "TERM": "dumb",
        "HOLDFAST_BOOTED_HOST": str(number),
        **{name: value for name, value in os.environ.items() if name == "HOLDFAST_CACHE"},
    }


def _memory_file(name: str, held: contextlib.ExitStack) -> int:
    descriptor = os.memfd_create(name)
    held.callback(os.close, descriptor)
    return descriptor


def _share(tag: str, folder: Path, *, writable: bool = False) -> list[str]:
    assert "," not in str(folder), f"QEMU takes a comma in {folder} for the end of the path"
    access = "" if writable else ",readonly=on"
    words = f"local,path={folder},mount_tag={tag},security_model=none,multidevs=remap{access}"
    return ["-virtfs", words]


def _end_of(memory: int, size_bytes: int = 3000) -> str:
    size = os.fstat(memory).st_size
    return os.pread(memory, size_bytes, max(0, size - size_bytes)).decode(errors="replace")


@contextlib.contextmanager
def booted_host(
    machine: Machine | None = None, *, shared: Path | None = None
) -> Iterator[BootedHost]:
    """Boot one host without a network; `shared` is a folder that it may write, at the same path."""
    with booted_hosts(1, machine, shared=shared) as (host,):
        yield host


@contextlib.contextmanager
def booted_hosts(
    count: int, machine: Machine | None = None, *, shared: Path | None = None
) -> Iterator[list[BootedHost]]:
    """Boot hosts joined by a network, and end them. Commands do not survive the block.

    A boot that never reports is tried once more, and error output says so. Raises NotBootedError.
    """
    with contextlib.ExitStack() as stack:
        wires = stack.enter_context(wired(count))
        hosts = []
        for number, wire in enumerate(wires, start=1):
            hosts.append(BootedHost(machine or Machine(), number, shared, wire))
            stack.callback(lambda index: hosts[index].close(), number - 1)
        for index, wire in enumerate(wires):
            try:
                hosts[index].wait_ready()
            except NotBootedError as error:
                sys.stderr.write(f"booted lab: booting a second time, as {error}\n")
                hosts[index].close()
                hosts[index] = BootedHost(machine or Machine(), index + 1, shared, wire)
                hosts[index].wait_ready()
        for wire in wires:
            if wire is not None:
                wire.close()  # only QEMU holds it now: frames to a host that died are dropped
        yield hosts
