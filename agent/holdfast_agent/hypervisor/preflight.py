"""Whether a running VM can be protected, and what a standby of it needs. Asks QMP; changes nothing.

Every issue has a stable code and says what to do. A blocking one refuses protection: something the
guest has would be lost, leave too early, or not fit into a standby.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast_agent.core.vm_spec import NicSpec
from holdfast_agent.hypervisor.command_line import descriptors_of, memory_files_of, nics_of
from holdfast_agent.hypervisor.guest_memory import MemoryNotFound, locate_blocks
from holdfast_agent.hypervisor.machine import MachineIdentity, identify
from holdfast_agent.hypervisor.network_text import RunningNic, parse_network
from holdfast_agent.hypervisor.nics import nic_specs
from holdfast_agent.hypervisor.options import parse
from holdfast_agent.hypervisor.qmp import QmpConnection
from holdfast_agent.memory.location import BlockLocation
from holdfast_agent.network.selection import FILTER_ONLY, PlugOutlook, tap_objection
from holdfast_api.records import PreflightIssue, VmFacts
from holdfast_api.words import Severity

ARCHITECTURES = frozenset({"x86_64"})
ZERO_COPY = Path("/sys/module/vhost_net/parameters/experimental_zcopytx")
SAVE_COMMAND = "xen-save-devices-state"
_VERSIONED = re.compile(r"-\d+\.\d+")
_DEVICE_ISSUES: tuple[tuple[re.Pattern[str], str, str], ...] = (
    (
        re.compile(r"^(vfio-|usb-host|vhost-vdpa|igd|xen-pci)"),
        "passthrough-device",
        "its writes to memory are not seen and its state cannot be saved; detach it",
    ),
    (
        re.compile(r"^vhost-user-fs"),
        "virtiofs-device",
        "its daemon writes guest memory unseen; use a disk, NFS or 9p outside of the guest",
    ),
    (
        re.compile(r"^vhost-user"),
        "vhost-user-device",
        "its daemon writes guest memory unseen; use the device that QEMU itself emulates",
    ),
    (
        re.compile(r"^ivshmem"),
        "shared-memory-device",
        "other processes write its memory unseen; detach it",
    ),
)


@dataclass(frozen=True)
class Examination:
    """What was found out about a running QEMU."""

    running: bool
    memory_bytes: int
    identity: MachineIdentity
    blocks: tuple[BlockLocation, ...]
    """Empty when they could not be located; an issue then says why."""
    nics: tuple[NicSpec, ...]
    issues: tuple[PreflightIssue, ...]
    plug: str = ""
    """What would hold its output here; empty when nothing can."""
    plugs: tuple[str, ...] = ()
    """What could hold it on a host that has all of them."""

    @property
    def protectable(self) -> bool:
        """No issue blocks."""
        return all(issue.severity is not Severity.BLOCKING for issue in self.issues)

    def facts(self, vm: str) -> VmFacts:
        """Return what the agent reports of this VM."""
        return VmFacts(
            vm=vm,
            running=self.running,
            memory_bytes=self.memory_bytes,
            vcpus=self.identity.vcpus,
            machine_type=self.identity.machine_type,
            qemu_version=self.identity.qemu_version,
            accelerator=self.identity.accelerator,
            bridges=tuple(sorted({nic.bridge for nic in self.nics if nic.bridge})),
            plugs=self.plugs,
            issues=self.issues,
            pid=self.identity.pid,
        )


def examine(
    qmp: QmpConnection, pid: int, argv: Sequence[str], outlook: PlugOutlook = FILTER_ONLY
) -> Examination:
    """Examine a QEMU over its monitor; `argv` is the command line of process `pid`.

    `outlook` says which plugs this host may hold output with.
    Raises VirtualMachineFailed when QEMU does not answer.
    """
    status, memory, target, commands, blocks, migration, plugged, anonymous = (
        qmp.queue("query-status"),
        qmp.queue("query-memory-size-summary"),
        qmp.queue("query-target"),
        qmp.queue("query-commands"),
        qmp.queue("query-block"),
        qmp.queue("query-migrate"),
        qmp.queue("qom-list", {"path": "/machine/peripheral"}),
        qmp.queue("qom-list", {"path": "/machine/peripheral-anon"}),
    )
    identity = identify(qmp)
    sizes = qmp.wait(memory)
    named, unnamed = qmp.wait(plugged), qmp.wait(anonymous)
    state = qmp.wait(status)
    issues = [
        *status_issues(state["status"]),
        *machine_issues(qmp.wait(target)["arch"], qmp.wait(commands), identity.machine_type),
        *device_issues([*named, *unnamed]),
        *hot_plug_issues([entry["name"] for entry in named if _is_child(entry)], argv),
        *disk_issues(qmp.wait(blocks)),
        *migration_issues(qmp.wait(migration)),
        *argv_issues(argv),
    ]
    running = parse_network(qmp.human("info network"))
    issues += nic_issues(running, argv)
    needs = output_needs(running, argv)
    plug, refusals = choose_plug(needs, outlook)
    issues += refusals
    nics = nic_specs(running)
    issues += [
        _warning("tap-without-bridge", f"tap {nic.tap} is on no bridge: nor will the standby's be")
        for nic in nics
        if nic.bridge is None
    ]
    located: list[BlockLocation] = []
    try:
        located = locate_blocks(qmp, pid)
    except MemoryNotFound as error:
        issues.append(_blocking(error.code, str(error)))
    except OSError as error:
        issues.append(_blocking("memory-not-found", f"cannot read QEMU's mappings: {error}"))
    return Examination(
        running=bool(state["running"]),
        memory_bytes=sizes["base-memory"] + sizes.get("plugged-memory", 0),
        identity=identity,
        blocks=tuple(located),
        nics=nics,
        issues=tuple(issues),
        plug=plug,
        plugs=plugs_serving(needs),
    )


# --- the judgements: pure ------------------------------------------------------------------------


def status_issues(status: str) -> list[PreflightIssue]:
    """Judge QEMU's status."""
    if status == "running":
        return []
    return [_blocking("not-running", f"QEMU's status is {status}: start or resume the guest")]


