"""The plug on a real guest that pings: what leaves is seen from outside of its tap."""

import fcntl
import select
import struct
import termios
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from holdfast_agent.core.failures import VirtualMachineFailed
from holdfast_agent.hypervisor.machine import QemuMachine
from holdfast_agent.network import filter_plug
from holdfast_agent.network.filter_plug import FilterPlug

pytestmark = [pytest.mark.qemu, pytest.mark.netns]

SILENCE_S = 0.5
"""The guest pings every 50 ms: ten pings would be seen."""


@pytest.fixture
def pinging(
    start_qemu: Callable[..., Any], ping_argv: Any, outside: Any, lib: Any
) -> Iterator[QemuMachine]:
    qemu = start_qemu(*ping_argv(outside.add_tap()))
    lib.wait_booted(qemu)
    machine = QemuMachine.attach(qemu.qmp_path)
    assert outside.pings(5, enough=3)
    yield machine
    machine.close()


def capture(machine: QemuMachine, plug: FilterPlug) -> None:
    machine.begin_capture(final=False)
    machine.wait_standing()
    plug.close_epoch()
    machine.finish_capture()


def wait_held(plug: FilterPlug, minimum_bytes: int) -> None:
    deadline = time.monotonic() + 10
    while plug.held_bytes() < minimum_bytes:
        assert time.monotonic() < deadline, "the guest sends nothing"
        plug.drain()
        time.sleep(0.01)


def test_an_installed_plug_lets_output_flow(pinging: QemuMachine, outside: Any) -> None:
    plug = FilterPlug(pinging.qmp, pinging.netdev_ids())
    plug.install()
    assert not plug.leftover_held
    assert outside.pings(5, enough=3)
    assert plug.signal.drain() == 0
    plug.remove()
    assert outside.pings(5, enough=3)
    objects = pinging.qmp.execute("qom-list", {"path": "/objects"})
    assert not [entry for entry in objects if entry["name"].startswith("hf")]
    chardevs = pinging.qmp.execute("query-chardev")
    assert not [entry for entry in chardevs if entry["label"].startswith("hf")]


def test_without_an_acknowledgement_not_one_packet_leaves(
    pinging: QemuMachine, outside: Any
) -> None:
    plug = FilterPlug(pinging.qmp, pinging.netdev_ids())
    plug.install()
    before = outside.pings(5, enough=3)
    plug.hold()
    before += outside.pings(0.1)  # what had left before the plug closed
    wait_held(plug, 500)
    capture(pinging, plug)
    assert outside.frames(SILENCE_S) == []
    wait_held(plug, 1000)
    assert outside.frames(SILENCE_S) == []

    plug.release_one()
    released = outside.pings(1, enough=3) + outside.pings(SILENCE_S)
    assert released, "the closed epoch leaves"
    assert plug.held_bytes() == 0 or plug.drain() >= 0
    assert released == list(range(before[-1] + 1, before[-1] + 1 + len(released)))

    capture(pinging, plug)
    assert outside.frames(SILENCE_S) == []
    plug.release_one()
    second = outside.pings(1, enough=3) + outside.pings(SILENCE_S)
    assert second == list(range(released[-1] + 1, released[-1] + 1 + len(second)))

    plug.release_all()
    rest = outside.pings(2, enough=20)
    assert rest == list(range(second[-1] + 1, second[-1] + 1 + len(rest)))
    plug.remove()


def test_output_that_waits_signals_itself(pinging: QemuMachine) -> None:
    plug = FilterPlug(pinging.qmp, pinging.netdev_ids())
    plug.install()
    plug.hold()
    poller = select.poll()
    poller.register(plug.signal.fileno(), select.POLLIN)
    plug.signal.drain()
    assert poller.poll(5000)
    assert plug.signal.drain() > 0
    assert plug.held_bytes() > 0
    assert not poller.poll(0)
    plug.release_all()
    plug.remove()


