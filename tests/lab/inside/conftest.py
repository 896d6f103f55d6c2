"""For tests that run inside a booted host."""

import os
from collections.abc import Iterator

import pytest
from tests.lab.booted.channel import Channel

if "HOLDFAST_BOOTED_HOST" not in os.environ:
    raise pytest.UsageError(
        "tests/lab/inside runs in booted hosts: ./dev test tests/lab/test_inside.py [-k CASE]"
    )


@pytest.fixture
def other_host() -> Iterator[Channel]:
    """The second host of the case, to run commands in; what still runs in the end is killed."""
    channel = Channel.to_host("10.8.0.2")
    try:
        assert channel.wait_ready(30.0), "the other host does not answer"
        yield channel
    finally:
        channel.close()
