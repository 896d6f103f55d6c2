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
from holdfast_agent.hypervisor import state_pipe
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


@pytest.mark.parametrize("through_pipe", [True, False], ids=["pipe", "file"])
def test_a_capture_saves_the_devices_and_the_guest_runs_on(
    start_qemu: Callable[..., Any], *, through_pipe: bool
) -> None:
    qemu = start_qemu()
    machine = QemuMachine(qemu.connect(), through_pipe=through_pipe)
    states = []
    for _ in range(3):
        machine.prepare()
        machine.begin_capture(final=False)
        machine.wait_standing()
        states.append(machine.finish_capture())
        assert machine.qmp.execute("query-status")["status"] == "running"
    machine.begin_capture(final=False)  # nothing was prepared
    machine.wait_standing()
    states.append(machine.finish_capture())
    # Whole, from the magic to the end mark. How long they are depends on what the firmware does.
    assert all(state[:4] == b"QEVM" and state[-1:] == b"\0" for state in states)
    assert min(map(len, states)) > 0.9 * max(map(len, states))
    events = [event.name for event in machine.poll_events()]
    assert events[-2:] == ["STOP", "RESUME"]
    machine.close()


@pytest.mark.parametrize("through_pipe", [True, False], ids=["pipe", "file"])
def test_the_guest_stands_until_the_capture_is_finished(
    start_qemu: Callable[..., Any], *, through_pipe: bool
) -> None:
    machine = QemuMachine(start_qemu().connect(), through_pipe=through_pipe)
    for _ in range(2):  # the second time the pipe has the size that fits
        machine.begin_capture(final=False)
        machine.wait_standing()
        machine.poll_events()
        assert machine.qmp.wait_event(["RESUME"], timeout_s=0.3) is None
        machine.finish_capture()
        assert machine.qmp.saw_event("RESUME")
    machine.close()


@pytest.mark.parametrize("through_pipe", [True, False], ids=["pipe", "file"])
@pytest.mark.parametrize("final", [False, True])
def test_a_capture_may_be_given_up_and_taken_again(
    start_qemu: Callable[..., Any], *, through_pipe: bool, final: bool
) -> None:
    machine = QemuMachine(start_qemu().connect(), through_pipe=through_pipe)
    for _ in range(2):
        machine.begin_capture(final=final)
        machine.wait_standing()
        machine.abandon_capture()
        machine.abandon_capture()
        assert machine.qmp.execute("query-status")["status"] == "running"
    machine.begin_capture(final=False)
    machine.wait_standing()
    assert machine.finish_capture()[:4] == b"QEVM"
    machine.stop()
    assert machine.qmp.execute("query-status")["status"] == "paused"
    machine.resume_if_ours()
    assert machine.qmp.execute("query-status")["status"] == "running"
    machine.close()


@pytest.mark.parametrize("through_pipe", [True, False], ids=["pipe", "file"])
def test_a_final_capture_leaves_the_guest_standing(
    start_qemu: Callable[..., Any], *, through_pipe: bool
) -> None:
    qemu = start_qemu()
    machine = QemuMachine(qemu.connect(), through_pipe=through_pipe)
    machine.prepare()
    machine.begin_capture(final=True)
    machine.wait_standing()
    assert machine.finish_capture()[:4] == b"QEVM"
    machine.close()
    qmp = qemu.connect()
    assert qmp.execute("query-status")["status"] == "paused"
    qmp.close()


def test_a_guest_runs_again_when_its_captor_dies(start_qemu: Callable[..., Any]) -> None:
    qemu = start_qemu()
    child = os.fork()
    if child == 0:  # the worker, which dies without a word while the guest stands
        machine = QemuMachine.attach(qemu.qmp_path)
        machine.begin_capture(final=False)
        machine.wait_standing()
        os.kill(os.getpid(), signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    heir = QemuMachine.attach(qemu.qmp_path)
    assert heir.qmp.execute("query-status")["status"] == "running"
    assert len(heir.qmp.execute("query-fdsets")) == 1  # its own: what the dead one left is gone
    heir.close()


def test_a_qemu_that_can_not_open_the_pipe_saves_into_a_file(
    start_qemu: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fchown", lambda *_: None)  # so that only root may open it
    machine = QemuMachine.attach(start_qemu("-runas", "nobody").qmp_path)
    machine.begin_capture(final=False)
    with pytest.raises(VirtualMachineFailed, match="/proc/self/fd"):
        machine.wait_standing()
    machine.begin_capture(final=False)
    machine.wait_standing()
    assert machine.finish_capture()[:4] == b"QEVM"
    assert machine.qmp.execute("query-status")["status"] == "running"
    machine.close()


def test_a_qemu_of_another_user_opens_the_pipe(start_qemu: Callable[..., Any]) -> None:
    machine = QemuMachine.attach(start_qemu("-runas", "nobody").qmp_path)
    machine.begin_capture(final=False)
    machine.wait_standing()
    assert machine.finish_capture()[:4] == b"QEVM"
    machine.close()


def test_a_state_that_fitted_into_the_pipe_is_no_checkpoint(
    start_qemu: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_pipe, "SMALLEST_BYTES", 1 << 20)
    machine = QemuMachine.attach(start_qemu().qmp_path)
    machine.begin_capture(final=False)
    machine.wait_standing()
    with pytest.raises(VirtualMachineFailed, match="may have run"):
        machine.finish_capture()
    monkeypatch.undo()
    machine.begin_capture(final=False)
    machine.wait_standing()
    assert machine.finish_capture()[:4] == b"QEVM"
    machine.close()


def test_a_guest_that_stood_already_is_noticed_and_left_so(start_qemu: Callable[..., Any]) -> None:
    machine = QemuMachine.attach(start_qemu().qmp_path)
    machine.stop()
    machine.begin_capture(final=False)
    with pytest.raises(VirtualMachineNotRunning) as failure:
        machine.wait_standing()
    assert failure.value.status == "paused"
    assert machine.qmp.execute("query-status")["status"] == "paused"
    machine.close()


def test_capturing_leaks_no_descriptors_in_qemu(start_qemu: Callable[..., Any]) -> None:
    qemu = start_qemu()
    machine = QemuMachine.attach(qemu.qmp_path)

    def count() -> int:
        return len(os.listdir(f"/proc/{qemu.process.pid}/fd"))  # noqa: PTH208 - only counted

    machine.begin_capture(final=False)
    machine.wait_standing()
    machine.finish_capture()
    before = count()
    for _ in range(20):
        machine.begin_capture(final=False)
        machine.wait_standing()
        machine.finish_capture()
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
    machine.begin_capture(final=False)
    with pytest.raises(VirtualMachineNotRunning) as failure:
        machine.wait_standing()
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
