"""What holds for every file of the project, as functions from text to faults. Pure.

Each checker takes a file's path relative to the root and its text, and returns one sentence for
each fault. `test_tidy` runs them over the tree, and over samples that are wrong.
"""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70

PRODUCT = ("api", "controller", "agent", "deploy")
"""Folders whose packages are the product."""

WALL_CLOCK = frozenset({"time.time", "time.time_ns", "datetime.now", "datetime.utcnow"})
WALL_CLOCK_FILES = frozenset(
    {
        # The time of an event is shown to people and never compared.
        "controller/holdfast_controller/adapters/store.py",
        # A certificate is valid from one time of the wall clock to another.
        "api/holdfast_api/pki.py",
    }
)
"""Where people are told what time it was. Everything else uses a monotonic clock given by its
caller, as wall clocks jump."""

NETS = frozenset(
    {
        ("controller/holdfast_controller/loop.py", "_pass_in_a_net"),
    }
)
"""The outermost nets: functions that may catch whatever was raised and go on, each with its reason
in a comment that has the words 'outermost net'."""
HANDED_ON = frozenset(
    {
        ("agent/holdfast_agent/memory/injection.py", "run"),
        ("deploy/holdfast_lab/namespaces.py", "body"),
    }
)
"""Thread bodies that carry whatever was raised to the thread that waits for them, and say so."""

PRINTERS = re.compile(r"(^|/)(cli(\.py)?|main\.py|bench|demo[^/]*)(/|$)")
"""Files that talk to people on a terminal."""

SLEEPS = frozenset({"time.sleep"})
"""Not in tests, but for the step of a `while` that polls."""
FORBIDDEN_WORDS = frozenset({"node", "nodes", "master", "slave", "secondary", "instance"})
"""Not in names of ours: the glossary says host, primary, backup, standby, VM."""
FOREIGN_NAMES = frozenset({"generic_visit"})

REGISTRIES = ("pypi" + ".org", "pythonhosted" + ".org", "registry.npmjs" + ".org")
REGISTRY_WORDS = re.compile("|".join(re.escape(host) for host in REGISTRIES))
MACHINE_PATHS = re.compile(r"(?<![\w.])(/work|/root|/home/\w+|/Users/\w+)/[\w.]")

Function = ast.FunctionDef | ast.AsyncFunctionDef
Checker = Callable[[str, str], list[str]]


def check_file_length(path: str, text: str) -> list[str]:
    """Files stay small enough to be read at once."""
    count = len(text.splitlines())
    return [f"{path}: {count} lines, {FILE_LINES_MAX} are allowed"] * (count > FILE_LINES_MAX)


def check_function_length(path: str, text: str) -> list[str]:
    """Functions stay small enough to be seen at once; decorators do not count."""
    faults = []
    for function in functions_of(text):
        count = (function.end_lineno or function.lineno) - function.lineno + 1
        if count > FUNCTION_LINES_MAX:
            faults.append(f"{path}:{function.lineno}: {function.name} has {count} lines")
    return faults


def check_calls(path: str, text: str) -> list[str]:
    """Calls that have a better replacement; mentions count, as a default argument calls later."""
    faults = []
    tree = ast.parse(text)
    names = imported_names(tree)
    polling = {inner for w in ast.walk(tree) if isinstance(w, ast.While) for inner in ast.walk(w)}
    for found in ast.walk(tree):
        if isinstance(found, ast.Attribute | ast.Name):
            name = full_name(found, names)
            if is_any(name, WALL_CLOCK) and path not in WALL_CLOCK_FILES:
                faults.append(f"{path}:{found.lineno}: {name}: take a monotonic time as a number")
            if is_any(name, SLEEPS) and path.startswith("tests/") and found not in polling:
                faults.append(f"{path}:{found.lineno}: {name} in a test: wait for an event")
        if isinstance(found, ast.Call):
            faults += _check_call(path, found, may_print=_may_print(path, text))
    return faults


def _may_print(path: str, text: str) -> bool:
    """Programs that tests start talk to them through their output."""
    program = path.startswith("tests/") and 'if __name__ == "__main__":' in text
    return program or PRINTERS.search(path) is not None


def _check_call(path: str, call: ast.Call, *, may_print: bool) -> list[str]:
    faults = []
    if any(_is_true(k) for k in call.keywords if k.arg == "shell"):
        faults.append(f"{path}:{call.lineno}: shell=True: give a list of arguments")
    if isinstance(call.func, ast.Name) and call.func.id == "print" and not may_print:
        faults.append(f"{path}:{call.lineno}: print: log, or return the text")
    return faults


def _is_true(keyword: ast.keyword) -> bool:
    """Everything but a plain False may be true when it runs."""
    return not (isinstance(keyword.value, ast.Constant) and not keyword.value.value)


def check_nets(path: str, text: str) -> list[str]:
    """Whoever catches everything raises it again, or is a listed place that says why."""
    lines = text.splitlines()
    faults = []
    for owner, handler in handlers_of(ast.parse(text), None):
        line = lines[handler.lineno - 1]
        listed = (path, owner) in NETS and "outermost net" in line
        listed |= (path, owner) in HANDED_ON and "#" in line
        if _catches_everything(handler) and not (listed or _raises_again(handler)):
            faults.append(f"{path}:{handler.lineno}: catches everything; see NETS in tests/meta")
    return faults


