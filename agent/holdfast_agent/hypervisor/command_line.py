"""A standby's command line, made from its primary's. Pure.

The standby must be the same machine in everything the guest can see, and must touch nothing of
the primary's surroundings on its host: its monitor, displays, log files, sockets. So options of
the first kind are kept word for word (also those this module has never heard of), and those of
the second are dropped, or redirected into the standby's folder. Files that the machine itself is
made of (kernel, initrd, firmware, read-only images) must exist on both hosts under the same name.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from holdfast_agent.hypervisor.options import Option, Parameters, parse, render

DROPPED = frozenset(
    {
        *("qmp", "qmp-pretty", "monitor", "mon", "pidfile", "daemonize", "S", "incoming"),
        *("display", "vnc", "spice", "sdl", "curses", "gtk", "full-screen"),
        *("D", "gdb", "s", "loadvm", "chroot", "trace"),
    }
)
"""Belong to the primary's process, not to the machine."""

PASSED_IN = ("fd", "fds", "vhostfd", "vhostfds")
"""Parameters that name descriptors inherited from whoever started QEMU."""


@dataclass(frozen=True)
class ArgvNic:
    """A network backend as the command line gives it."""

    netdev_id: str
    """Empty when QEMU chose one (`-nic` without `id`)."""
    kind: str
    tap: str | None
    by_descriptor: bool
    vhost: bool
    queues: int


class UnsuitableCommandLine(ValueError):  # noqa: N818 - reads as a sentence where it is raised
    """No standby can be started from this command line."""


def nics_of(argv: Sequence[str]) -> list[ArgvNic]:
    """Return the network backends of a command line, in order."""
    nics = []
    for option in parse(argv):
        if option.name not in ("netdev", "nic"):
            continue
        parameters = option.parameters
        kind = parameters.first or parameters.get("type") or ""
        if kind == "none":
            continue
        nics.append(
            ArgvNic(
                netdev_id=parameters.get("id") or "",
                kind=kind,
                tap=parameters.get("ifname"),
                by_descriptor=any(parameters.get(name) for name in PASSED_IN),
                vhost=parameters.get("vhost", "vhostforce") == "on",
                queues=_count(parameters.get("queues")),
            )
        )
    return nics


def mac_of(argv: Sequence[str], netdev_id: str) -> str | None:
    """Return the MAC address that a command line gives the NIC of a backend."""
    for option in parse(argv):
        parameters = option.parameters
        owner = parameters.get("netdev") if option.name == "device" else parameters.get("id")
        if option.name in ("device", "nic") and owner == netdev_id:
            mac = parameters.get("mac")
            return mac.lower() if mac else None
    return None


def name_of(argv: Sequence[str]) -> str | None:
    """Return the guest's name (`-name`)."""
    for option in parse(argv):
        if option.name == "name":
            return option.parameters.first or option.parameters.get("guest")
    return None


def descriptors_of(argv: Sequence[str]) -> list[str]:
    """Return the options that name descriptors QEMU inherited; no other host can repeat them."""
    found = []
    for option in parse(argv):
        inherited = option.name == "add-fd" or "/dev/fdset/" in (option.value or "")
        if option.name in ("chardev", "netdev", "nic", "device") and not inherited:
            inherited = any(option.parameters.get(name) for name in PASSED_IN)
        if inherited and not _is_monitor(option, argv):
            found.append(f"-{option.name} {option.value}")
    return found


def memory_files_of(argv: Sequence[str]) -> list[str]:
    """Return the paths that back guest memory (a directory or a file)."""
    paths = []
    for option in parse(argv):
        if option.name == "mem-path" and option.value:
            paths.append(option.value)
        elif option.name == "object" and option.parameters.first == "memory-backend-file":
            path = option.parameters.get("mem-path")
            paths += [path] if path else []
    return paths


