"""Runs the tests of tests/lab/inside in booted hosts, one boot for each case of the table.

What fails, is skipped or does not run inside fails here, with the report from inside.
"""

import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from _pytest.mark import ParameterSet
from tests.lab.booted.machine import BOOT_SECONDS_MAX, booted_hosts
from tests.lab.cases import CASES, Case

ROOT = Path(__file__).resolve().parents[2]
INSIDE = Path(__file__).parent / "inside"
REPORT = "/run/booted/report.xml"
ENVIRONMENT = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
"""Hypothesis alone takes ten seconds to load in there."""


def parameters() -> list[ParameterSet]:
    found = []
    for case in CASES:
        marks = [pytest.mark.timeout(case.seconds_max + 3 * BOOT_SECONDS_MAX)]
        if not case.core:
            marks.append(pytest.mark.lab_all)
        found.append(pytest.param(case, id=case.name, marks=marks))
    return found


def pytest_inside(case: Case) -> list[str | Path]:
    return [
        *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--basetemp=/run/booted/tmp"),
        *("-p", "pytest_timeout", "-v", "--durations=5"),
        *(f"--junitxml={REPORT}", "-o", f"timeout={case.seconds_max}"),
        *(INSIDE / name for name in case.files),
    ]


def faults_in(report: str, files: tuple[str, ...]) -> list[str]:
    """Return what keeps a run inside from being a good one."""
    tests = list(ET.fromstring(report).iter("testcase"))
    modules = {test.get("classname", "").split(".")[-1] for test in tests}
    faults = [f"{name}: nothing ran" for name in files if Path(name).stem not in modules]
    faults += [
        f"{test.get('name')}: {kind}: {found.get('message')}"
        for test in tests
        for kind in ("failure", "error", "skipped")
        for found in test.iter(kind)
    ]
    return faults


@pytest.mark.booted
@pytest.mark.parametrize("case", parameters())
def test_inside_booted_hosts(case: Case) -> None:
    with booted_hosts(case.hosts, case.machine) as hosts:
        ended = hosts[0].run(
            pytest_inside(case),
            environment=ENVIRONMENT,
            folder=ROOT,
            seconds_max=case.seconds_max,
        )
        sys.stdout.write(ended.text)
        report = hosts[0].run(["cat", REPORT]).checked() if ended.status in (0, 1) else ""
        console = hosts[0].diagnosis()
    assert report, f"pytest ended with {ended.status}\n{console}"
    faults = faults_in(report, case.files)
    assert not faults, "\n".join(faults)
    assert ended.status == 0, f"pytest ended with {ended.status}"


def test_every_file_inside_belongs_to_a_case() -> None:
    wanted = {name for case in CASES for name in case.files}
    found = {path.relative_to(INSIDE).as_posix() for path in INSIDE.rglob("test_*.py")}
    assert wanted == found


SUITES = '<testsuites><testsuite><testcase classname="a.test_x" name="t">{}</testcase>{}'


@pytest.mark.parametrize("kind", ["failure", "error", "skipped"])
def test_whatever_does_not_pass_inside_is_a_fault(kind: str) -> None:
    report = SUITES.format(f'<{kind} message="why"/>', "</testsuite></testsuites>")
    assert faults_in(report, ("test_x.py",)) == [f"t: {kind}: why"]


def test_a_file_of_which_nothing_ran_is_a_fault() -> None:
    report = SUITES.format("", "</testsuite></testsuites>")
    assert faults_in(report, ("test_x.py",)) == []
    assert faults_in(report, ("test_x.py", "test_y.py")) == ["test_y.py: nothing ran"]
