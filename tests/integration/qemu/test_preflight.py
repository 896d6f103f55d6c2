"""Preflight on real QEMUs: it finds what stands against protection and changes nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast_agent.hypervisor.discovery import facts_of
from holdfast_agent.hypervisor.holding import argv_of
from holdfast_agent.hypervisor.preflight import Examination, examine
from holdfast_agent.hypervisor.qmp import QmpConnection

pytestmark = [pytest.mark.qemu, pytest.mark.netns]


def look(qemu: Any) -> Examination:
    qmp = qemu.connect()
    try:
        return examine(qmp, qemu.process.pid, argv_of(qemu.process.pid))
    finally:
        qmp.close()


def codes(found: Examination) -> set[str]:
    return {issue.code for issue in found.issues}


def surroundings(qmp: QmpConnection) -> Any:
    return [
        qmp.execute("query-status"),
        qmp.execute("qom-list", {"path": "/objects"}),
        qmp.execute("query-chardev"),
        qmp.execute("query-fdsets"),
        qmp.human("info network"),
    ]


def test_a_sound_vm_is_protectable(start_qemu: Callable[..., Any], outside: Any) -> None:
    tap = outside.add_tap()
    qemu = start_qemu(
        *("-netdev", f"tap,id=n0,ifname={tap},script=no,downscript=no"),
        *("-device", "virtio-net-pci,netdev=n0,mac=52:54:00:77:00:02,romfile="),
        name="web",
    )
    found = look(qemu)
    assert found.issues == ()
    assert found.protectable
    (nic,) = found.nics
    assert (nic.netdev_id, nic.tap, nic.bridge) == ("n0", tap, outside.bridge)
    assert nic.mac == "52:54:00:77:00:02"
    qmp = qemu.connect()
    facts = facts_of(qmp)
    qmp.close()
    assert facts is not None
    assert (facts.vm, facts.running, facts.pid) == ("web", True, qemu.process.pid)
    assert (facts.memory_bytes, facts.vcpus, facts.bridges) == (128 << 20, 1, (outside.bridge,))
    assert facts.start_ticks > 0


def test_looking_changes_nothing(start_qemu: Callable[..., Any]) -> None:
    qemu = start_qemu("-nic", "user,id=u0,model=e1000")
    qmp = qemu.connect()
    before = surroundings(qmp)
    examine(qmp, qemu.process.pid, qemu.argv)
    assert surroundings(qmp) == before
    assert qmp.poll_events() == []
    qmp.close()


def test_every_issue_of_a_bad_vm_is_found_at_once(
    start_qemu: Callable[..., Any], tmp_path: Path
) -> None:
    disk, memory = tmp_path / "disk.img", tmp_path / "memory"
    disk.write_bytes(bytes(1 << 20))
    qemu = start_qemu(
        *("-machine", "q35,memory-backend=m0", "-m", "64", "-S", "-vga", "std"),
        *("-object", f"memory-backend-file,id=m0,size=64M,mem-path={memory},share=on"),
        *("-drive", f"file={disk},format=raw,if=virtio"),
        *("-drive", f"file={disk},format=raw,if=virtio,readonly=on,file.locking=off"),
        *("-netdev", "user,id=u0", "-device", "e1000,netdev=u0"),
    )
    found = look(qemu)
    assert codes(found) == {
        "not-running",
        "writable-disk",
        "netdev-not-tap",
        "memory-in-named-file",
        "video-memory-unmapped",
    }
    assert not found.protectable
    assert sum(issue.code == "writable-disk" for issue in found.issues) == 1


def test_a_device_plugged_in_later_is_found(start_qemu: Callable[..., Any]) -> None:
    qemu = start_qemu("-machine", "pc", "-m", "64")
    qmp = qemu.connect()
    qmp.execute("device_add", {"driver": "qemu-xhci", "id": "late"})
    qmp.close()
    assert "hot-plugged-device" in codes(look(qemu))


def test_an_unversioned_machine_is_refused(start_qemu: Callable[..., Any]) -> None:
    assert "machine-unversioned" in codes(look(start_qemu("-machine", "microvm", "-m", "64")))


def test_a_tap_given_as_descriptor_is_refused(start_qemu: Callable[..., Any], outside: Any) -> None:
    tap = outside.add_tap()
    qemu = start_qemu("-netdev", f"tap,id=n0,ifname={tap},script=no", "-device", "e1000,netdev=n0")
    argv = ("qemu", "-netdev", "tap,id=n0,fd=33")
    qmp = qemu.connect()
    found = examine(qmp, qemu.process.pid, argv)
    qmp.close()
    assert "tap-by-descriptor" in codes(found)


def test_a_tap_on_no_bridge_is_a_warning(start_qemu: Callable[..., Any], outside: Any) -> None:
    from holdfast_agent.network.taps import create_tap, remove_tap  # noqa: PLC0415 - only here

    name = f"{outside.bridge}x"
    create_tap(name, None)
    qemu = start_qemu("-netdev", f"tap,id=n0,ifname={name},script=no", "-device", "e1000,netdev=n0")
    found = look(qemu)
    remove_tap(name)
    assert codes(found) == {"tap-without-bridge"}
    assert found.protectable


def test_a_vm_without_a_name_or_in_waiting_is_none(start_qemu: Callable[..., Any]) -> None:
    qemu = start_qemu("-incoming", "defer", name="waiting")
    qmp = qemu.connect()
    assert facts_of(qmp) is None
    qmp.close()
