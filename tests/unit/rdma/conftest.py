"""Pairs of streams, with and without immediate data."""

from collections.abc import Iterator

import pytest
from tests.unit.rdma.wire import End, pair

from holdfast_agent.core.ring import RingShape

SMALL = RingShape(size_bytes=8192, notice_limit=8)


@pytest.fixture(params=[True, False], ids=["immediate", "messages"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[End, End]]:
    """Two ends over rings of 8 KiB: (primary's, backup's)."""
    primary, backup = pair(SMALL, SMALL, has_immediate=request.param)
    yield primary, backup
    primary.stream.close()
    backup.stream.close()
