"""Cuts, power losses and what is left after them, in real namespaces."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast_lab import namespaces, processes
from holdfast_lab.errors import LabRefused
from holdfast_lab.lab import Lab
from holdfast_lab.network import CONTROL, party_address
from holdfast_lab.paths import find_tool

from .conftest import Datagrams, eventually

pytestmark = pytest.mark.netns


@pytest.fixture
def datagrams(lab: Lab) -> Iterator[Datagrams]:
    made = Datagrams(lab, "h1", "h2", CONTROL)
    yield made
    made.close()


def hear(datagrams: Datagrams, sender: str, receiver: str) -> bool:
    return datagrams.heard(sender, receiver, party_address(receiver))


def test_a_cut_is_silent_both_ways_and_leaves_the_others_alone(
    lab: Lab, datagrams: Datagrams
) -> None:
    assert hear(datagrams, "h1", "h2")
    lab.cut("h1", "h2")
    assert not hear(datagrams, "h1", "h2")
    assert not hear(datagrams, "h2", "h1")
    assert hear(datagrams, "h1", CONTROL)
    assert hear(datagrams, CONTROL, "h2")
    lab.heal("h2", "h1")
    assert hear(datagrams, "h1", "h2")
    assert hear(datagrams, "h2", "h1")


def test_a_cut_in_one_direction_lets_the_other_pass(lab: Lab, datagrams: Datagrams) -> None:
    lab.cut("h1", CONTROL, one_way=True)
    assert not hear(datagrams, "h1", CONTROL)
    assert hear(datagrams, CONTROL, "h1")
    lab.cut("h1", CONTROL)
    assert not hear(datagrams, CONTROL, "h1")
    lab.heal()
    assert hear(datagrams, "h1", CONTROL)


def test_a_cut_holds_through_a_power_loss(lab: Lab, datagrams: Datagrams) -> None:
    lab.cut("h1", "h2")
    lab.kill("h1")
    lab.revive("h1")
    datagrams.close()
    revived = Datagrams(lab, "h1", "h2", CONTROL)
    assert not hear(revived, "h1", "h2")
    assert not hear(revived, "h2", "h1")
    lab.heal()
    assert hear(revived, "h1", "h2")
    revived.close()


def test_guests_talk_across_a_cut(lab: Lab, datagrams: Datagrams) -> None:
    """A second address on each bridge stands for guests behind it."""
    for host, address in (("h1", "10.77.1.1"), ("h2", "10.77.1.2")):
        lab.execute(host, ["ip", "address", "add", f"{address}/16", "dev", "br0"])
    lab.cut("h1", "h2")
    guest = lab.open_socket("h1", kind=socket.SOCK_DGRAM)
    guest.bind(("10.77.1.1", 5000 + 1))
    guest.sendto(b"over", ("10.77.1.2", 5000))
    assert datagrams.sockets["h2"].recv(10) == b"over"
    guest.close()


def test_a_host_that_loses_power_says_nothing_more(lab: Lab) -> None:
    """Its connections do not close: the other side hears neither an end nor a reset."""
    service = processes.spawn(
        [find_tool("busybox"), "nc", "-l", "-p", "4000", "-e", "/bin/cat"],
        log=lab.log("service"),
        namespace=lab.powered_namespace("h1"),
    )
    clients = []

    def accepted() -> bool:
        try:
            clients.append(lab.connect(party_address("h1"), 4000))
        except ConnectionRefusedError:
            return False
        return True

    assert eventually(accepted)
    client = clients[0]
    client.sendall(b"x")
    assert client.recv(1) == b"x"
    lab.kill("h1")
    assert not processes.is_alive(service)
    client.settimeout(1)
    with pytest.raises(TimeoutError):
        client.recv(1)
    client.close()


def test_a_power_loss_keeps_the_disk_and_nothing_else(lab: Lab) -> None:
    disk, run = lab.folder.disk("h1"), lab.folder.run("h1")
    for folder in (disk, run):
        folder.mkdir(parents=True)
        (folder / "file").write_text("here")
    lab.execute("h1", ["ip", "link", "add", "extra", "type", "veth", "peer", "name", "other"])
    stubborn = processes.spawn(
        ["sh", "-c", "trap '' TERM HUP; while :; do sleep 1; done"],
        log=lab.log("stubborn"),
        namespace=lab.powered_namespace("h1"),
    )
    namespace = lab.powered_namespace("h1")
    assert eventually(lambda: stubborn.pid in namespaces.processes_in(namespace))
    lab.kill("h1")
    assert not processes.is_alive(stubborn)
    assert not namespaces.exists(namespace)
    assert (disk / "file").read_text() == "here"
    assert not run.exists()
    with pytest.raises(LabRefused, match="revive h1"):
        lab.in_namespace("h1", lambda: None)
    with pytest.raises(LabRefused, match="no power"):
        lab.kill("h1")
    lab.revive("h1")
    assert lab.in_namespace("h1", lambda: {name for _, name in socket.if_nameindex()}) == {
        "lo",
        "br0",
        "uplink",
    }
    with pytest.raises(LabRefused, match="only a killed host"):
        lab.revive("h1")


def test_processes_that_fork_without_end_are_all_gone_when_the_kill_returns(lab: Lab) -> None:
    namespace = lab.powered_namespace("h1")
    for _ in range(2):
        processes.spawn(
            ["sh", "-c", "while :; do sleep 0.2 & sleep 0.01; done"],
            log=lab.log("forks"),
            namespace=namespace,
        )
    assert eventually(lambda: len(namespaces.processes_in(namespace)) > 10)
    namespaces.kill_all(namespace)
    assert namespaces.processes_in(namespace) == []


def test_parties_that_do_not_exist_are_refused_with_those_that_do(lab: Lab) -> None:
    for wrong in (lambda: lab.kill("h9"), lambda: lab.cut("h1", "h9"), lambda: lab.revive("h9")):
        with pytest.raises(LabRefused, match="h2"):
            wrong()
    with pytest.raises(LabRefused, match="itself"):
        lab.cut("h1", "h1")


def test_the_machines_own_network_is_not_touched(lab_name: str) -> None:
    def facts() -> tuple[str, ...]:
        interfaces = sorted(path.name for path in Path("/sys/class/net").iterdir())
        return (*interfaces, Path("/proc/net/route").read_text())

    before = facts()
    with Lab.up(1, lab_name, components=()):
        assert facts() == before
    assert facts() == before