def machine_issues(
    architecture: str, commands: Sequence[Mapping[str, Any]], machine_type: str
) -> list[PreflightIssue]:
    """Judge what kind of machine it is."""
    issues = []
    if architecture not in ARCHITECTURES:
        issues.append(
            _blocking(
                "unsupported-architecture",
                f"guests of {architecture} are not supported, only {sorted(ARCHITECTURES)}",
            )
        )
    if SAVE_COMMAND not in {command["name"] for command in commands}:
        issues.append(
            _blocking(
                "no-device-state-command",
                f"this QEMU has no {SAVE_COMMAND}: use one built with the usual x86 targets",
            )
        )
    if not _VERSIONED.search(machine_type):
        issues.append(
            _blocking(
                "machine-unversioned",
                f"machine type {machine_type} has no version, so its devices may differ between "
                "hosts: use pc or q35",
            )
        )
    return issues


def device_issues(entries: Sequence[Mapping[str, str]]) -> list[PreflightIssue]:
    """Judge the devices, given as `qom-list` lists them."""
    issues = []
    for entry in entries:
        kind = entry["type"].removeprefix("child<").removesuffix(">")
        for pattern, code, reason in _DEVICE_ISSUES:
            if _is_child(entry) and pattern.match(kind):
                issues.append(_blocking(code, f"device {entry['name']} ({kind}): {reason}"))
                break
    return issues


def hot_plug_issues(device_ids: Sequence[str], argv: Sequence[str]) -> list[PreflightIssue]:
    """Find devices that the command line, and so the standby, does not have."""
    known = {option.parameters.get("id") for option in parse(argv) if option.name == "device"}
    return [
        _blocking(
            "hot-plugged-device",
            f"device {device} was plugged in after the start: unplug it, or restart the VM with it",
        )
        for device in device_ids
        if device not in known
    ]


def disk_issues(blocks: Sequence[Mapping[str, Any]]) -> list[PreflightIssue]:
    """Find disks that the guest can write."""
    return [
        _blocking(
            "writable-disk",
            f"drive {block.get('device') or block.get('qdev')} is writable and disks are not "
            "replicated by this version: attach it read-only, or keep its data on the network",
        )
        for block in blocks
        if "inserted" in block and not block["inserted"]["ro"]
    ]


def migration_issues(migration: Mapping[str, Any]) -> list[PreflightIssue]:
    """Repeat what QEMU itself says against saving its devices."""
    return [
        _blocking("migration-blocked", f"QEMU cannot save this machine: {reason}")
        for reason in migration.get("blocked-reasons", ())
    ]


def argv_issues(argv: Sequence[str]) -> list[PreflightIssue]:
    """Judge the command line; reads whether memory paths are files."""
    issues = [
        _blocking(
            "passed-descriptor",
            f"{option} uses a descriptor that only this QEMU has: name the file or socket instead",
        )
        for option in descriptors_of(argv)
        if not option.startswith(("-netdev", "-nic"))
    ]
    issues += [
        _blocking(
            "memory-in-named-file",
            f"guest memory lies in the file {path}, which a standby would share or lack: use "
            "memory-backend-memfd",
        )
        for path in memory_files_of(argv)
        if Path(path).is_file()
    ]
    return issues


