"""Registered memory by address: what the NIC may read where it lies. Registers with the NIC.

Memory is registered when its owner says so, once, and not when it is first sent: registering takes
about as long as copying. The registration ends by itself when the array goes, before its memory is
given back; so an address never stands for memory that was there before.
"""

import weakref
from bisect import bisect_right
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from holdfast_agent.transport.rdma.verbs import Region


class Regions:
    """What is registered for one connection. Not thread-safe but for arrays that go."""

    def __init__(self, register: Callable[[int, int], Region]) -> None:
        """Register with `register(address, size_bytes)`."""
        self._register = register
        self._regions: list[Region] = []
        self._starts: list[int] = []

    def add(self, array: NDArray[np.uint8]) -> None:
        """Register the memory of `array` until it goes, or `close`. Raises OSError."""
        owner = _owner_of(array)
        address, size_bytes = owner.ctypes.data, owner.nbytes
        if size_bytes == 0 or self.find(address, size_bytes) is not None:
            return
        region = self._register(address, size_bytes)
        position = bisect_right(self._starts, address)
        self._starts.insert(position, address)
        self._regions.insert(position, region)
        weakref.finalize(owner, self._forget, region).atexit = False

    def find(self, address: int, size_bytes: int) -> Region | None:
        """Return the region that holds all of this memory."""
        position = bisect_right(self._starts, address) - 1
        if position < 0:
            return None
        region = self._regions[position]
        inside = address + size_bytes <= region.address + region.size_bytes
        return region if inside else None

    def close(self) -> None:
        """End all registrations. Idempotent."""
        for region in list(self._regions):
            self._forget(region)

    def _forget(self, region: Region) -> None:
        if region in self._regions:
            position = self._regions.index(region)
            del self._regions[position]
            del self._starts[position]
            region.close()


def address_of(view: memoryview) -> int:
    """Return where the bytes of a view begin."""
    return int(np.frombuffer(view, dtype=np.uint8).ctypes.data)


def _owner_of(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the array whose end is the end of the memory."""
    owner = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    return owner
