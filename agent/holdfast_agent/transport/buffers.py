"""Memory into which payloads are received. Not thread-safe; belongs to one connection.

A frame's payload lies in a buffer of this pool until the next frame is received, unless it is kept:
then it is the keeper's until it is given back. So the backup stages a checkpoint without copying
it: it keeps its PAGES frames and gives them back when they are applied.

    kept_bytes <= limit_bytes

Buffers of frame size are reused; a few stay for the next checkpoint, the others are freed.
"""

import numpy as np
from numpy.typing import NDArray

from holdfast_agent.core.failures import StagingFull

MAX_FREE_BUFFERS = 8
SMALL_SIZE_BYTES = 64 * 1024
"""Payloads up to this size get memory of their own: acknowledgements need no slab."""


class StagingLimitReached(StagingFull):
    """More payload would be kept than the limit allows: this host is short of memory for it."""

    def __init__(self, *, needed_bytes: int, limit_bytes: int) -> None:
        """Remember both sizes."""
        super().__init__(
            f"staging needs {needed_bytes} bytes, the limit is {limit_bytes}: "
            "raise the limit or use a shorter interval"
        )
        self.needed_bytes = needed_bytes
        self.limit_bytes = limit_bytes


class ReceiveBuffers:
    """Buffers of one size, reused, and an account of what is kept."""

    def __init__(self, size_bytes: int, limit_bytes: int) -> None:
        """Set nothing aside yet."""
        assert size_bytes > 0, size_bytes
        self.kept_bytes = 0
        self._size_bytes = size_bytes
        self._limit_bytes = limit_bytes
        self._free: list[NDArray[np.uint8]] = []

    def take(self, length: int) -> NDArray[np.uint8]:
        """Return a buffer of at least `length` bytes.

        Memory of its size is touched only as bytes arrive, so announcing much costs nothing.
        """
        if length <= SMALL_SIZE_BYTES or length > self._size_bytes:
            return np.empty(length, dtype=np.uint8)
        return self._free.pop() if self._free else np.empty(self._size_bytes, dtype=np.uint8)

    def put(self, buffer: NDArray[np.uint8]) -> None:
        """Take a buffer back that was never kept."""
        is_pooled = len(buffer) == self._size_bytes > SMALL_SIZE_BYTES
        if is_pooled and len(self._free) < MAX_FREE_BUFFERS:
            self._free.append(buffer)

    def keep(self, length: int) -> None:
        """Account for a payload of `length` bytes whose buffer stays in use.

        What counts is what was written: the rest of a fresh buffer was never touched. Raises
        StagingLimitReached and keeps nothing.
        """
        needed_bytes = self.kept_bytes + length
        if needed_bytes > self._limit_bytes:
            raise StagingLimitReached(needed_bytes=needed_bytes, limit_bytes=self._limit_bytes)
        self.kept_bytes = needed_bytes

    def keep_no_more(self, length: int) -> None:
        """End the account of `length` bytes that were kept, in memory that is not the pool's."""
        self.kept_bytes -= length
        assert self.kept_bytes >= 0, "something was given back twice"

    def give_back(self, buffer: NDArray[np.uint8], length: int) -> None:
        """End the keeping of a payload of `length` bytes."""
        self.keep_no_more(length)
        self.put(buffer)
