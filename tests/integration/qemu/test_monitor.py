"""The monitor connection and the machine behind it, on real QEMUs."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from holdfast_agent.core.failures import (
    MonitorBusy,
    VirtualMachineFailed,
    VirtualMachineGone,
    VirtualMachineNotRunning,
)
from holdfast_agent.hypervisor.machine import QemuMachine, shutdown_action_of
from holdfast_agent.hypervisor.qmp import QmpConnection

pytestmark = pytest.mark.qemu


def test_a_second_client_is_told_that_the_monitor_is_busy(start_qemu: Callable[..., Any]) -> None:
    qemu = start_qemu()
    first = qemu.connect()
    with pytest.raises(MonitorBusy, match="busy"):
        QmpConnection.connect(qemu.qmp_path, timeout_s=0.1)
    assert first.peer_pid == qemu.process.pid
    first.close()
    qemu.connect().close()


def test_a_socket_with_nobody_behind_it_is_gone(start_qemu: Callable[..., Any]) -> None:
    qemu = start_qemu()
    qemu.kill()
    with pytest.raises(VirtualMachineGone, match="no QEMU answers"):
        qemu.connect()


def test_a_killed_qemu_is_gone(start_qemu: Callable[..., Any]) -> None:
    qemu = start_qemu()
    machine = QemuMachine.attach(qemu.qmp_path)
    qemu.kill()
    assert [event.name for event in machine.poll_events()] == ["GONE"]
    with pytest.raises(VirtualMachineGone):
        machine.resume()
    machine.close()


def test_qemu_says_what_it_is(start_qemu: Callable[..., Any]) -> None:
    qemu = start_qemu("-smp", "2", "-machine", "pc", "-m", "64")
    machine = QemuMachine.attach(qemu.qmp_path)
    assert machine.identity.machine_type.startswith("pc-i440fx-")
    assert (machine.accelerator, machine.identity.vcpus) == ("tcg", 2)
    assert machine.pid == qemu.process.pid
    assert machine.identity.qemu_version[0].isdigit()
    machine.close()


def test_many_answers_do_not_choke_the_connection(start_qemu: Callable[..., Any]) -> None:
    qmp = start_qemu().connect()
    tickets = [qmp.queue("query-commands") for _ in range(300)]
    qmp.flush()
    sizes = {len(qmp.wait(ticket)) for ticket in tickets}
    assert len(sizes) == 1
    qmp.close()


def test_a_capture_saves_the_devices_and_the_guest_runs_on(start_qemu: Callable[..., Any]) -> None:
    qemu = start_qemu()
    machine = QemuMachine.attach(qemu.qmp_path)
    states = []
    for _ in range(3):
        machine.begin_stop()
        machine.wait_stopped()
        machine.begin_save()
        states.append(machine.wait_saved())
        machine.resume()
        assert machine.qmp.execute("query-status")["status"] == "running"
    assert all(state[:4] == b"QEVM" for state in states)
    assert len({len(state) for state in states}) == 1
    events = [event.name for event in machine.poll_events()]
    assert events[-2:] == ["STOP", "RESUME"]
    machine.close()


def test_a_capture_may_be_given_up_and_taken_again(start_qemu: Callable[..., Any]) -> None:
    machine = QemuMachine.attach(start_qemu().qmp_path)
    machine.begin_stop()
    machine.wait_stopped()
    machine.resume()
    assert machine.qmp.execute("query-status")["status"] == "running"
    machine.begin_stop()
    machine.wait_stopped()
    machine.begin_save()
    machine.resume()
    assert machine.qmp.execute("query-status")["status"] == "running"
    machine.begin_stop()
    machine.wait_stopped()
    machine.begin_save()
    assert machine.wait_saved()[:4] == b"QEVM"
    machine.stop()
    assert machine.qmp.execute("query-status")["status"] == "paused"
    machine.resume_if_ours()
    assert machine.qmp.execute("query-status")["status"] == "running"
    machine.close()


def test_a_final_capture_leaves_the_guest_standing(start_qemu: Callable[..., Any]) -> None:
    qemu = start_qemu()
    machine = QemuMachine.attach(qemu.qmp_path)
    machine.begin_stop()
    machine.wait_stopped()
    machine.begin_save()
    machine.wait_saved()
    machine.close()
    qmp = qemu.connect()
    assert qmp.execute("query-status")["status"] == "paused"
    qmp.close()


def test_a_guest_that_stood_already_is_noticed_and_left_so(start_qemu: Callable[..., Any]) -> None:
    machine = QemuMachine.attach(start_qemu().qmp_path)
    machine.stop()
    machine.begin_stop()
    with pytest.raises(VirtualMachineNotRunning) as failure:
        machine.wait_stopped()
    assert failure.value.status == "paused"
    assert machine.qmp.execute("query-status")["status"] == "paused"
    machine.close()


def test_capturing_leaks_no_descriptors_in_qemu(start_qemu: Callable[..., Any]) -> None:
    qemu = start_qemu()
    machine = QemuMachine.attach(qemu.qmp_path)

    def count() -> int:
        return len(os.listdir(f"/proc/{qemu.process.pid}/fd"))  # noqa: PTH208 - only counted

    machine.begin_stop()
    machine.wait_stopped()
    machine.begin_save()
    machine.wait_saved()
    machine.resume()
    before = count()
    for _ in range(20):
        machine.begin_stop()
        machine.wait_stopped()
        machine.begin_save()
        machine.wait_saved()
        machine.resume()
    assert count() == before
    machine.close()
    qmp = qemu.connect()
    assert qmp.execute("query-fdsets") == []
    qmp.close()


def test_a_shutdown_from_inside_leaves_qemu_behind_to_tell(
    start_qemu: Callable[..., Any], guest_images: Any
) -> None:
    kernel, image = guest_images
    qemu = start_qemu(
        *("-kernel", str(kernel), "-initrd", str(image)),
        *("-append", "console=ttyS0 quiet poweroff no_timer_check"),
    )
    machine = QemuMachine.attach(qemu.qmp_path)
    event = machine.qmp.wait_event(("SHUTDOWN",), timeout_s=90)
    assert event is not None
    assert (event.name, event.reason) == ("SHUTDOWN", "guest-shutdown")
    assert machine.qmp.execute("query-status")["status"] == "shutdown"
    with pytest.raises(VirtualMachineFailed, match="Resetting"):
        machine.resume()
    machine.begin_stop()
    with pytest.raises(VirtualMachineNotRunning) as failure:
        machine.wait_stopped()
    assert failure.value.status == "shutdown"
    machine.resume_if_ours()
    assert machine.qmp.execute("query-status")["status"] == "shutdown"
    machine.close()


def test_after_letting_go_a_shutdown_ends_qemu_again(
    start_qemu: Callable[..., Any], guest_images: Any
) -> None:
    kernel, image = guest_images
    qemu = start_qemu(
        *("-kernel", str(kernel), "-initrd", str(image)),
        *("-append", "console=ttyS0 quiet poweroff no_timer_check"),
    )
    QemuMachine.attach(qemu.qmp_path).close()
    assert qemu.process.wait(timeout=60) == 0


@pytest.mark.parametrize(
    ("argv", "action"),
    [
        (("qemu",), "poweroff"),
        (("qemu", "-no-shutdown"), "pause"),
        (("qemu", "-action", "panic=none,shutdown=pause"), "pause"),
        (("qemu", "-no-shutdown", "-action", "shutdown=poweroff"), "poweroff"),
        (("qemu", "-action", "reboot=shutdown"), "poweroff"),
    ],
)
def test_the_action_on_shutdown_is_read_from_the_command_line(
    argv: tuple[str, ...], action: str
) -> None:
    assert shutdown_action_of(argv) == action


def test_killing_ends_the_process_also_when_it_hangs(start_qemu: Callable[..., Any]) -> None:
    qemu = start_qemu()
    machine = QemuMachine.attach(qemu.qmp_path)
    os.kill(qemu.process.pid, signal.SIGSTOP)
    machine.kill()
    assert qemu.process.poll() is not None
    machine.kill()