def test_a_dead_holders_output_stays_held_for_good(pinging: QemuMachine, outside: Any) -> None:
    plug = FilterPlug(pinging.qmp, pinging.netdev_ids())
    plug.install()
    plug.hold()
    wait_held(plug, 500)
    capture(pinging, plug)
    outside.pings(0.1)
    plug.close()  # what the kernel does for a worker that died
    assert outside.frames(SILENCE_S) == []

    heir = FilterPlug(pinging.qmp, pinging.netdev_ids())
    heir.install()
    assert heir.leftover_held
    assert outside.frames(SILENCE_S) == []
    heir.remove()
    assert outside.frames(SILENCE_S) == []

    heir = FilterPlug(pinging.qmp, pinging.netdev_ids())
    heir.install()
    assert heir.leftover_held
    heir.hold()
    wait_held(heir, 500)
    capture(pinging, heir)
    assert outside.frames(SILENCE_S) == []
    heir.release_one()
    assert outside.pings(2, enough=2)
    heir.release_all()
    assert outside.pings(5, enough=3)
    heir.remove()


def test_released_output_is_not_lost_when_the_plug_goes(pinging: QemuMachine, outside: Any) -> None:
    plug = FilterPlug(pinging.qmp, pinging.netdev_ids())
    plug.install()
    before = outside.pings(5, enough=3)
    plug.hold()
    before += outside.pings(0.1)
    wait_held(plug, 3000)
    plug.release_all()
    plug.remove()
    after = outside.pings(5, enough=40)
    assert sorted(after) == list(range(before[-1] + 1, before[-1] + 1 + len(after)))


def test_output_released_while_the_guest_stands_leaves_too(
    pinging: QemuMachine, outside: Any
) -> None:
    plug = FilterPlug(pinging.qmp, pinging.netdev_ids())
    plug.install()
    plug.hold()
    outside.pings(0.1)
    wait_held(plug, 500)
    capture(pinging, plug)
    pinging.stop()
    plug.release_one()
    pinging.resume()
    assert outside.pings(2, enough=3)
    plug.release_all()
    plug.remove()


def test_a_netdev_that_is_not_there_is_refused_and_nothing_stays(pinging: QemuMachine) -> None:
    plug = FilterPlug(pinging.qmp, ["nonsense"])
    with pytest.raises(VirtualMachineFailed, match="object-add"):
        plug.install()
    objects = pinging.qmp.execute("qom-list", {"path": "/objects"})
    assert not [entry for entry in objects if entry["name"].startswith("hf")]


def test_what_was_sent_before_the_stop_belongs_to_the_epoch(
    pinging: QemuMachine, outside: Any
) -> None:
    plug = FilterPlug(pinging.qmp, pinging.netdev_ids())
    plug.install()
    plug.hold()
    outside.pings(0.1)
    poller = select.poll()
    poller.register(plug.signal.fileno(), select.POLLIN)
    assert poller.poll(5000)
    plug.close_epoch()  # nothing was drained since
    plug.release_one()
    assert outside.pings(1, enough=1)
    plug.release_all()
    plug.remove()


def test_a_full_socket_does_not_stop_the_monitor(
    pinging: QemuMachine, outside: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    del outside
    monkeypatch.setattr(filter_plug, "SOCKET_BUFFER_BYTES", 1)
    plug = FilterPlug(pinging.qmp, pinging.netdev_ids())
    plug.install()
    plug.hold()
    out = plug._taps[0].out
    assert out is not None
    seen, deadline = -1, time.monotonic() + 10
    while True:  # until nothing more fits: QEMU's main thread then waits for us
        (waiting,) = struct.unpack("i", fcntl.ioctl(out, termios.FIONREAD, bytes(4)))
        if waiting == seen and waiting > 0:
            break
        assert time.monotonic() < deadline
        seen = waiting
        time.sleep(0.3)
    assert pinging.qmp.execute("query-status", timeout_s=5)["status"] == "running"
    plug.release_all()
    plug.remove()


def test_much_released_output_arrives_whole(pinging: QemuMachine, outside: Any) -> None:
    plug = FilterPlug(pinging.qmp, pinging.netdev_ids())
    plug.install()
    plug.hold()
    wait_held(plug, 100)
    held = plug._taps[0].held
    taken = held.take_all()
    one = taken[: 4 + int.from_bytes(taken[:4], "big")]
    outside.frames(0.2)
    held.feed(one * 5000)
    plug.release_all()
    plug.remove()
    assert len(outside.frames(5, enough=5000)) == 5000
