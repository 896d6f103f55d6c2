"""Starts the processes whose memory is tracked."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.integration.memory.tracking import HERE

from holdfast_agent.core.memory_map import MemoryMap
from holdfast_agent.memory import BlockLocation


def _load_target() -> ModuleType:
    path = Path(__file__).with_name("target.py")
    spec = importlib.util.spec_from_file_location("holdfast_memory_target", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


target_module = _load_target()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Say which trackers the tests of all trackers are for."""
    if "any_kind" in metafunc.fixturenames:
        metafunc.parametrize("any_kind", HERE)
    if "marking_kind" in metafunc.fixturenames:
        metafunc.parametrize("marking_kind", [kind for kind in HERE if kind != "compare"])


@pytest.fixture
def start_target() -> Iterator[Callable[..., Any]]:
    """Return a function that starts a target from (name, pages, kind[, huge]) tuples."""
    started: list[Any] = []

    def start(*blocks: tuple[Any, ...]) -> Any:
        target = target_module.Target([target_module.Block(*block) for block in blocks])
        target.locations = [BlockLocation(**block) for block in target.blocks]
        target.memory_map = MemoryMap.of_sizes(
            (location.name, location.size_bytes) for location in target.locations
        )
        started.append(target)
        return target

    yield start
    for target in started:
        target.end()
