"""What the tests of the agent's driving parts share: short paths for sockets, an introduction."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast_agent.checkpoint.worker_messages import Introduced
from holdfast_api.words import Role


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A folder whose path is short enough for sockets."""
    path = Path(tempfile.mkdtemp(prefix="hf-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def introduction() -> Introduced:
    return Introduced(vm="vm", host="h1", generation=3, role=Role.BACKUP, pid=1)