def nic_issues(running: Sequence[RunningNic], argv: Sequence[str]) -> list[PreflightIssue]:
    """Judge the NICs: all output must be held, and a standby must be able to repeat them."""
    if not running:
        return [_warning("no-nic", "the VM has no NIC: only its memory is protected")]
    on_argv = {nic.netdev_id: nic for nic in nics_of(argv)}
    issues = []
    for nic in running:
        label = f"NIC {nic.nic} ({nic.netdev_id or 'no backend'})"
        if not nic.netdev_id:
            issues.append(_warning("no-nic", f"{label} is connected to nothing"))
            continue
        known = on_argv.get(nic.netdev_id)
        if nic.kind == "vhost-user":
            issues.append(
                _blocking("vhost-user-device", f"{label}: its switch writes guest memory unseen")
            )
        elif nic.kind != "tap":
            issues.append(
                _blocking(
                    "netdev-not-tap",
                    f"{label} is a {nic.kind} backend, whose connections end with this process: "
                    "use a tap on a bridge",
                )
            )
        elif nic.by_descriptor or nic.tap is None or (known and known.by_descriptor):
            issues.append(
                _blocking(
                    "tap-by-descriptor",
                    f"{label} was given its tap as a descriptor: use ifname=NAME,script=no",
                )
            )
        elif known is None:
            issues.append(
                _blocking(
                    "netdev-without-id",
                    f"{label} is not on the command line under this id: use -netdev tap,id=...",
                )
            )
    return issues


@dataclass(frozen=True)
class OutputNeed:
    """What holding the output of one NIC must cope with."""

    label: str
    tap: str
    queue_count: int
    vhost: bool

    @property
    def serves_filter(self) -> bool:
        """QEMU's filters can hold it."""
        return not self.vhost and self.queue_count == 1


def output_needs(running: Sequence[RunningNic], argv: Sequence[str]) -> list[OutputNeed]:
    """Return the needs of all NICs on taps that have a name."""
    on_argv = {nic.netdev_id: nic for nic in nics_of(argv)}
    needs = []
    for nic in running:
        known = on_argv.get(nic.netdev_id)
        if nic.kind == "tap" and nic.tap is not None and not nic.by_descriptor:
            label = f"NIC {nic.nic} ({nic.netdev_id})"
            vhost = known is not None and known.vhost
            needs.append(OutputNeed(label, nic.tap, nic.queue_count, vhost))
    return needs


def plugs_serving(needs: Sequence[OutputNeed]) -> tuple[str, ...]:
    """Return the plugs that could hold this output on a host that has them, best first."""
    filters = ("filter",) if all(need.serves_filter for need in needs) else ()
    return ("qdisc", *filters)


def choose_plug(
    needs: Sequence[OutputNeed],
    outlook: PlugOutlook,
    objection: Callable[[str], tuple[str, str] | None] = tap_objection,
    *,
    zero_copy: bool | None = None,
) -> tuple[str, list[PreflightIssue]]:
    """Return the plug that holds this output here, or an empty name and why none can."""
    zero_copy = _vhost_zero_copy() if zero_copy is None else zero_copy
    refusals: list[PreflightIssue] = []
    for name in outlook.usable:
        if name == "qdisc":
            found = [_blocking(*why) for need in needs if (why := objection(need.tap))]
            found += _zero_copy_issues(needs, zero_copy=zero_copy)
        else:
            found = [issue for need in needs for issue in _filter_issues(need, outlook)]
        if not found:
            return name, []
        refusals += found
    if not outlook.usable:
        refusals.append(_blocking("no-qdisc-plug", outlook.reason("qdisc")))
    return "", refusals


def _zero_copy_issues(needs: Sequence[OutputNeed], *, zero_copy: bool) -> list[PreflightIssue]:
    """A held packet would be the guest's own memory, and stopping the guest would wait for it."""
    return [
        _blocking(
            "vhost-zero-copy",
            f"{need.label}: vhost sends without copying, so that what is held would keep the guest "
            "from being stopped: load vhost_net with experimental_zcopytx=0",
        )
        for need in needs
        if zero_copy and need.vhost
    ]


def _filter_issues(need: OutputNeed, outlook: PlugOutlook) -> list[PreflightIssue]:
    """Judge what QEMU's net filters, which hold the output, cannot serve."""
    issues = []
    reason = outlook.reason("qdisc")
    instead = f", or use the kernel's plug ({reason})" if reason else ""
    if need.vhost:
        issues.append(
            _blocking(
                "vhost-with-filter-plug",
                f"{need.label} uses vhost, past QEMU's filters: nothing would be held; use "
                f"vhost=off{instead}",
            )
        )
    if need.queue_count > 1:
        issues.append(
            _blocking(
                "several-queues-with-filter-plug",
                f"{need.label} has {need.queue_count} queues, QEMU's filters serve one: use "
                f"queues=1{instead}",
            )
        )
    return issues


# --- below ----------------------------------------------------------------------------------------


def _vhost_zero_copy() -> bool:
    try:
        return ZERO_COPY.read_text(encoding="ascii").strip() in ("1", "Y")
    except OSError:
        return False


def _is_child(entry: Mapping[str, str]) -> bool:
    return entry["type"].startswith("child<")


def _blocking(code: str, message: str) -> PreflightIssue:
    return PreflightIssue(code=code, severity=Severity.BLOCKING, message=message)


def _warning(code: str, message: str) -> PreflightIssue:
    return PreflightIssue(code=code, severity=Severity.WARNING, message=message)
