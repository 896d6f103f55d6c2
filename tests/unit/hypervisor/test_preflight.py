"""The judgements of preflight, on what QEMU says."""

from pathlib import Path
from typing import Any

import pytest

from holdfast_agent.hypervisor.discovery import vm_id_of
from holdfast_agent.hypervisor.network_text import parse_network
from holdfast_agent.hypervisor.preflight import (
    OutputNeed,
    argv_issues,
    choose_plug,
    device_issues,
    disk_issues,
    hot_plug_issues,
    machine_issues,
    migration_issues,
    nic_issues,
    output_needs,
    plugs_serving,
    status_issues,
)
from holdfast_agent.network.selection import PlugOutlook
from holdfast_api.records import PreflightIssue
from holdfast_api.words import Severity

SAVE = [{"name": "xen-save-devices-state"}]
TAP = """virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56
 \\ n0: index=0,type=tap,ifname=tap0,script=no,downscript=no
filters:
  - y: type=filter-buffer,interval=4294967295,netdev=n0,queue=rx
"""
TAP_ARGV = ("qemu", "-netdev", "tap,id=n0,ifname=tap0,script=no")


def codes(issues: list[PreflightIssue]) -> list[str]:
    return [issue.code for issue in issues]


@pytest.mark.parametrize("status", ["paused", "shutdown", "inmigrate", "internal-error"])
def test_a_guest_that_does_not_run_is_refused(status: str) -> None:
    assert codes(status_issues(status)) == ["not-running"]


def test_a_sound_machine_has_no_issue() -> None:
    assert status_issues("running") == []
    assert machine_issues("x86_64", SAVE, "pc-q35-7.2") == []
    assert nic_issues(parse_network(TAP), TAP_ARGV) == []


def test_each_fault_of_a_machine_is_named() -> None:
    found = machine_issues("aarch64", [], "microvm")
    assert codes(found) == [
        "unsupported-architecture",
        "no-device-state-command",
        "machine-unversioned",
    ]


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("vfio-pci", "passthrough-device"),
        ("usb-host", "passthrough-device"),
        ("vhost-user-fs-pci", "virtiofs-device"),
        ("vhost-user-blk-pci", "vhost-user-device"),
        ("ivshmem-plain", "shared-memory-device"),
    ],
)
def test_a_device_that_cannot_be_saved_is_refused(kind: str, code: str) -> None:
    entry = {"name": "dev0", "type": f"child<{kind}>"}
    (issue,) = device_issues([entry])
    assert (issue.code, issue.severity) == (code, Severity.BLOCKING)
    assert "dev0" in issue.message


def test_usual_devices_and_properties_are_no_issue() -> None:
    entries = [
        {"name": "net0", "type": "child<virtio-net-pci>"},
        {"name": "type", "type": "string"},
    ]
    assert device_issues(entries) == []


def test_a_device_that_is_not_on_the_command_line_was_plugged_in_later() -> None:
    argv = ("qemu", "-device", "virtio-rng-pci,id=a", "-device", '{"driver":"x","id":"b"}')
    assert hot_plug_issues(["a", "b"], argv) == []
    assert codes(hot_plug_issues(["a", "c"], argv)) == ["hot-plugged-device"]


def test_only_disks_the_guest_can_write_are_refused() -> None:
    blocks: list[dict[str, Any]] = [
        {"device": "cd0", "inserted": {"ro": True}},
        {"device": "empty"},
        {"device": "hd0", "inserted": {"ro": False}},
    ]
    (issue,) = disk_issues(blocks)
    assert issue.code == "writable-disk"
    assert "hd0" in issue.message


def test_what_qemu_says_against_migration_is_repeated() -> None:
    assert migration_issues({"status": "none"}) == []
    (issue,) = migration_issues({"blocked-reasons": ["9p is mounted"]})
    assert issue.code == "migration-blocked"
    assert "9p" in issue.message


def test_passed_descriptors_and_named_memory_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "ram"
    file.touch()
    memory = "memory-backend-file,id=m,size=1M,mem-path="
    argv = ("qemu", "-add-fd", "fd=3,set=1", "-object", f"{memory}{file}")
    assert codes(argv_issues(argv)) == ["passed-descriptor", "memory-in-named-file"]
    assert argv_issues(("qemu", "-object", f"{memory}{tmp_path}")) == []


