"""A standby on a real QEMU: filled from outside, promoted, destroyed, found again after a crash."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyroute2 import IPRoute

from holdfast_agent.core.failures import VirtualMachineFailed
from holdfast_agent.core.memory_map import MemoryMap
from holdfast_agent.core.vm_spec import VmSpec
from holdfast_agent.host.processes import start_ticks_of
from holdfast_agent.hypervisor.guest_memory import locate_blocks, locate_named_blocks
from holdfast_agent.hypervisor.holding import QemuHolding, note_path_of, remove_remains
from holdfast_agent.hypervisor.machine import QemuMachine
from holdfast_agent.hypervisor.standby import QemuStandby
from holdfast_agent.memory import GuestMemory
from holdfast_agent.memory.location import BlockLocation

pytestmark = [pytest.mark.qemu, pytest.mark.netns]


@pytest.fixture
def dirs(tmp_path: Path) -> dict[str, Path]:
    return {"run_dir": tmp_path / "run", "state_dir": tmp_path / "state"}


@pytest.fixture
def make_standby(dirs: dict[str, Path]) -> Iterator[Callable[..., QemuStandby]]:
    made: list[tuple[QemuStandby, str]] = []

    def make(spec: VmSpec, **more: Any) -> QemuStandby:
        run_dir, state_dir = dirs["run_dir"], dirs["state_dir"]
        standby = QemuStandby(spec, run_dir=run_dir, state_dir=state_dir, **more)
        made.append((standby, spec.vm))
        return standby

    yield make
    for standby, vm in made:
        standby.destroy()
        remove_remains(vm, dirs["run_dir"])
        if standby.pid:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(standby.pid, 0)


def spec_of(machine: QemuMachine, vm: str = "vm") -> tuple[VmSpec, list[BlockLocation]]:
    blocks = locate_blocks(machine.qmp, machine.pid)
    memory_map = MemoryMap.of_sizes((block.name, block.size_bytes) for block in blocks)
    return machine.spec(vm, memory_map), blocks


def opener(spec: VmSpec) -> Callable[[int, Sequence[BlockLocation]], GuestMemory]:
    return lambda pid, blocks: GuestMemory(pid, blocks, spec.memory_map)


def fill(standby: QemuStandby, primary: GuestMemory) -> None:
    indexes = primary.populated()
    rows = np.empty((len(indexes), 4096), dtype=np.uint8)
    primary.copy_out(indexes, rows)
    standby.memory.copy_in(indexes, rows)


def stopped_and_saved(machine: QemuMachine) -> bytes:
    machine.begin_capture(final=True)
    machine.wait_standing()
    return machine.finish_capture()


def link_is_up(name: str) -> bool | None:
    with IPRoute() as netlink:
        found = netlink.link_lookup(ifname=name)
        return bool(netlink.get_links(found[0])[0]["flags"] & 1) if found else None


def test_a_guest_goes_on_in_its_standby_where_it_was(
    start_qemu: Any, ping_argv: Any, outside: Any, lib: Any, make_standby: Any
) -> None:
    qemu = start_qemu(*ping_argv(outside.add_tap()))
    lib.wait_booted(qemu)
    machine = QemuMachine.attach(qemu.qmp_path)
    spec, blocks = spec_of(machine)
    assert spec.nics[0].bridge == outside.bridge
    standby_tap = f"{outside.taps[0]}s"
    standby = make_standby(spec, taps={"n0": standby_tap})
    standby.start(opener(spec))
    assert link_is_up(standby_tap) is False
    assert outside.pings(5, enough=5)

    state = stopped_and_saved(machine)
    before = outside.pings(0.3)
    memory = GuestMemory(machine.pid, blocks, spec.memory_map)
    fill(standby, memory)
    memory.close()
    machine.kill()
    machine.close()
    assert not standby.has_ended()

    standby.promote(state)
    assert link_is_up(standby_tap)
    frames = outside.frames(2, enough=40)
    announcements = [frame for frame in frames if frame[12:14] == b"\x80\x35"]
    numbers = [n for n in map(lib.ping_number, frames) if n is not None]
    assert frames[0] in announcements, "the first thing said is where the guest is now"
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert not before or numbers[0] == before[-1] + 1

    promoted = standby.into_machine()
    assert promoted.qmp.execute("query-status")["status"] == "running"
    standby.destroy()
    assert promoted.qmp.execute("query-status")["status"] == "running"
    promoted.begin_capture(final=False)
    promoted.wait_standing()
    promoted.finish_capture()
    promoted.close()


@pytest.mark.parametrize("machine_type", ["q35", "pc"])
def test_video_memory_of_a_standby_is_where_it_turns_out_to_be(
    start_qemu: Any, make_standby: Any, machine_type: str, lib: Any
) -> None:
    qemu = start_qemu("-machine", machine_type, "-m", "64", "-vga", "std")
    machine = QemuMachine.attach(qemu.qmp_path)
    found: list[tuple[VmSpec, list[BlockLocation]]] = []

    def located() -> bool:
        with contextlib.suppress(ValueError):
            found.append(spec_of(machine))
        return bool(found)

    lib.wait_for(located, 10, "the firmware to map the video memory")
    spec, blocks = found[0]
    assert [name for name, _ in spec.blocks] == ["pc.ram", "vga.vram"]
    standby = make_standby(spec)
    opened: list[BlockLocation] = []

    def open_memory(pid: int, standby_blocks: Sequence[BlockLocation]) -> GuestMemory:
        opened.extend(standby_blocks)
        return GuestMemory(pid, standby_blocks, spec.memory_map)

    standby.start(open_memory)
    state = stopped_and_saved(machine)
    memory = GuestMemory(machine.pid, blocks, spec.memory_map)
    fill(standby, memory)
    memory.close()
    machine.kill()
    standby.promote(state)
    promoted = standby.into_machine()
    assert locate_blocks(promoted.qmp, promoted.pid) == opened
    promoted.close()


def test_a_standby_leaves_nothing_behind(
    start_qemu: Any, outside: Any, make_standby: Any, dirs: dict[str, Path]
) -> None:
    tap = outside.add_tap()
    netdev = f"tap,id=n0,ifname={tap},script=no,downscript=no"
    machine = QemuMachine.attach(
        start_qemu("-netdev", netdev, "-device", "e1000,netdev=n0,romfile=").qmp_path
    )
    spec, _ = spec_of(machine)
    standby = make_standby(spec, taps={"n0": f"{tap}s"})
    standby.start(opener(spec))
    pid = standby.pid
    assert start_ticks_of(pid)
    standby.destroy()
    standby.destroy()
    assert start_ticks_of(pid) == 0
    assert link_is_up(f"{tap}s") is None
    assert [path for d in dirs.values() for path in d.rglob("*") if not path.is_dir()] == []
    assert not (dirs["state_dir"] / "standbys" / "vm").exists()
    machine.close()


def test_what_a_crashed_worker_left_is_removed_by_its_note(
    start_qemu: Any, make_standby: Any, dirs: dict[str, Path]
) -> None:
    machine = QemuMachine.attach(start_qemu().qmp_path)
    spec, _ = spec_of(machine)
    standby = make_standby(spec)
    standby.start(opener(spec))
    pid = standby.pid
    note = QemuHolding.read("vm", dirs["run_dir"])
    assert note is not None
    assert note.process() == (pid, start_ticks_of(pid))
    # as if the worker had died between starting QEMU and noting its pid:
    note.model_copy(update={"pid": 0, "start_ticks": 0}).write()
    remove_remains("vm", dirs["run_dir"])
    assert start_ticks_of(pid) == 0
    assert standby.has_ended()
    assert not note_path_of("vm", dirs["run_dir"]).exists()
    remove_remains("vm", dirs["run_dir"])
    machine.close()


def test_a_reused_pid_is_not_taken_for_the_old_process(dirs: dict[str, Path]) -> None:
    (dirs["run_dir"] / "vms").mkdir(parents=True)
    planned = QemuHolding.planned("vm", dirs["run_dir"], dirs["state_dir"], ())
    note = planned.started(os.getpid(), ("qemu",)).model_copy(update={"start_ticks": 1})
    note.write()
    assert note.process() is None
    remove_remains("vm", dirs["run_dir"])
    assert QemuHolding.read("vm", dirs["run_dir"]) is None


def test_a_second_start_takes_the_place_of_an_old_standby(
    start_qemu: Any, make_standby: Any
) -> None:
    machine = QemuMachine.attach(start_qemu().qmp_path)
    spec, _ = spec_of(machine)
    first, second = make_standby(spec), make_standby(spec)
    first.start(opener(spec))
    second.start(opener(spec))
    assert first.has_ended()
    assert not second.has_ended()
    second.destroy()
    machine.close()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"machine_type": "pc-q35-6.2"}, None),
        ({"machine_type": "pc-q35-99.9"}, "unsupported machine type"),
        ({"qemu_version": "9.9.9"}, "must be the same"),
        ({"accelerator": "kvm"}, "must be the same"),
        ({"blocks": (("pc.ram", 64 << 20),)}, "has memory"),
        ({"blocks": (("dimm7", 64 << 20),)}, "0 RAM blocks"),
    ],
)
def test_a_standby_that_would_differ_is_refused_and_nothing_is_left(
    start_qemu: Any,
    make_standby: Any,
    dirs: dict[str, Path],
    change: dict[str, Any],
    complaint: str | None,
) -> None:
    machine = QemuMachine.attach(start_qemu().qmp_path)
    spec, _ = spec_of(machine)
    machine.close()
    standby = make_standby(spec.model_copy(update=change))
    if complaint is None:  # an older machine of the same QEMU is as good as any
        standby.start(opener(spec))
        return
    with pytest.raises(VirtualMachineFailed, match=complaint):
        standby.start(opener(spec))
    assert list((dirs["run_dir"] / "vms").iterdir()) == []


def test_a_missing_bridge_is_named(start_qemu: Any, outside: Any, make_standby: Any) -> None:
    tap = outside.add_tap()
    netdev = f"tap,id=n0,ifname={tap},script=no,downscript=no"
    machine = QemuMachine.attach(
        start_qemu("-netdev", netdev, "-device", "e1000,netdev=n0,romfile=").qmp_path
    )
    spec, _ = spec_of(machine)
    machine.close()
    nic = spec.nics[0].model_copy(update={"bridge": "hf-nowhere", "tap": f"{tap}s"})
    with pytest.raises(VirtualMachineFailed, match="no bridge hf-nowhere"):
        make_standby(spec.model_copy(update={"nics": (nic,)})).start(opener(spec))
    assert link_is_up(f"{tap}s") is None


def test_a_state_of_another_machine_fails_with_qemus_own_words(
    start_qemu: Any, make_standby: Any
) -> None:
    machine = QemuMachine.attach(start_qemu("-device", "virtio-rng-pci").qmp_path)
    state = stopped_and_saved(machine)
    machine.close()
    other = QemuMachine.attach(start_qemu(name="other").qmp_path)
    spec, _ = spec_of(other, "other")
    other.close()
    standby = make_standby(spec)
    standby.start(opener(spec))
    with pytest.raises(VirtualMachineFailed, match="virtio-rng"):
        standby.promote(state)


def test_a_state_that_is_none_is_refused(start_qemu: Any, make_standby: Any) -> None:
    machine = QemuMachine.attach(start_qemu().qmp_path)
    spec, _ = spec_of(machine)
    machine.close()
    standby = make_standby(spec)
    standby.start(opener(spec))
    with pytest.raises(VirtualMachineFailed, match="too short"):
        standby.promote(b"")


def test_a_killed_standby_has_ended(start_qemu: Any, make_standby: Any) -> None:
    machine = QemuMachine.attach(start_qemu().qmp_path)
    spec, _ = spec_of(machine)
    machine.close()
    standby = make_standby(spec)
    standby.start(opener(spec))
    os.kill(standby.pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while not standby.has_ended():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_standby_lives_in_a_session_of_its_own(start_qemu: Any, make_standby: Any) -> None:
    machine = QemuMachine.attach(start_qemu().qmp_path)
    spec, _ = spec_of(machine)
    machine.close()
    standby = make_standby(spec)
    standby.start(opener(spec))
    assert os.getsid(standby.pid) == standby.pid


def test_all_of_a_four_gigabyte_guest_is_one_block(start_qemu: Any, lib: Any) -> None:
    qemu = start_qemu("-machine", "pc", "-m", "4096", "-vga", "std")
    qmp = qemu.connect()
    found: list[list[BlockLocation]] = []

    def located() -> bool:
        with contextlib.suppress(ValueError):
            found.append(locate_blocks(qmp, qemu.process.pid))
        return bool(found)

    lib.wait_for(located, 10, "the firmware to map the video memory")
    assert [(b.name, b.size_bytes, b.shared) for b in found[0]] == [
        ("pc.ram", 4096 << 20, False),
        ("vga.vram", 16 << 20, False),
    ]
    again = locate_named_blocks(qmp, qemu.process.pid, ["vga.vram", "pc.ram"])
    assert again == found[0][::-1]
    qmp.close()


def test_shared_memory_is_found_with_the_file_to_map(start_qemu: Any) -> None:
    qemu = start_qemu(
        *("-machine", "q35,memory-backend=ram0", "-m", "64"),
        *("-object", "memory-backend-memfd,id=ram0,size=64M,share=on"),
    )
    qmp = qemu.connect()
    (block,) = locate_blocks(qmp, qemu.process.pid)
    assert (block.name, block.size_bytes, block.shared) == ("ram0", 64 << 20, True)
    assert block.map_path is not None
    descriptor = os.open(block.map_path, os.O_RDWR)
    offset = block.file_offset + 0x80000
    os.pwrite(descriptor, b"from outside", offset)
    with Path(f"/proc/{qemu.process.pid}/mem").open("rb") as memory:
        memory.seek(block.host_address + 0x80000)
        assert memory.read(12) == b"from outside"
    os.close(descriptor)
    qmp.close()
