"""The project's own rules, held over every file; and the checkers, shown to see what is wrong."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.meta import tidy

ROOT = Path(__file__).resolve().parents[2]
PYTHON_FOLDERS = ("api", "controller", "agent", "deploy", "tests", "bench")
TEXT_FOLDERS = (*PYTHON_FOLDERS, "docs", "helm", ".ci")
TEXT_ENDINGS = frozenset(
    {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".sh", ".service", ".c", ".proto", ".tpl", ""}
)
GENERATED = ("_pb2.py", "_pb2_grpc.py", "_pb2.pyi")
LINT_SECONDS_MAX = 120


def files() -> Iterator[Path]:
    yield from (p for p in ROOT.iterdir() if p.is_file() and not p.name.startswith("."))
    for folder in TEXT_FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            hidden = any(part.startswith((".", "__pycache__")) for part in path.parts[-2:])
            if path.is_file() and not hidden and not path.name.endswith(GENERATED):
                yield path


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


PYTHON_FILES = sorted(relative(p) for p in files() if p.suffix == ".py")
TEXT_FILES = sorted(
    relative(p) for p in files() if p.suffix in TEXT_ENDINGS and p.name != "LICENSE"
)


def faults_in(paths: list[str], checker: tidy.Checker) -> list[str]:
    return [fault for p in paths for fault in checker(p, (ROOT / p).read_text("utf-8"))]


# --- the tree ---


def test_the_tree_was_found() -> None:
    assert "api/holdfast_api/words.py" in PYTHON_FILES
    assert "tests/meta/test_tidy.py" in PYTHON_FILES
    assert {"README.md", "docs/adr/README.md", "dev", "pyproject.toml"} <= set(TEXT_FILES)


@pytest.mark.parametrize("checker", tidy.PYTHON_CHECKERS, ids=lambda c: c.__name__)
def test_every_python_file_is_tidy(checker: tidy.Checker) -> None:
    faults = faults_in(PYTHON_FILES, checker)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("checker", tidy.TEXT_CHECKERS, ids=lambda c: c.__name__)
def test_every_text_is_tidy(checker: tidy.Checker) -> None:
    faults = faults_in(TEXT_FILES, checker)
    assert not faults, "\n".join(faults)


def test_every_folder_of_modules_is_a_package() -> None:
    faults = tidy.check_packages(set(PYTHON_FILES))
    assert not faults, "\n".join(faults)


def test_every_decision_is_numbered_and_linked() -> None:
    folder = ROOT / "docs" / "adr"
    names = {path.name for path in folder.iterdir()}
    faults = tidy.check_decisions(names, (folder / "README.md").read_text("utf-8"))
    assert not faults, "\n".join(faults)


def test_every_listed_exception_is_still_needed() -> None:
    for path in tidy.WALL_CLOCK_FILES:
        text = (ROOT / path).read_text("utf-8")
        assert tidy.check_calls(f"elsewhere/{path}", text), f"{path} needs no wall clock any more"
    for path, owner in tidy.NETS | tidy.HANDED_ON:
        text = (ROOT / path).read_text("utf-8")
        assert tidy.check_nets(f"elsewhere/{path}", text), f"{path} has no net in {owner} any more"


def test_the_rooms_import_only_what_they_may() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    ended = subprocess.run(
        [program, "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LINT_SECONDS_MAX,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


# --- the checkers ---

LONG_FUNCTION = "def long() -> None:\n" + "    a = 1\n" * 70
PACKAGE = "controller/holdfast_controller"

WRONG: list[tuple[tidy.Checker, str, str]] = [
    (tidy.check_file_length, "a.py", "a = 1\n" * 501),
    (tidy.check_function_length, "a.py", LONG_FUNCTION),
    (tidy.check_function_length, "a.py", LONG_FUNCTION.replace("def", "async def")),
    (tidy.check_calls, "a.py", "import time\ntime.time()"),
    (tidy.check_calls, "a.py", "import time as t\nt.time_ns()"),
    (tidy.check_calls, "a.py", "from time import time\ntime()"),
    (tidy.check_calls, "a.py", "import time\ndef f(now=time.time): ..."),
    (tidy.check_calls, "a.py", "from datetime import datetime\ndatetime.now()"),
    (tidy.check_calls, "a.py", "import datetime\ndatetime.datetime.now()"),
    (tidy.check_calls, "a.py", "import datetime as d\nd.datetime.utcnow()"),
    (tidy.check_calls, "tests/a.py", "import time\ntime.sleep(1)"),
    (tidy.check_calls, "tests/a.py", "from time import sleep as wait\nwait(1)"),
    (tidy.check_calls, "a.py", "subprocess.run('ls', shell=True)"),
    (tidy.check_calls, "a.py", "subprocess.run('ls', shell=wanted)"),
    (tidy.check_calls, "api/holdfast_api/client.py", "print('hello')"),
    (tidy.check_calls, "agent/holdfast_agent/domain.py", "print('hello')"),
    (tidy.check_nets, "a.py", "try: f()\nexcept Exception: g()"),
    (tidy.check_nets, "a.py", "try: f()\nexcept (OSError, BaseException): g()"),
    (tidy.check_nets, "a.py", "try: f()\nexcept: g()"),
    (
        tidy.check_nets,
        f"{PACKAGE}/loop.py",
        "def other():\n    try: f()\n    except Exception: g()  # outermost net",
    ),
    (
        tidy.check_nets,
        f"{PACKAGE}/loop.py",
        "def _pass_in_a_net():\n    try: f()\n    except Exception: g()",
    ),
    (
        tidy.check_nets,
        f"{PACKAGE}/other.py",
        "def _pass_in_a_net():\n    try: f()\n    except Exception: g()  # outermost net",
    ),
    (tidy.check_calls, "tests/a.py", "print('hello')"),
    (tidy.check_calls, "api/x.py", 'if __name__ == "__main__":\n    print("ready")'),
    (tidy.check_nets, "a.py", "try: f()\nexcept BaseException as e: raise Other from e"),
    (
        tidy.check_nets,
        "deploy/holdfast_lab/namespaces.py",
        "def body():\n    try: f()\n    except BaseException as e: g(e)",
    ),
    (tidy.check_names, "a.py", "class StandbyNode: ..."),
    (tidy.check_names, "a.py", "def start_instance(): ..."),
    (tidy.check_names, "a.py", "async def on_master(): ..."),
    (tidy.check_names, "a.py", "def f(secondary_host): ..."),
    (tidy.check_names, "a.py", "def f(*, slave): ..."),
    (tidy.check_package_docstring, "api/holdfast_api/x/__init__.py", ""),
    (tidy.check_package_docstring, "agent/holdfast_agent/x.py", "# a comment\na = 1"),
    (tidy.check_addresses, "a.md", "see https://" + "pypi" + ".org/simple"),
    (tidy.check_addresses, "a.md", "in /" + "work/main/api"),
    (tidy.check_addresses, "a.py", "PATH = '/" + "root/.cache'"),
    (tidy.check_addresses, "a.py", "PATH = '/" + "home/somebody/x'"),
]

RIGHT: list[tuple[tidy.Checker, str, str]] = [
    (tidy.check_file_length, "a.py", "a = 1\n" * 500),
    (tidy.check_function_length, "a.py", LONG_FUNCTION.removesuffix("    a = 1\n")),
    (tidy.check_calls, "a.py", "import time\ntime.monotonic()\ntime.sleep(1)"),
    (tidy.check_calls, "tests/a.py", "import time\nwhile not ready():\n    time.sleep(0.1)"),
    (tidy.check_calls, "tests/a.py", 'if __name__ == "__main__":\n    print("ready")'),
    (tidy.check_nets, "a.py", "try: f()\nexcept BaseException:\n    g()\n    raise"),
    (
        tidy.check_nets,
        "deploy/holdfast_lab/namespaces.py",
        "def body():\n    try: f()\n    except BaseException as e: g(e)  # raised by the caller",
    ),
    (tidy.check_calls, "a.py", "from datetime import datetime\ndatetime.fromtimestamp(0)"),
    (tidy.check_calls, f"{PACKAGE}/adapters/store.py", "import time\ntime.time()"),
    (tidy.check_calls, "tests/a.py", "import asyncio\nasyncio.sleep(0)"),
    (tidy.check_calls, "a.py", "subprocess.run(['ls'], shell=False)"),
    (tidy.check_calls, "a.py", "console.print('hello')"),
    (tidy.check_calls, "agent/holdfast_agent/main.py", "print('hello')"),
    (tidy.check_calls, "api/holdfast_api/cli/show.py", "print('hello')"),
    (tidy.check_calls, "bench/pause.py", "print('hello')"),
    (tidy.check_nets, "a.py", "try: f()\nexcept OSError: g()"),
    (
        tidy.check_nets,
        f"{PACKAGE}/loop.py",
        "async def _pass_in_a_net():\n    try: f()\n    except Exception: g()  # an outermost net",
    ),
    (
        tidy.check_names,
        "a.py",
        "def f(host, primary): node = 1; isinstance(host, node)",
    ),
    (tidy.check_names, "a.py", "def masterful(): ..."),
    (tidy.check_package_docstring, "api/holdfast_api/x.py", '"""What it is for."""'),
    (tidy.check_package_docstring, "tests/unit/x.py", ""),
    (tidy.check_addresses, "a.py", "PATH = '/run/holdfast'; HELP = 'http://127.0.0.1:7070'"),
    (tidy.check_addresses, "a.md", "the network/home/office line; ./work/main; a.b/root/x"),
]


@pytest.mark.parametrize(("checker", "path", "text"), WRONG)
def test_what_is_wrong_is_seen(checker: tidy.Checker, path: str, text: str) -> None:
    faults = checker(path, text)
    assert len(faults) == 1
    assert faults[0].startswith(path)


@pytest.mark.parametrize(("checker", "path", "text"), RIGHT)
def test_what_is_right_is_let_pass(checker: tidy.Checker, path: str, text: str) -> None:
    assert checker(path, text) == []


def test_a_folder_without_a_package_is_seen() -> None:
    good = {"api/holdfast_api/__init__.py", "api/holdfast_api/x.py", "tests/unit/x.py"}
    assert tidy.check_packages(good) == []
    assert len(tidy.check_packages(good | {"api/holdfast_api/cli/main.py"})) == 1


INDEX = "[0000](0000-template.md) [0001](0001-a.md) see [rules](../invariants.md)"


@pytest.mark.parametrize(
    ("names", "index", "count"),
    [
        ({"0000-template.md", "0001-a.md"}, INDEX, 0),
        ({"0000-template.md", "0001-a.md", "0002-b.md"}, INDEX, 1),
        ({"0000-template.md"}, INDEX, 1),
        ({"0000-template.md", "0002-a.md"}, INDEX.replace("0001", "0002"), 1),
        ({"0000-template.md", "0001-a.md", "0001-b.md"}, INDEX + "[x](0001-b.md)", 1),
        ({"0000-template.md", "0001-a.md", "notes.md"}, INDEX + "[x](notes.md)", 2),
    ],
)
def test_decisions_are_held_to_their_numbers_and_the_index(
    names: set[str], index: str, count: int
) -> None:
    assert len(tidy.check_decisions(names | {"README.md"}, index)) == count