def standby_argv(
    argv: Sequence[str],
    *,
    folder: str,
    qmp_path: str,
    machine_type: str,
    taps: Mapping[str, str],
) -> tuple[str, ...]:
    """Return the command line of a standby that waits for device state.

    `folder` takes its files, `taps` gives the tap of each netdev id. Raises UnsuitableCommandLine
    when the primary's cannot be repeated here.
    """
    inherited = descriptors_of(argv)
    if inherited:
        raise UnsuitableCommandLine(
            f"the command line names descriptors of the primary's starter: {inherited}"
        )
    options: list[Option] = []
    serial_count = 0
    for option in parse(argv):
        if option.name in DROPPED or _is_monitor(option, argv):
            continue
        if option.name in ("serial", "parallel", "debugcon"):
            options.append(Option(option.name, _console(option, folder, serial_count)))
            serial_count += 1
        elif option.name == "chardev":
            options.append(option.with_parameters(_chardev(option.parameters, folder)))
        elif option.name in ("netdev", "nic"):
            options.append(option.with_parameters(_backend(option.parameters, taps)))
        elif option.name in ("machine", "M"):
            options.append(_machine(option, machine_type))
        else:
            options.append(option)
    if not any(option.name in ("machine", "M") for option in options):
        options.append(Option("machine", machine_type))
    if not any(option.name == "nographic" for option in options):
        options.append(Option("display", "none"))
    options += [
        Option("monitor", "none"),
        Option("qmp", f"unix:{qmp_path.replace(',', ',,')},server=on,wait=off"),
        Option("incoming", "defer"),
    ]
    return render(argv[0], options)


def _count(text: str | None) -> int:
    return int(text) if text and re.fullmatch("[0-9]{1,9}", text) else 1


def _is_monitor(option: Option, argv: Sequence[str]) -> bool:
    """Tell whether a chardev serves nothing but a monitor, which the standby does not have."""
    if option.name != "chardev":
        return False
    chardev = option.parameters.get("id")
    return any(
        other.name == "mon" and chardev in (other.parameters.get("chardev"), other.parameters.first)
        for other in parse(argv)
    )


def _console(option: Option, folder: str, index: int) -> str:
    """Return where a serial or parallel port of the standby leads."""
    value = option.value or "null"
    kind = value.split(":", 1)[0]
    if kind == "file":
        return f"file:{folder}/{option.name}{index}.log"
    if kind == "unix":
        return f"unix:{folder}/{option.name}{index}.sock,server=on,wait=off"
    if kind in ("none", "null", "chardev", "pty", "vc"):
        return value
    return "null"


def _chardev(parameters: Parameters, folder: str) -> Parameters:
    """Return a character device of the standby: its files and sockets lie in its folder."""
    name = (parameters.get("id") or "chardev").replace("/", "_")
    log = {"logfile": f"{folder}/{name}.log"} if parameters.get("logfile") else {}
    if parameters.first == "file":
        return parameters.changed({"path": f"{folder}/{name}.out", "input-path": None, **log})
    if parameters.first == "socket" and parameters.get("path"):
        return parameters.changed(
            {
                "path": f"{folder}/{name}.sock",
                "server": "on",
                "wait": "off",
                "reconnect": None,
                **log,
            }
        )
    if parameters.first in ("null", "pty", "ringbuf", "memory", "vc"):
        return parameters.changed(log) if log else parameters
    chardev = parameters.get("id")
    return Parameters("null", (("id", chardev),) if chardev else ())


def _backend(parameters: Parameters, taps: Mapping[str, str]) -> Parameters:
    netdev_id = parameters.get("id") or ""
    kind = parameters.first or parameters.get("type") or ""
    if kind == "none":
        return parameters
    if kind != "tap" or netdev_id not in taps:
        raise UnsuitableCommandLine(
            f"network backend {netdev_id or '(without id)'} of type {kind}: only taps with an id"
        )
    return parameters.changed(
        {
            "ifname": taps[netdev_id],
            "script": "no",
            "downscript": "no",
            "br": None,
            "helper": None,
        }
    )


def _machine(option: Option, machine_type: str) -> Option:
    """Pin the machine to the version that the primary resolved."""
    parameters = option.parameters
    if parameters.first:
        return option.with_parameters(parameters.changed({}, first=machine_type))
    return option.with_parameters(parameters.changed({"type": machine_type}))
