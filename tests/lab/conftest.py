"""Keeps the tests of booted hosts out of this one, and the cases that are not core for later."""

import os

import pytest

IS_BOOTED = "HOLDFAST_BOOTED_HOST" in os.environ
collect_ignore = [] if IS_BOOTED else ["inside"]
LEFT_OUT = pytest.StashKey[list[str]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what is marked `lab_all`, unless it is wanted."""
    if config.getoption("--lab-all"):
        return
    left_out = [item for item in items if item.get_closest_marker("lab_all")]
    if left_out:
        config.stash[LEFT_OUT] = [item.name for item in left_out]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Name what was left out."""
    names = config.stash.get(LEFT_OUT, [])
    if names:
        terminalreporter.section("left out of the booted lab, run by --lab-all")
        for name in names:
            terminalreporter.line(name)