def _raises_again(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def _catches_everything(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(isinstance(c, ast.Name) and c.id in ("Exception", "BaseException") for c in caught)


def check_names(path: str, text: str) -> list[str]:
    """Classes, functions and arguments of ours use the glossary's words."""
    faults = []
    for found in ast.walk(ast.parse(text)):
        if isinstance(found, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = found.name
        elif isinstance(found, ast.arg):
            name = found.arg
        else:
            continue
        wrong = words_of(name) & FORBIDDEN_WORDS
        if wrong and name not in FOREIGN_NAMES:
            faults.append(
                f"{path}:{found.lineno}: {name}: {', '.join(wrong)} is not in the glossary"
            )
    return faults


def check_addresses(path: str, text: str) -> list[str]:
    """No package registry's host and no path of anybody's machine."""
    faults = []
    for number, line in enumerate(text.splitlines(), 1):
        faults += [f"{path}:{number}: {m.group()}" for m in REGISTRY_WORDS.finditer(line)]
        faults += [f"{path}:{number}: {m.group()}" for m in MACHINE_PATHS.finditer(line)]
    return faults


def check_package_docstring(path: str, text: str) -> list[str]:
    """Every module of the product, and so every package, says what it is for."""
    if not path.startswith(tuple(f"{folder}/" for folder in PRODUCT)):
        return []
    return [] if ast.get_docstring(ast.parse(text)) else [f"{path}: has no docstring"]


def check_packages(paths: set[str]) -> list[str]:
    """Every folder of modules in the product is a package."""
    folders = {
        PurePosixPath(path).parent
        for path in paths
        if path.startswith(tuple(f"{folder}/" for folder in PRODUCT)) and path.endswith(".py")
    }
    return [
        f"{folder}: has modules and no __init__.py"
        for folder in sorted(folders)
        if len(folder.parts) > 1
        and str(folder / "__init__.py") not in paths
        # What runs inside a guest is data to us.
        and not str(folder).endswith("_files")
    ]


def check_decisions(names: set[str], index: str) -> list[str]:
    """ADRs are numbered without gaps, and the index links each of them and nothing else."""
    decisions = sorted(names - {"README.md"})
    faults = [
        f"{name}: name it NNNN-in-words.md"
        for name in decisions
        if not re.fullmatch(r"\d{4}-[a-z0-9-]+\.md", name)
    ]
    numbers = [name[:4] for name in decisions]
    if numbers != [f"{number:04}" for number in range(len(numbers))]:
        faults.append(f"the numbers have gaps or doubles: {' '.join(numbers)}")
    linked = {target for target in re.findall(r"\]\(([^)]+)\)", index) if "/" not in target}
    faults += [f"{name}: the index does not link it" for name in decisions if name not in linked]
    faults += [f"{name}: linked, and not there" for name in sorted(linked - names)]
    return faults


PYTHON_CHECKERS: tuple[Checker, ...] = (
    check_file_length,
    check_function_length,
    check_calls,
    check_nets,
    check_names,
    check_package_docstring,
)
TEXT_CHECKERS: tuple[Checker, ...] = (check_addresses,)


# --- looking into a syntax tree ---


def functions_of(text: str) -> Iterator[Function]:
    """Yield every function, methods and inner ones included."""
    for found in ast.walk(ast.parse(text)):
        if isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef):
            yield found


def handlers_of(tree: ast.AST, owner: str | None) -> Iterator[tuple[str | None, ast.ExceptHandler]]:
    """Yield every except clause with the name of the innermost function around it."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.ExceptHandler):
            yield owner, child
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from handlers_of(child, child.name)
        else:
            yield from handlers_of(child, owner)


def imported_names(tree: ast.AST) -> dict[str, str]:
    """Return what imported names stand for: `from time import time as t` gives t: time.time."""
    names: dict[str, str] = {}
    for found in ast.walk(tree):
        if isinstance(found, ast.Import):
            names |= {a.asname or a.name: a.name for a in found.names}
        if isinstance(found, ast.ImportFrom):
            names |= {a.asname or a.name: f"{found.module}.{a.name}" for a in found.names}
    return names


def full_name(found: ast.expr, names: dict[str, str]) -> str:
    """Return the dotted name of an expression, or nothing if it is no such name."""
    if isinstance(found, ast.Name):
        return names.get(found.id, "")
    if isinstance(found, ast.Attribute):
        left = full_name(found.value, names)
        return f"{left}.{found.attr}" if left else ""
    return ""


def is_any(name: str, wanted: frozenset[str]) -> bool:
    """Whether a dotted name is one of `wanted`, which `datetime.datetime.now` is too."""
    return bool(name) and any(name == w or name.endswith(f".{w}") for w in wanted)


def words_of(name: str) -> set[str]:
    """Return the words of a name: `StartNode` and `start_node` have the same."""
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return set(parted.lower().split("_"))
