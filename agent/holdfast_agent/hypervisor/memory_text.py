"""What QEMU's human monitor prints about memory, read into records. Pure.

The texts (`hw/core/machine-hmp-cmds.c`, `softmmu/memory.c`, `softmmu/physmem.c`):

- `info ramblock`: a table; one line per block: name, page size, offset, used, total, and from
  QEMU 8.2 on the host address and whether it is read-only.
- `info mtree -f`: flat views; each names its address spaces (` AS "memory", root: system`) and
  lists ranges: `0000000000100000-000000000fffffff (prio 0, ram): pc.ram @0000000000100000`.
- `gpa2hva G`: `Host virtual address for 0x0 (pc.ram) is 0x7f...`.
"""

import re
from dataclasses import dataclass

SYSTEM_MEMORY = "memory"
"""QEMU's name of the address space that CPUs see outside of SMM."""
WRITABLE_KINDS = frozenset({"ram", "nv-ram", "romd", "nv-romd"})
"""Kinds of ranges that a guest can change: RAM, and flash, which reads like a ROM."""
DEVICE_KINDS = frozenset({"ramd", "nv-ramd"})
"""RAM of a passed-through device."""

_RAM_BLOCK = re.compile(
    r"^\s*(?P<name>\S.*?)\s+(?P<page>\d+) (?P<unit>[KMG])iB\s+0x[0-9a-f]+"
    r"\s+0x(?P<used>[0-9a-f]+)\s+0x(?P<total>[0-9a-f]+)"
    r"(?:\s+0x(?P<host>[0-9a-f]+)(?:\s+(?P<access>ro|rw))?)?\s*$"
)
_ADDRESS_SPACE = re.compile(r'^\s*AS "(?P<name>[^"]*)", root: ')
# The accelerator's name stands there once for each address space that shares the view: twice where
# KVM emulates system management mode (mtree_print_flatview).
_RANGE = re.compile(
    r"^\s*(?P<start>[0-9a-f]{16})-(?P<end>[0-9a-f]{16}) \(prio -?\d+, (?P<kind>[^)]+)\): "
    r"(?P<name>.*?)(?: @(?P<offset>[0-9a-f]{16}))?(?: (?:KVM|HVF|XEN))*$"
)
_HOST_ADDRESS = re.compile(
    r"Host virtual address for \S+ \((?P<name>.*)\) is 0x(?P<host>[0-9a-f]+)"
)
_UNIT_BYTES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class RamBlock:
    """One line of `info ramblock`."""

    name: str
    page_size_bytes: int
    used_bytes: int
    total_bytes: int
    host_address: int | None
    """Only newer QEMUs say it."""

    def is_of_region(self, region: str) -> bool:
        """Tell whether this is the block of the memory region `region`.

        Blocks of devices carry the device's path in front: `0000:00:01.0/vga.vram`.
        """
        return self.name == region or self.name.endswith(f"/{region}")


@dataclass(frozen=True)
class MappedRange:
    """One range of a flat view: where the guest sees a piece of a region."""

    start: int
    size_bytes: int
    kind: str
    region: str
    offset: int
    """Of this piece within its region."""


def parse_ram_blocks(text: str) -> list[RamBlock]:
    """Read `info ramblock`; lines that are no block are passed over."""
    blocks = []
    for line in text.splitlines():
        found = _RAM_BLOCK.match(line)
        if found:
            blocks.append(
                RamBlock(
                    name=found["name"],
                    page_size_bytes=int(found["page"]) * _UNIT_BYTES[found["unit"]],
                    used_bytes=int(found["used"], 16),
                    total_bytes=int(found["total"], 16),
                    host_address=int(found["host"], 16) if found["host"] else None,
                )
            )
    return blocks


def parse_flat_view(text: str, address_space: str = SYSTEM_MEMORY) -> list[MappedRange]:
    """Read the ranges of the flat view that serves `address_space` from `info mtree -f`."""
    ranges: list[MappedRange] = []
    serves = False
    for line in text.splitlines():
        if line.startswith("FlatView #"):
            if ranges:
                break
            serves = False
            continue
        space = _ADDRESS_SPACE.match(line)
        if space:
            serves = serves or space["name"] == address_space
            continue
        found = _RANGE.match(line) if serves else None
        if found:
            start = int(found["start"], 16)
            ranges.append(
                MappedRange(
                    start=start,
                    size_bytes=int(found["end"], 16) - start + 1,
                    kind=found["kind"],
                    region=found["name"],
                    offset=int(found["offset"], 16) if found["offset"] else 0,
                )
            )
    return ranges


def parse_host_address(text: str) -> tuple[str, int] | None:
    """Read `gpa2hva` as (region, host address); None when nothing is mapped there."""
    found = _HOST_ADDRESS.search(text)
    return (found["name"], int(found["host"], 16)) if found else None


@dataclass(frozen=True)
class Mapping:
    """One line of /proc/PID/maps."""

    start: int
    end: int
    access: str
    """As the kernel prints it: `rw-p`, `---p`, `rw-s`, ..."""
    file_offset: int
    inode: int
    path: str

    @property
    def shared(self) -> bool:
        """Writes reach the file."""
        return self.access[3] == "s"

    @property
    def writable(self) -> bool:
        """QEMU may write here."""
        return self.access[1] == "w"


def parse_maps(text: str) -> list[Mapping]:
    """Read /proc/PID/maps, in ascending order of addresses."""
    mappings = []
    for line in text.splitlines():
        bounds, access, offset, _device, inode, *path = line.split(None, 5)
        start, end = bounds.split("-")
        mappings.append(
            Mapping(
                start=int(start, 16),
                end=int(end, 16),
                access=access,
                file_offset=int(offset, 16),
                inode=int(inode),
                path=path[0] if path else "",
            )
        )
    return mappings