@pytest.mark.parametrize(
    ("line", "argv", "code"),
    [
        ("n0: index=0,type=user,net=10.0.2.0", ("-netdev", "user,id=n0"), "netdev-not-tap"),
        ("n0: index=0,type=tap,fd=33", ("-netdev", "tap,id=n0,fd=33"), "tap-by-descriptor"),
        ("n0: index=0,type=vhost-user,", (), "vhost-user-device"),
        ("n0: index=0,type=tap,ifname=t,script=no", (), "netdev-without-id"),
    ],
)
def test_a_nic_whose_output_cannot_be_held_is_refused(
    line: str, argv: tuple[str, ...], code: str
) -> None:
    text = f"nic.0: index=0,type=nic,model=e1000,macaddr=52:54:00:12:34:56\n \\ {line}\n"
    assert codes(nic_issues(parse_network(text), ("qemu", *argv))) == [code]


def needs_of(argv: str) -> list[OutputNeed]:
    line = "n0: index=0,type=tap,ifname=t,script=no"
    text = f"nic.0: index=0,type=nic,model=e1000,macaddr=52:54:00:12:34:56\n \\ {line}\n"
    running = parse_network(text)
    assert nic_issues(running, ("qemu", "-netdev", argv)) == []
    return output_needs(running, ("qemu", "-netdev", argv))


KERNEL_PLUG = PlugOutlook(("qdisc", "filter"))
NO_MODULE = PlugOutlook(("filter",), (("qdisc", "modprobe -a ifb sch_plug"),))


def choose(
    needs: list[OutputNeed],
    outlook: PlugOutlook,
    objection: tuple[str, str] | None = None,
    *,
    zero_copy: bool = False,
) -> tuple[str, list[str]]:
    name, issues = choose_plug(needs, outlook, lambda _: objection, zero_copy=zero_copy)
    assert bool(name) != bool(issues)
    return name, codes(issues)


def test_vhost_is_refused_only_where_the_filters_must_hold() -> None:
    plain, vhost = needs_of("tap,id=n0,ifname=t"), needs_of("tap,id=n0,ifname=t,vhost=on")
    assert choose(plain, NO_MODULE) == ("filter", [])
    assert choose(plain, KERNEL_PLUG) == ("qdisc", [])
    assert choose(vhost, KERNEL_PLUG) == ("qdisc", [])
    assert choose(vhost, NO_MODULE) == ("", ["vhost-with-filter-plug"])
    _, (issue,) = choose_plug(vhost, NO_MODULE, lambda _: None)
    assert "modprobe -a ifb sch_plug" in issue.message
    assert (plugs_serving(plain), plugs_serving(vhost)) == (("qdisc", "filter"), ("qdisc",))


def test_a_tap_that_somebody_filters_falls_back_to_the_filters_if_they_serve() -> None:
    why = ("ingress-filtered", "tap t has filters")
    assert choose(needs_of("tap,id=n0,ifname=t"), KERNEL_PLUG, why) == ("filter", [])
    found = choose(needs_of("tap,id=n0,ifname=t,vhost=on"), KERNEL_PLUG, why)
    assert found == ("", ["ingress-filtered", "vhost-with-filter-plug"])


def test_vhost_that_does_not_copy_is_refused() -> None:
    vhost = needs_of("tap,id=n0,ifname=t,vhost=on")
    found = choose(vhost, PlugOutlook(("qdisc",)), zero_copy=True)
    assert found == ("", ["vhost-zero-copy"])
    plain = needs_of("tap,id=n0,ifname=t")
    assert choose(plain, PlugOutlook(("qdisc",)), zero_copy=True) == ("qdisc", [])


def test_a_host_without_the_plug_it_is_told_to_use_says_what_is_missing() -> None:
    outlook = PlugOutlook((), (("qdisc", "modprobe -a ifb sch_plug"),))
    _, (issue,) = choose_plug(needs_of("tap,id=n0,ifname=t"), outlook, lambda _: None)
    assert (issue.code, issue.message) == ("no-qdisc-plug", "modprobe -a ifb sch_plug")


def test_several_queues_are_counted_and_refused() -> None:
    text = "".join(
        f"nic.0: index={i},type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\n"
        f" \\ n0: index={i},type=tap,ifname=t,script=no\n"
        for i in range(2)
    )
    running = parse_network(text)
    assert [nic.queue_count for nic in running] == [2]
    argv = ("qemu", "-netdev", "tap,id=n0,ifname=t,queues=2")
    needs = output_needs(running, argv)
    assert choose(needs, NO_MODULE) == ("", ["several-queues-with-filter-plug"])
    assert choose(needs, KERNEL_PLUG) == ("qdisc", [])


def test_no_nic_is_a_warning() -> None:
    (issue,) = nic_issues([], ("qemu",))
    assert (issue.code, issue.severity) == ("no-nic", Severity.WARNING)


@pytest.mark.parametrize(
    ("name", "vm"),
    [("web", "web"), ("Web Server 1", "web-server-1"), ("", "vm"), ("---", "vm")],
)
def test_a_name_becomes_an_id(name: str, vm: str) -> None:
    assert vm_id_of(name) == vm
