"""The process whose memory is tracked, shared with the integration tests."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.integration.memory.tracking import HERE

from holdfast_agent.core.memory_map import MemoryMap
from holdfast_agent.memory import BlockLocation


def _load_target() -> ModuleType:
    path = Path(__file__).parents[2] / "integration" / "memory" / "target.py"
    spec = importlib.util.spec_from_file_location("holdfast_memory_target", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Say which trackers the tests of all trackers are for."""
    if "any_kind" in metafunc.fixturenames:
        metafunc.parametrize("any_kind", HERE)


@pytest.fixture(scope="module")
def target() -> Iterator[Any]:
    """A target with shared and private blocks, none of them whole huge pages."""
    module = _load_target()
    blocks = [
        module.Block("shared", 1283, "shared"),
        module.Block("private", 700, "private"),
        module.Block("huge", 1537, "private", huge=True),
        module.Block("small", 3, "shared"),
    ]
    with module.Target(blocks) as target:
        target.locations = [BlockLocation(**block) for block in target.blocks]
        target.memory_map = MemoryMap.of_sizes(
            (location.name, location.size_bytes) for location in target.locations
        )
        yield target
