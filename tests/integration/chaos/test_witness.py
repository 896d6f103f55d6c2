"""The witness beside a real lab: an honest failover under load, then crimes that really happen."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.chaos.scene import until
from tests.chaos.witness import ROOT, Witness, WitnessDied
from tests.unit.chaos.passing import arp_frame, tcp_frame

from holdfast_api.client import HoldfastClient
from holdfast_api.records import Policy
from holdfast_api.words import Phase
from holdfast_lab import namespaces
from holdfast_lab.clients import CountingClient
from holdfast_lab.lab import Lab
from holdfast_lab.network import CLIENT, SWITCH, Network, guest_address, party_address
from holdfast_lab.vm import VmOptions

pytestmark = pytest.mark.netns

SMALL = VmOptions(memory_mb=128, graphics=False)
DEADLINE_SECONDS = 60.0
GUEST = guest_address(1, 0)


def eventually(what: str, probe: Callable[[], bool]) -> None:
    assert until(DEADLINE_SECONDS, probe), what


def inject(network: Network, party: str, frame: bytes) -> None:
    """Send a frame from a party's machine into its uplink, as nobody honest would."""
    opened = namespaces.open_socket(network.namespace(party), socket.AF_PACKET, socket.SOCK_RAW)
    with opened:
        opened.bind(("uplink", 0))
        opened.send(frame)


@pytest.mark.etcd
@pytest.mark.qemu
def test_a_failover_under_load_is_witnessed_and_a_forged_packet_is_found(tmp_path: Path) -> None:
    with (
        Lab.up(2, f"wi{os.getpid() % 100000}", tls=False) as lab,
        Witness(lab.network.namespace(SWITCH), tmp_path) as witness,
        HoldfastClient(lab.urls, timeout_seconds=10) as client,
    ):
        (address,) = lab.run_vm("vm", "h1", SMALL).addresses
        witness.name_guest(address, "vm")
        eventually("the VM is known", lambda: client.vm("vm").host == "h1")
        counting = CountingClient(lab.redis("vm", timeout_seconds=DEADLINE_SECONDS))
        counting.start()
        client.protect("vm", policy=Policy())
        eventually("protected", lambda: client.protection("vm").phase is Phase.PROTECTED)
        assert counting.wait_for_count(counting.seen().replies + 100, DEADLINE_SECONDS)

        lab.kill("h1")
        assert counting.wait_for_count(counting.seen().replies + 100, DEADLINE_SECONDS)
        assert counting.stop().wrong == []

        honest = witness.read()
        assert honest.violations == []
        assert honest.kernel_drops == 0
        assert honest.summary["replies checked"] >= 100
        assert honest.summary["replies outside of protection"] >= 90
        assert honest.summary["replies unchecked"] == 0
        assert honest.summary["connections"] >= 1  # a backup that does not know yet refuses
        assert honest.summary["connections not followed"] == 0
        assert honest.summary["checkpoints"] >= honest.summary["acknowledgements"] >= 1
        assert honest.summary["claims won"] == 1
        assert honest.summary["speaker changes"] == 1
        assert honest.summary["speaker changes without a claim seen"] == 0

        lab.revive("h1")
        inject(lab.network, "h1", arp_frame(address))
        (forged,) = witness.read().violations
        assert forged.startswith("R1: vm")
        assert "h1" in forged

        lab.kill("h2")
        lab.revive("h2")
        witness.declare_lost(address)
        inject(lab.network, "h2", arp_frame(address))
        testimony = witness.close()
        assert [each[:2] for each in testimony.violations] == ["R1", "R4"]
        assert testimony == witness.close(), "to close twice is no fault"


@pytest.fixture
def network() -> Iterator[Network]:
    """A switch with two hosts, a client and nothing that speaks."""
    made = Network(f"wn{os.getpid() % 100000}")
    try:
        made.create_switch()
        for party in ("h1", "h2", CLIENT):
            made.attach(party)
        yield made
    finally:
        made.remove()


def test_a_port_that_vanished_is_known_again_when_it_comes_back(
    network: Network, tmp_path: Path
) -> None:
    with Witness(network.namespace(SWITCH), tmp_path) as witness:
        witness.name_guest(GUEST, "vm")
        inject(network, "h1", arp_frame(GUEST))
        network.power_off("h1")
        network.attach("h1")
        inject(network, "h1", arp_frame(GUEST))
        honest = witness.close()
    assert honest.violations == []
    assert honest.summary["guest packets"] == honest.summary["packets"] == 2


def test_each_frame_is_seen_once_and_only_what_the_rules_need(
    network: Network, tmp_path: Path
) -> None:
    h1, h2 = party_address("h1"), party_address("h2")
    wanted = [
        arp_frame(GUEST),
        tcp_frame((GUEST, 6379), (party_address(CLIENT), 9), 1, 1),
        tcp_frame((h1, 9), (h2, 7701), 1, 1),
        tcp_frame((h1, 7701), (h2, 9), 1, 1),
        tcp_frame((h1, 7700), (h2, 9), 1, 1),
        tcp_frame((h1, 9), (GUEST, 6379), 1, 1),
    ]
    others = [
        arp_frame(h1),
        tcp_frame((h1, 9), (h2, 9), 1, 1),
        tcp_frame((h1, 9), (h2, 7700), 1, 1),
        bytes(12) + b"\x86\xdd" + bytes(80),
    ]
    network.cut("h1", "h2")  # what vanishes behind its port has entered it all the same
    with Witness(network.namespace(SWITCH), tmp_path) as witness:
        for frame in (*wanted, *others):
            inject(network, "h1", frame)
        assert witness.close().summary["packets"] == len(wanted)


def test_a_command_counts_from_the_frames_on_that_come_after_it(
    network: Network, tmp_path: Path
) -> None:
    with Witness(network.namespace(SWITCH), tmp_path) as witness:
        for _ in range(200):
            inject(network, "h1", arp_frame(GUEST))
        witness.declare_lost(GUEST)
        assert witness.read().violations == []
        inject(network, "h1", arp_frame(GUEST))
        assert [each[:2] for each in witness.read().violations] == ["R4"]


def test_a_witness_that_was_killed_is_missed(network: Network, tmp_path: Path) -> None:
    witness = Witness(network.namespace(SWITCH), tmp_path)
    witness._process.kill()
    witness._process.wait()
    with pytest.raises(WitnessDied, match="by itself"):
        witness.read()
    with pytest.raises(WitnessDied, match="by itself"):
        witness.close()


def test_a_witness_of_a_switch_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(WitnessDied, match="hf-nowhere-switch"):
        Witness("hf-nowhere-switch", tmp_path)


@pytest.mark.parametrize("how", ["the owner dies", "SIGTERM"])
def test_a_witness_ends_with_its_owner_or_when_told_to(
    network: Network, tmp_path: Path, how: str
) -> None:
    report = tmp_path / "report.json"
    argv = [sys.executable, "-m", "tests.chaos.witness", "--report", str(report)]
    argv += ["--namespace", network.namespace(SWITCH)]
    with subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE) as process:
        eventually("it listens", report.exists)
        inject(network, "h1", arp_frame(GUEST))
        if how == "SIGTERM":
            process.send_signal(signal.SIGTERM)
        else:
            assert process.stdin is not None
            process.stdin.close()
        assert process.wait(DEADLINE_SECONDS) == 0
    assert json.loads(report.read_text())["summary"]["guest packets"] == 1
