"""Coming up, going down, and the services of a lab."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from holdfast_lab import namespaces, processes
from holdfast_lab.cli import app
from holdfast_lab.errors import LabError, LabRefused
from holdfast_lab.lab import Lab
from holdfast_lab.network import CONTROL
from holdfast_lab.paths import find_tool
from holdfast_lab.state import lab_names

from .conftest import eventually

pytestmark = [pytest.mark.netns, pytest.mark.etcd]

MAKE_A_LAB = """
import sys, time
from holdfast_lab.lab import Lab
Lab.up(1, sys.argv[1], components=("etcd",))
print("up", flush=True)
time.sleep(600)
"""


def etcdctl(lab: Lab, *words: str) -> str:
    return lab.execute(CONTROL, [find_tool("etcdctl"), "--dial-timeout=5s", *words])


def test_etcd_keeps_what_it_was_told_when_it_is_killed(lab: Lab) -> None:
    etcdctl(lab, "put", "key", "value")
    lab.kill("etcd")
    with pytest.raises(LabRefused, match="etcd does not run"):
        lab.kill("etcd")
    lab.start("etcd")
    with pytest.raises(LabRefused, match="etcd is running"):
        lab.start("etcd")
    assert "value" in etcdctl(lab, "get", "key")
    lab.restart("etcd")
    assert "value" in etcdctl(lab, "get", "key")


def test_a_lab_whose_maker_was_killed_is_removed_by_the_next_one(lab_name: str) -> None:
    orphan = f"{lab_name}-o"
    with subprocess.Popen(
        [sys.executable, "-c", MAKE_A_LAB, orphan], stdout=subprocess.PIPE
    ) as maker:
        assert maker.stdout is not None
        assert maker.stdout.readline() == b"up\n"
        maker.kill()
    etcd = Lab.attach(orphan).state.processes["etcd"]
    assert processes.is_alive(etcd)
    with Lab.up(1, lab_name, components=()):
        assert not processes.is_alive(etcd)
        assert orphan not in lab_names()
        assert not [name for name in namespaces.names() if name.startswith(f"hf-{orphan}-")]


def test_a_second_lab_of_the_same_name_takes_the_place_of_the_first(lab: Lab) -> None:
    first = lab.state.processes["etcd"]
    etcdctl(lab, "put", "key", "value")
    second = Lab.up(1, lab.folder.name, components=("etcd",))
    assert not processes.is_alive(first)
    assert etcdctl(second, "get", "key") == ""


def test_a_lab_interrupted_while_it_comes_up_is_cleaned_up_by_name(lab_name: str) -> None:
    """Only half is there and the file says so, or there is no file at all."""
    namespaces.create(f"hf-{lab_name}-switch")
    namespaces.create(f"hf-{lab_name}-h7")
    process = processes.spawn(
        ["sleep", "600"], log=Path("/dev/null"), namespace=f"hf-{lab_name}-h7"
    )
    with Lab.up(1, lab_name, components=()):
        assert not processes.is_alive(process)
        assert not namespaces.exists(f"hf-{lab_name}-h7")


def test_a_service_that_does_not_come_up_is_named_and_nothing_is_left(
    lab_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "packages" / "root" / "usr" / "bin"
    folder.mkdir(parents=True)
    (folder / "etcd").write_text("#!/bin/sh\necho no room at all\nexit 1\n")
    (folder / "etcd").chmod(0o755)
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path))
    with pytest.raises(LabError, match=r"etcd ended by itself(.|\n)*no room at all"):
        Lab.up(1, lab_name, components=("etcd",))
    assert lab_name not in lab_names()
    assert not [name for name in namespaces.names() if name.startswith(f"hf-{lab_name}-")]


def test_labs_of_two_names_live_side_by_side(lab: Lab) -> None:
    with Lab.up(1, f"{lab.folder.name}-b", components=("etcd",)) as other:
        etcdctl(other, "put", "key", "other")
        assert etcdctl(lab, "get", "key") == ""
    assert processes.is_alive(lab.state.processes["etcd"])


def test_the_controllers_address_works_from_outside(lab: Lab) -> None:
    """A server in the controller's place shouts back what it hears."""
    listening = lab.open_socket(CONTROL)
    listening.bind(("0.0.0.0", 7700))
    listening.listen()

    def shout() -> None:
        peer, _ = listening.accept()
        with peer, peer.makefile("rb") as lines:
            peer.sendall(lines.read().upper())

    thread = threading.Thread(target=shout)
    thread.start()
    lab._start_forwarder("controller")
    port = int(lab.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(b"hello" * 100_000)
        client.shutdown(socket.SHUT_WR)
        with client.makefile("rb") as answer:
            assert answer.read() == b"HELLO" * 100_000
    thread.join()
    listening.close()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        assert client.recv(1) == b"", "nobody listens any more"


def test_the_commands_do_what_they_say(lab_name: str) -> None:
    def lab_command(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, [*words, "--name", lab_name])
        return done.exit_code, done.output

    assert lab_command("status")[0] == 3
    up = ("up", "--hosts", "2", "--components", "etcd", "--host-memory", "2G")
    assert lab_command(*up)[0] == 0
    code, text = lab_command(*up)
    assert code == 3
    assert "--replace" in text
    assert Lab.attach(lab_name).state.memory_total_bytes == 2 << 30
    assert lab_command("cut", "h1", "control", "--one-way")[0] == 0
    assert lab_command("kill", "h2")[0] == 0
    assert lab_command("stop", "etcd")[0] == 0
    code, text = lab_command("status", "-o", "json")
    facts = json.loads(text)
    assert [host["powered"] for host in facts["hosts"]] == [True, False]
    assert facts["services"] == {"etcd": False, "controller": False}
    assert facts["cuts"] == [{"from": "h1", "to": "control"}]
    assert "h2" in lab_command("status")[1]
    assert lab_command("heal", "h1")[0] == 3
    assert lab_command("heal")[0] == 0
    assert lab_command("revive", "h2")[0] == 0
    assert lab_command("env")[0] == 3, "there is no controller to point at"
    assert lab_command("logs", "nobody")[0] == 3
    assert lab_command("logs", "etcd")[0] == 0
    assert lab_command("down")[0] == 0
    assert lab_command("down")[0] == 0
    assert lab_name not in lab_names()


def test_an_interrupt_while_coming_up_leaves_nothing(lab_name: str) -> None:
    with subprocess.Popen([sys.executable, "-c", MAKE_A_LAB, lab_name]) as maker:
        assert eventually(lambda: namespaces.exists(f"hf-{lab_name}-{CONTROL}"))
        os.kill(maker.pid, signal.SIGINT)
        try:
            maker.wait(30)
        finally:
            maker.kill()
    assert lab_name not in lab_names()
    assert not [name for name in namespaces.names() if name.startswith(f"hf-{lab_name}-")]
