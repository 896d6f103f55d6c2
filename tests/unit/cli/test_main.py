"""What holds for every command: errors, exit codes, help, plug-ins."""

import re
import socket
from importlib.metadata import EntryPoint

import pytest
from tests.unit.api.canned import FakeController, Reply, good, hosts, problem
from tests.unit.cli.conftest import Run

from holdfast_api.cli import main as cli_main
from holdfast_api.cli.options import HINTS, ExitCode, exit_code_of, line_of
from holdfast_api.errors import PROBLEMS, Refused, Unavailable


@pytest.mark.parametrize(
    ("reply", "code", "said"),
    [
        (problem("unknown-vm", "no such VM"), 3, "unknown-vm: no such VM (list the known ones"),
        (
            problem("invalid-request", "two faults", ["a: bad", "b: bad"]),
            3,
            "invalid-request: two faults [a: bad; b: bad]",
        ),
        (problem("conflict", "changed meanwhile"), 3, "conflict: changed meanwhile (repeat"),
        (problem("internal", "a bug"), 1, "internal: a bug"),
        (problem("store-unavailable", "etcd is away"), 4, "store-unavailable: etcd is away"),
        (Reply(200, (b"<html>",), "text/html"), 1, "internal: the answer is no VmList"),
    ],
)
def test_an_error_is_one_line_with_its_code_and_an_exit_code_of_its_own(
    controller: FakeController, holdfast: Run, reply: Reply, code: int, said: str
) -> None:
    controller.on("GET", "/v1/vms", reply)
    result = holdfast("vms")
    assert (result.code, result.out) == (code, "")
    assert len(result.err.splitlines()) == 1
    assert said.split(": ", 1)[1] in result.err
    assert result.err.startswith(f"holdfast: {said.split(': ', 1)[0]}")


def test_an_unreachable_controller_is_told_with_what_to_check(holdfast: Run) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
        result = holdfast("vms", url=url)
    assert result.code == 4
    assert url in result.err
    assert "HOLDFAST_URL" in result.err


def test_several_controllers_are_given_with_commas(
    controller: FakeController, holdfast: Run
) -> None:
    controller.on("GET", "/v1/hosts", good(hosts("h1")))
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{held.getsockname()[1]}"
        assert holdfast("hosts", "--url", f"{dead},{controller.url}").code == 0


@pytest.mark.parametrize("code", sorted(PROBLEMS))
def test_every_code_has_an_exit_code_and_a_line(code: str) -> None:
    for kind in (Refused, Unavailable):
        error = kind(code, "so it is")
        assert exit_code_of(error) in set(ExitCode) - {ExitCode.OK, ExitCode.USAGE}
        assert line_of(error).startswith(f"holdfast: {code}: so it is")


def test_hints_are_given_for_codes_that_exist() -> None:
    assert set(HINTS) <= set(PROBLEMS)


def test_the_help_documents_every_exit_code(holdfast: Run) -> None:
    result = holdfast("--help")
    assert result.code == 0
    documented = {int(code) for code in re.findall(r"^ +(\d+)  ", result.out, re.MULTILINE)}
    assert documented == {int(code) for code in ExitCode}


def test_the_version_is_shown(holdfast: Run) -> None:
    result = holdfast("--version")
    assert (result.code, result.out) == (0, "holdfast 0.1.0\n")


PLUGIN = """
import typer
app = typer.Typer()

@app.command()
def hello() -> None:
    typer.echo("hello from outside")

@app.command()
def other() -> None:
    pass
"""


def give_plugins(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    found = [EntryPoint(n, v, cli_main.COMMANDS_GROUP) for n, v in values.items()]
    monkeypatch.setattr(cli_main, "entry_points", lambda group: found if group else [])


def test_a_plug_in_becomes_a_sub_command(
    holdfast: Run, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "holdfast_plugin_of_a_test.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(folder))
    give_plugins(monkeypatch, extra="holdfast_plugin_of_a_test:app")
    assert holdfast("extra", "hello").out == "hello from outside\n"


def test_a_plug_in_that_can_not_be_loaded_is_named_and_disturbs_no_other_command(
    controller: FakeController, holdfast: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_plugins(monkeypatch, broken="holdfast_there_is_no_such_module:app")
    controller.on("GET", "/v1/hosts", good(hosts("h1")))
    result = holdfast("hosts")
    assert (result.code, result.err) == (0, "")
    result = holdfast("broken", "hello")
    assert result.code == 2
    assert "'broken' can not be loaded" in result.err
