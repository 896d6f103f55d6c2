"""The QEMU command of a lab VM. Pure.

An ordinary command line, as an administrator would write it: nothing in it knows of Holdfast, and
nothing is missing that Holdfast would need to be added.

The tap is not made beforehand: QEMU makes it and the kernel removes it when QEMU ends, however it
ends. The console's file is opened for appending because a standby, started from the same command
line, opens it a second time.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from holdfast_api.words import NAME_PATTERN
from holdfast_lab.errors import LabRefused
from holdfast_lab.guest import MINIMUM_MEMORY_MB, Image
from holdfast_lab.network import NICS_MAX, guest_address, guest_mac

NAME_LENGTH_MAX = 40
"""Longer ones would not fit into the path of a socket."""
INTERFACE_NAME_MAX = 15


@dataclass(frozen=True)
class VmOptions:
    """How large a VM is and what its guest does beside serving Redis."""

    memory_mb: int = 256
    vcpus: int = 1
    shared_memory: bool = False
    """Guest memory is a memfd that others can map; else it is QEMU's own."""
    dirty_mb: int = 16
    dirty_pps: int = 0
    """Pages that the guest rewrites in each second, at random among `dirty_mb`; 0: none."""
    nics: int = 1
    graphics: bool = True
    """With a VGA card, whose memory is guest memory too."""
    cpu: str = "max"
    """As QEMU's -cpu takes it."""
    vhost: bool = False
    """The kernel carries the NICs' packets, past QEMU."""

    def faults(self) -> list[str]:
        """Return everything that is wrong with these options."""
        found = []
        if self.memory_mb < MINIMUM_MEMORY_MB:
            found.append(f"the guest needs {MINIMUM_MEMORY_MB} MiB of memory, not {self.memory_mb}")
        if not 1 <= self.vcpus <= 64:  # noqa: PLR2004 - said in the message
            found.append(f"vcpus must be 1 to 64, not {self.vcpus}")
        if not 1 <= self.nics <= NICS_MAX:
            found.append(f"nics must be 1 to {NICS_MAX}, not {self.nics}")
        if self.dirty_pps < 0 or self.dirty_mb < 1:
            found.append("dirty_mb must be at least 1 and dirty_pps at least 0")
        if self.dirty_pps and self.dirty_mb > self.memory_mb - MINIMUM_MEMORY_MB // 2:
            found.append(f"a guest of {self.memory_mb} MiB can not rewrite {self.dirty_mb} MiB")
        return found


@dataclass(frozen=True)
class VmPlan:
    """A VM about to be started on a host."""

    name: str
    number: int
    """Of the guest in its lab, from 1; addresses and MACs follow from it."""
    options: VmOptions
    qmp: Path
    console: Path
    accelerator: str

    @property
    def addresses(self) -> tuple[str, ...]:
        """One for each NIC."""
        return tuple(guest_address(self.number, nic) for nic in range(self.options.nics))

    @property
    def macs(self) -> tuple[str, ...]:
        """One for each NIC."""
        return tuple(guest_mac(self.number, nic) for nic in range(self.options.nics))

    @property
    def taps(self) -> tuple[str, ...]:
        """Interface names on the host, one for each NIC."""
        tails = [f"-{self.number}n{nic}" for nic in range(self.options.nics)]
        return tuple(self.name[: INTERFACE_NAME_MAX - len(tail)] + tail for tail in tails)


def check(name: str, options: VmOptions) -> None:
    """Raise LabRefused, naming all faults, when a VM can not be made like this."""
    faults = options.faults()
    if not re.fullmatch(NAME_PATTERN, name) or len(name) > NAME_LENGTH_MAX:
        faults.insert(
            0, f"a VM's name is at most {NAME_LENGTH_MAX} of a-z, 0-9, '.', '_' and '-': not {name}"
        )
    if faults:
        raise LabRefused("; ".join(faults))


def qemu_argv(plan: VmPlan, image: Image) -> list[str]:
    """Return the command that starts a VM."""
    options = plan.options
    argv = ["qemu-system-x86_64", "-name", plan.name]
    argv += ["-accel", plan.accelerator, "-cpu", options.cpu]
    size = f"{options.memory_mb}M"
    if options.shared_memory:
        argv += ["-machine", "q35,memory-backend=ram0", "-m", size]
        argv += ["-object", f"memory-backend-memfd,id=ram0,size={size},share=on"]
    else:
        argv += ["-machine", "q35", "-m", size]
    argv += ["-smp", str(options.vcpus), "-nodefaults", "-display", "none"]
    argv += ["-vga", "std" if options.graphics else "none"]
    argv += ["-chardev", f"file,id=console,path={plan.console},append=on"]
    argv += ["-serial", "chardev:console"]
    argv += ["-kernel", str(image.kernel), "-initrd", str(image.initrd)]
    argv += ["-append", _kernel_words(plan)]
    for nic, (tap, mac) in enumerate(zip(plan.taps, plan.macs, strict=True)):
        vhost = ",vhost=on" if options.vhost else ""
        argv += ["-netdev", f"tap,id=n{nic},ifname={tap},script=no,downscript=no{vhost}"]
        # Without a boot ROM, which would cost half a second at every start.
        argv += ["-device", f"virtio-net-pci,netdev=n{nic},mac={mac},romfile="]
    return [*argv, "-qmp", f"unix:{plan.qmp},server=on,wait=off"]


def _kernel_words(plan: VmPlan) -> str:
    # The last three only save time: self-tests and guards that an emulated guest has no use for.
    # Not `quiet`: of a guest that never comes up, the console should say how far it came.
    words = ["console=ttyS0", "loglevel=6", "panic=-1"]
    words += ["no_timer_check", "cryptomgr.notests", "mitigations=off"]
    words.append("holdfast.ip=" + ",".join(f"{address}/16" for address in plan.addresses))
    if plan.options.dirty_pps:
        words += [f"dirty_mb={plan.options.dirty_mb}", f"dirty_pps={plan.options.dirty_pps}"]
    return " ".join(words)
