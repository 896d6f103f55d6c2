"""The kernel's plug for real: what leaves a tap, when, in which order; and what is left of it."""

import contextlib
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.lab.inside.plugged import (
    ARP,
    IPV4,
    IPV6,
    KINDS,
    Network,
    network,
    open_plug,
    sh,
    state_of,
    wait_for,
)

from holdfast_agent.core.failures import VirtualMachineFailed
from holdfast_agent.network.qdisc_links import PlugUnfit, remove_plugs_of, sweep
from holdfast_agent.network.qdisc_plug import QdiscPlug
from holdfast_agent.network.selection import qdisc_unavailable

HOLDER = """
import os, sys, time
from tests.lab.inside.plugged import open_plug
plug = open_plug(("t0",), pid=os.getpid() if "alone" in sys.argv else os.getppid())
plug.install()
plug.hold()
if "closed" in sys.argv:
    plug.close_epoch()
print("holding", flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module", autouse=True)
def modules() -> None:
    sh("modprobe -a tun bridge veth")


@pytest.fixture(scope="module")
def one_tap(modules: None) -> Iterator[Network]:  # noqa: ARG001 - they come first
    with network() as made:
        yield made


@pytest.fixture
def lan(one_tap: Network) -> Iterator[Network]:
    """One tap on its network, shared by the tests: each leaves it as it found it, or fails."""
    one_tap.hear()
    yield one_tap
    remove_plugs_of(*one_tap.taps)


@contextlib.contextmanager
def plugged(lan: Network, **options: int) -> Iterator[QdiscPlug]:
    """Hold the output of all taps, and see that nothing is left of it afterwards."""
    before = state_of(lan.taps)
    plug = open_plug(lan.taps, **options)
    plug.install()
    try:
        plug.hold()
        yield plug
        plug.release_all()
    finally:
        plug.remove() if sys.exc_info()[0] is None else plug.discard()
    assert state_of(lan.taps) == before


@contextlib.contextmanager
def dead_holder(*words: str) -> Iterator[None]:
    """A holder in a process of its own, killed when the block ends."""
    arguments = [sys.executable, "-c", HOLDER, *words]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holding\n"
        try:
            yield
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(20)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def is_readable(plug: QdiscPlug) -> bool:
    return bool(select.select([plug.signal.fileno()], [], [], 0)[0])


def test_this_kernel_offers_the_plug() -> None:
    assert qdisc_unavailable() is None
    assert "hf-" not in sh("ip -o link show")


def test_an_epoch_leaves_in_order_with_its_release_and_nothing_else_does(lan: Network) -> None:
    with plugged(lan) as plug:
        epochs = [lan.say(*KINDS, *KINDS)]
        for _ in range(5):
            assert lan.hear() == [], "left while its epoch ran"
            plug.close_epoch()
            epochs.append(lan.say(*KINDS, ARP, IPV6))
            assert lan.hear() == [], "left before the acknowledgement"
            plug.release_one()
            lan.expect(epochs[-2])
        plug.close_epoch()
        later = lan.say(IPV4)
        plug.release_all()
        lan.expect(epochs[-1] + later)
    lan.expect(lan.say(IPV4))


def test_what_is_for_the_guest_passes_and_is_no_output(lan: Network) -> None:
    with plugged(lan) as plug:
        lan.answer()
        assert not is_readable(plug)
        lan.say(IPV4)
        assert is_readable(plug)
        assert plug.signal.drain() >= 64
        assert plug.held_bytes() >= 64
        wait_for(lambda: is_readable(plug))
        assert plug.signal.drain() == 0
        assert not is_readable(plug)
        plug.close_epoch()
        lan.say(IPV6)
        plug.release_one()
        assert is_readable(plug), "output of the new epoch waits"
        assert plug.signal.drain() >= 64


def test_a_reopened_epoch_leaves_whole_with_the_next_release(lan: Network) -> None:
    with plugged(lan) as plug:
        for _ in range(3):
            both = lan.say(IPV4, ARP, IPV6)
            plug.close_epoch()
            plug.reopen_epoch()
            both += lan.say(IPV4, IPV4, IPV4, IPV4)
            plug.close_epoch()
            plug.reopen_epoch()
            both += lan.say(ARP)
            assert lan.hear() == []
            plug.close_epoch()
            later = lan.say(IPV4, ARP)
            assert lan.hear() == []
            plug.release_one()
            lan.expect(both)
            plug.close_epoch()
            plug.release_one()
            lan.expect(later)


def test_two_nics_with_two_queues_each_are_one_output() -> None:
    with network(tap_count=2, queue_count=2, first=1) as lan, plugged(lan) as plug:
        for _ in range(3):
            first = [*lan.say(IPV4, nic=0), *lan.say(ARP, nic=1, queue=1)]
            first += [*lan.say(IPV6, nic=0, queue=1), *lan.say(IPV6, nic=1)]
            plug.close_epoch()
            later = [*lan.say(IPV4, nic=1), *lan.say(IPV4, nic=0)]
            assert lan.hear() == []
            plug.release_one()
            lan.expect(first, in_order=False)
            plug.close_epoch()
            plug.release_one()
            lan.expect(later, in_order=False)


def test_what_does_not_fit_is_dropped_and_counted(lan: Network) -> None:
    with plugged(lan, limit_bytes=5000) as plug:
        kept = lan.say(*[IPV4] * 5, size_bytes=1000)
        lan.say(*[IPV4] * 3, size_bytes=1000)
        assert plug.signal.drain() == 5000
        assert plug.dropped_packets() == 3
        plug.change_limit(100_000)
        kept += lan.say(IPV6, size_bytes=1000)
        plug.close_epoch()
        plug.release_one()
        lan.expect(kept)


def test_a_switch_that_fails_closes_no_epoch_and_the_next_one_is_held_again(lan: Network) -> None:
    with plugged(lan) as plug:
        lan.say(IPV4)
        (ifb,) = [line.split()[1][:-1] for line in sh("ip -o link").splitlines() if "hf-" in line]
        sh(f"tc qdisc replace dev {ifb} root handle 1: pfifo")
        with pytest.raises(VirtualMachineFailed, match="is not closed off"):
            plug.close_epoch()
        plug.reopen_epoch()
        lan.hear()
        plug.close_epoch()
        later = lan.say(ARP)
        plug.release_one()
        assert later[0] not in lan.hear()
        plug.close_epoch()
        plug.release_one()
        lan.expect(later)


@pytest.mark.parametrize("words", [(), ("closed",)])
def test_after_the_holders_death_there_is_silence_until_its_heir_decides(
    lan: Network, words: tuple[str, ...]
) -> None:
    before = state_of(lan.taps)
    with dead_holder(*words):
        said = lan.say(*KINDS)
        assert lan.hear() == []
    said += lan.say(ARP)
    assert lan.hear() == []
    heir = open_plug(lan.taps)
    heir.install()
    assert heir.leftover_held
    assert lan.hear() == []
    heir.hold()
    said += lan.say(IPV6)
    assert lan.hear() == []
    heir.close_epoch()
    later = lan.say(IPV4)
    heir.release_one()
    lan.expect(said)
    heir.release_all()
    heir.remove()
    lan.expect(later)
    assert state_of(lan.taps) == before


def test_an_heir_may_let_all_go_and_hold_again(lan: Network) -> None:
    before = state_of(lan.taps)
    with dead_holder("closed"):
        said = lan.say(*KINDS)
    heir = open_plug(lan.taps)
    heir.install()
    heir.release_all()
    lan.expect(said)
    said = lan.say(ARP)
    lan.expect(said)
    heir.hold()
    said = lan.say(IPV4, IPV6)
    assert lan.hear() == []
    heir.close_epoch()
    heir.release_one()
    lan.expect(said)
    heir.release_all()
    heir.remove()
    assert state_of(lan.taps) == before


def test_nothing_is_left_of_a_vm_that_is_gone(lan: Network) -> None:
    before = state_of(lan.taps)
    with dead_holder("alone"):
        lan.say(IPV4)
        sweep()
        assert lan.hear() == [], "swept what a living QEMU's output is held by"
        with pytest.raises(PlugUnfit, match="which lives"):
            open_plug(lan.taps).install()
    sweep()
    assert state_of(lan.taps) == before
    assert lan.hear() == []


def test_what_was_held_for_a_qemu_that_ended_never_leaves_by_its_successor(lan: Network) -> None:
    before = state_of(lan.taps)
    with dead_holder("alone"):
        lan.say(IPV4, ARP)
    successor = open_plug(lan.taps)
    successor.install()
    assert not successor.leftover_held
    successor.release_all()
    assert lan.hear() == []
    successor.remove()
    assert state_of(lan.taps) == before


def test_discarding_drops_what_is_held_but_not_while_the_qemu_lives(lan: Network) -> None:
    before = state_of(lan.taps)
    with subprocess.Popen(["sleep", "600"]) as qemu:
        plug = open_plug(lan.taps, pid=qemu.pid)
        plug.install()
        plug.hold()
        lan.say(IPV4)
        plug.discard()
        lan.say(IPV4)
        assert lan.hear() == []
        heir = open_plug(lan.taps, pid=qemu.pid)
        qemu.kill()
        qemu.wait(20)
    heir.install()
    heir.discard()
    assert lan.hear() == []
    assert state_of(lan.taps) == before


def test_ifbs_of_taps_that_are_gone_are_swept(one_tap: Network) -> None:
    with network(first=1) as lan:
        before = sh("ip -o link show type ifb")
        plug = open_plug(lan.taps)
        plug.install()
        plug.hold()
        plug.close()
    assert "hf-" in sh("ip -o link show type ifb"), f"nothing is left; {one_tap.taps} is another"
    sweep()
    assert sh("ip -o link show type ifb") == before


def test_somebody_elses_ingress_is_refused_or_left_as_it_was(lan: Network) -> None:
    sh("tc qdisc add dev t0 ingress")
    before = state_of(lan.taps)
    with plugged(lan) as plug:
        said = lan.say(IPV4)
        assert lan.hear() == []
        plug.close_epoch()
        plug.release_one()
        lan.expect(said)
    assert "ingress" in before
    sh(
        "tc filter add dev t0 parent ffff: protocol all u32 match u32 0 0 "
        "police rate 1mbit burst 10k drop flowid :1"
    )
    before = state_of(lan.taps)
    with pytest.raises(PlugUnfit, match="somebody else") as refused:
        open_plug(lan.taps).install()
    assert refused.value.code == "ingress-filtered"
    assert state_of(lan.taps) == before
    sh("tc qdisc del dev t0 ingress")


def test_a_tap_that_is_not_there_is_refused() -> None:
    with pytest.raises(PlugUnfit) as refused:
        open_plug(("nonsense",)).install()
    assert refused.value.code == "tap-missing"


def test_a_plug_leaves_no_descriptor_open(lan: Network) -> None:
    with plugged(lan):
        pass
    before = open_descriptors()
    for _ in range(2):
        with plugged(lan):
            pass
    assert open_descriptors() == before
