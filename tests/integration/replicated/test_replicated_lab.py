"""The lab's own part: three members by name, frozen and thawed, cut and revived, from the shell."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.replicated.plane import eventually, lab_name
from typer.testing import CliRunner

from holdfast_lab import namespaces, processes
from holdfast_lab.cli import app
from holdfast_lab.errors import LabRefused
from holdfast_lab.lab import Lab
from holdfast_lab.processes import Process

pytestmark = [pytest.mark.netns, pytest.mark.etcd]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Three members of etcd and nothing else."""
    with Lab.up(1, lab_name("rl"), etcd=3, components=("etcd",)) as made:
        yield made


def state_of(process: Process) -> str:
    """Return the kernel's letter: T is stopped."""
    text = Path(f"/proc/{process.pid}/stat").read_text()
    return text.rpartition(")")[2].split()[0]


def test_each_member_has_a_machine_of_its_own_and_answers_to_both_spellings(lab: Lab) -> None:
    names = ["etcd 1", "etcd 2", "etcd 3"]
    assert [name for name in lab.state.processes if name.startswith("etcd")] == names
    lab.kill("etcd-2")
    with pytest.raises(LabRefused, match="etcd 2 does not run"):
        lab.kill("etcd 2")
    assert lab.status()["services"] == {
        "etcd 1": True,
        "etcd 2": False,
        "etcd 3": True,
        "controller": False,
    }
    lab.revive("etcd 2")
    with pytest.raises(LabRefused, match="etcd 2 is running"):
        lab.revive("etcd 2")
    for wrong in ("etcd", "etcd 4"):
        with pytest.raises(LabRefused, match="does not run"):
            lab.kill(wrong)


def test_what_is_frozen_stands_still_until_it_is_thawed(lab: Lab) -> None:
    member = lab.state.processes["etcd 1"]
    lab.freeze("etcd 1")
    assert state_of(member) == "T"
    lab.freeze("etcd 1")
    thawers = [name for name in lab.state.processes if name.startswith("thaw")]
    assert thawers == ["thaw etcd 1"]
    lab.thaw("etcd 1")
    assert state_of(member) != "T"
    assert "thaw etcd 1" not in lab.state.processes


def test_what_is_forgotten_in_its_frozen_state_is_thawed_by_itself(lab: Lab) -> None:
    member = lab.state.processes["etcd 1"]
    lab.freeze("etcd 1", seconds=0.5)
    thawer = lab.state.processes["thaw etcd 1"]
    eventually("the thawer is done", lambda: not processes.is_alive(thawer))
    assert state_of(member) != "T"
    assert Lab.is_healthy(lab.folder.name), "a thawer that is done is nothing that broke"


def test_the_whole_control_plane_is_cut_off_by_one_word(lab: Lab) -> None:
    lab.cut("h1", "control", one_way=True)
    lab.cut("etcd 1", "etcd-2")
    assert set(lab.state.cuts) == {
        ("h1", "control"),
        ("h1", "etcd-1"),
        ("h1", "etcd-2"),
        ("h1", "etcd-3"),
        ("etcd-1", "etcd-2"),
        ("etcd-2", "etcd-1"),
    }
    for pair in (("control", "etcd 1"), ("etcd 1", "etcd-1")):
        with pytest.raises(LabRefused, match="and itself"):
            lab.cut(*pair)
    with pytest.raises(LabRefused, match="no etcd-4"):
        lab.cut("h1", "etcd-4")
    with pytest.raises(LabRefused, match="two parties"):
        lab.heal("h1")
    lab.heal("etcd-2", "etcd 1")
    assert all(sender == "h1" for sender, _ in lab.state.cuts)
    lab.heal("h1", "control")
    assert lab.state.cuts == ()


def test_a_lab_with_something_frozen_goes_down_from_the_shell() -> None:
    name = lab_name("rd")

    def command(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, [*words, "--name", name])
        return done.exit_code, done.output

    try:
        up = ("up", "--hosts", "1", "--etcd", "3", "--components", "etcd")
        assert command(*up, "--controllers", "6")[0] == 3
        assert command(*up)[0] == 0
        member = Lab.attach(name).state.processes["etcd 3"]
        assert command("freeze", "etcd", "3")[0] == 0
        assert state_of(member) == "T"
        assert command("thaw", "etcd", "3")[0] == 0
        assert command("kill", "etcd", "2")[0] == 0
        assert command("revive", "etcd", "2")[0] == 0
        assert command("freeze", "etcd", "3", "--seconds", "600")[0] == 0
        services = json.loads(command("status", "-o", "json")[1])["services"]
        assert services["etcd 2"]
        thawer = Lab.attach(name).state.processes["thaw etcd 3"]
        assert command("down")[0] == 0
        assert not processes.is_alive(member)
        assert not processes.is_alive(thawer)
    finally:
        Lab.remove(name)
    assert not [each for each in namespaces.names() if each.startswith(f"hf-{name}-")]
