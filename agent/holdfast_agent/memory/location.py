"""Where the RAM blocks of a QEMU process live, as the hypervisor side found out. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass

from holdfast_agent.core.memory_map import PAGE_SIZE_BYTES, MemoryMap


@dataclass(frozen=True)
class BlockLocation:
    """One RAM block in the address space of QEMU.

    A shared block can be mapped by others: `map_path` (like `/proc/PID/map_files/RANGE`) opens for
    reading and writing, and the block begins at `file_offset` of that file. A private block is
    reachable only through the process; its `map_path` is None.
    """

    name: str
    size_bytes: int
    host_address: int
    shared: bool
    map_path: str | None
    file_offset: int

    def __post_init__(self) -> None:
        """Refuse what cannot be paged or mapped."""
        for label, value in (
            ("size", self.size_bytes),
            ("host address", self.host_address),
            ("file offset", self.file_offset),
        ):
            if value % PAGE_SIZE_BYTES:
                raise ValueError(f"block {self.name}: {label} {value:#x} is not whole pages")
        if self.size_bytes <= 0 or self.host_address <= 0 or self.file_offset < 0:
            raise ValueError(f"block {self.name}: size, address or offset is out of range: {self}")
        if self.shared and self.map_path is None:
            raise ValueError(f"block {self.name} is shared but has no path to map it by")

    @property
    def end_address(self) -> int:
        """First host address behind the block."""
        return self.host_address + self.size_bytes


def in_map_order(
    locations: Iterable[BlockLocation], memory_map: MemoryMap
) -> tuple[BlockLocation, ...]:
    """Return the locations in the order of the map's blocks; raises ValueError if they differ."""
    found = {location.name: location for location in locations}
    wanted = {block.name: block.size_bytes for block in memory_map.blocks}
    if {name: location.size_bytes for name, location in found.items()} != wanted:
        raise ValueError(f"blocks found {sorted(found)} are not those of the map {wanted}")
    return tuple(found[block.name] for block in memory_map.blocks)
