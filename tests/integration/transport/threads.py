"""Two sides at once."""

import concurrent.futures
from collections.abc import Callable
from typing import TypeVar

One = TypeVar("One")
Other = TypeVar("Other")
BOTH_SECONDS = 60.0


def both(one: Callable[[], One], other: Callable[[], Other]) -> tuple[One, Other]:
    """Run two sides of something at once; return what they return, or raise what the first did."""
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        first, second = threads.submit(one), threads.submit(other)
        return first.result(BOTH_SECONDS), second.result(BOTH_SECONDS)
