"""Where a guest's memory is in its QEMU's address space. Talks QMP; reads /proc/PID/maps.

A checkpoint covers every RAM block of which the guest sees a piece it can change: main memory
(below and above 4 GiB are two ranges of one block), video memory, memory devices, flash. Blocks
that are ROM only are identical on both sides. The address of a block is that of one of its pieces
(`gpa2hva`) minus the piece's offset; every other piece must give the same address, and the whole
block must lie in mappings of one kind without a gap. QEMU may keep several mappings for a block,
and the kernel may merge a block's mapping with its neighbours.

A standby's guest has not run yet and so has not mapped its video memory: nothing in QEMU says
where that is (before QEMU 8.2). It is then found by its shape: QEMU aligns anonymous RAM and puts
one inaccessible page behind it (`qemu_ram_mmap` in `util/mmap-alloc.c`). Only a mapping of exactly
the block's size in front of such a page counts, and only if it is the only one.

A `shared` block is backed by a file (memfd, hugetlbfs, tmpfs): the mapping's entry in
/proc/PID/map_files can be opened and mapped by whoever may trace QEMU. A `private` one can only
be reached through QEMU's address space.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast_agent.core.memory_map import PAGE_SIZE_BYTES
from holdfast_agent.hypervisor.memory_text import (
    WRITABLE_KINDS,
    MappedRange,
    Mapping,
    RamBlock,
    parse_flat_view,
    parse_host_address,
    parse_maps,
    parse_ram_blocks,
)
from holdfast_agent.hypervisor.qmp import QmpConnection
from holdfast_agent.memory.location import BlockLocation

RAM_ALIGNMENT_BYTES = 2 << 20
"""`QEMU_VMALLOC_ALIGN` on x86-64 and arm64: a huge page."""
_VIDEO_MEMORY = re.compile(r"(^|/)[^/]*\b(vga\.vram|vram|vgamem)\b")


class MemoryNotFound(ValueError):  # noqa: N818 - reads as a sentence where it is raised
    """A block cannot be located; `code` is the preflight issue's."""

    def __init__(self, code: str, message: str) -> None:
        """Keep the code for preflight."""
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class BlockPieces:
    """A block and the pieces of it that the guest sees."""

    block: RamBlock
    region: str
    pieces: tuple[MappedRange, ...]


def blocks_to_cover(blocks: Sequence[RamBlock], view: Sequence[MappedRange]) -> list[BlockPieces]:
    """Return the blocks that a checkpoint must hold, in the order QEMU lists them. Pure.

    Raises MemoryNotFound when a region has no block or more than one, and when the machine has
    video memory that the guest has not mapped (nothing says where it is then).
    """
    changeable = {piece.region for piece in view if piece.kind in WRITABLE_KINDS}
    covered: dict[str, BlockPieces] = {}
    for region in changeable:
        owners = [block for block in blocks if block.is_of_region(region)]
        if len(owners) != 1:
            raise MemoryNotFound(
                "memory-not-found",
                f"memory region {region} belongs to {len(owners)} RAM blocks of "
                f"{[block.name for block in blocks]}; give every memory device its own id",
            )
        pieces = tuple(piece for piece in view if piece.region == region)
        covered[owners[0].name] = BlockPieces(owners[0], region, pieces)
    unmapped = [
        block.name
        for block in blocks
        if block.name not in covered and _VIDEO_MEMORY.search(block.name)
    ]
    if unmapped:
        raise MemoryNotFound(
            "video-memory-unmapped",
            f"the guest has not mapped its video memory ({', '.join(unmapped)}) yet: wait until "
            "it has booted, or start the VM without a video card (-vga none)",
        )
    found = [covered[block.name] for block in blocks if block.name in covered]
    if not found:
        raise MemoryNotFound(
            "memory-not-found", "QEMU lists no RAM in the address space of the guest"
        )
    return found


def placed(
    pieces: BlockPieces, host_address: int, mappings: Sequence[Mapping], pid: int
) -> BlockLocation:
    """Return where a block lies, given its address and QEMU's mappings. Pure.

    Raises MemoryNotFound when it is not mapped whole, writable and in one kind.
    """
    block = pieces.block
    size_bytes = block.used_bytes
    end = host_address + size_bytes
    inside = [m for m in mappings if m.start < end and m.end > host_address]
    position = host_address
    for mapping in inside:
        if mapping.start > position:
            break
        position = mapping.end
    first = inside[0] if inside else None
    if first is None or position < end or first.start > host_address:
        raise MemoryNotFound(
            "memory-not-found",
            f"block {block.name} ({size_bytes} bytes at {host_address:#x}) is not mapped whole",
        )
    if host_address % PAGE_SIZE_BYTES or size_bytes % PAGE_SIZE_BYTES:
        raise MemoryNotFound(
            "memory-not-found", f"block {block.name} at {host_address:#x} is not page-aligned"
        )
    shared = first.shared and first.inode != 0
    file_start = first.file_offset - first.start
    for mapping in inside:
        same_file = (
            mapping.inode == first.inode and mapping.file_offset - mapping.start == file_start
        )
        if (mapping.shared and mapping.inode != 0) != shared or (shared and not same_file):
            raise MemoryNotFound(
                "memory-not-found", f"block {block.name} lies in mappings of different kinds"
            )
        if not mapping.writable:
            raise MemoryNotFound(
                "memory-not-found", f"block {block.name} is mapped read-only by QEMU"
            )
    return BlockLocation(
        name=pieces.region,
        size_bytes=size_bytes,
        host_address=host_address,
        shared=shared,
        map_path=f"/proc/{pid}/map_files/{first.start:x}-{first.end:x}" if shared else None,
        file_offset=file_start + host_address if shared else 0,
    )


def locate_blocks(qmp: QmpConnection, pid: int) -> list[BlockLocation]:
    """Find all RAM blocks that a checkpoint must hold; changes nothing.

    Needs the right to read /proc/PID/maps. Raises MemoryNotFound with the preflight code,
    VirtualMachineFailed when QEMU does not answer.
    """
    pieces_of_blocks = read_blocks(qmp)
    addresses = [_host_address(qmp, pieces) for pieces in pieces_of_blocks]
    mappings = parse_maps(Path(f"/proc/{pid}/maps").read_text(encoding="utf-8"))
    return [
        placed(pieces, address, mappings, pid)
        for pieces, address in zip(pieces_of_blocks, addresses, strict=True)
    ]


def read_blocks(qmp: QmpConnection) -> list[BlockPieces]:
    """Return the blocks that a checkpoint must hold, without where they are."""
    blocks = parse_ram_blocks(qmp.human("info ramblock"))
    return blocks_to_cover(blocks, parse_flat_view(qmp.human("info mtree -f")))


def _host_address(qmp: QmpConnection, pieces: BlockPieces) -> int:
    """Ask QEMU where each readable piece of a block is; all must tell the same block address."""
    addresses = set()
    for piece in pieces.pieces:
        answer = qmp.human(f"gpa2hva {piece.start:#x}")
        found = parse_host_address(answer)
        if found is not None and found[0] == pieces.region:
            addresses.add(found[1] - piece.offset)
    if pieces.block.host_address is not None:
        addresses.add(pieces.block.host_address)
    if len(addresses) != 1:
        raise MemoryNotFound(
            "memory-not-found",
            f"QEMU gives {len(addresses)} host addresses for block {pieces.block.name}",
        )
    return addresses.pop()


def locate_named_blocks(
    qmp: QmpConnection, pid: int, regions: Sequence[str]
) -> list[BlockLocation]:
    """Find the blocks of these regions in this order, also those the guest has not mapped.

    For a standby. Raises MemoryNotFound when one is missing or cannot be told from another.
    """
    blocks = parse_ram_blocks(qmp.human("info ramblock"))
    view = parse_flat_view(qmp.human("info mtree -f"))
    wanted = []
    for region in regions:
        owners = [block for block in blocks if block.is_of_region(region)]
        if len(owners) != 1:
            raise MemoryNotFound(
                "memory-not-found", f"{len(owners)} RAM blocks of this QEMU belong to {region}"
            )
        mapped = tuple(piece for piece in view if piece.region == region)
        wanted.append(BlockPieces(owners[0], region, mapped))
    known = {
        pieces.region: _host_address(qmp, pieces)
        for pieces in wanted
        if pieces.pieces or pieces.block.host_address is not None
    }
    mappings = parse_maps(Path(f"/proc/{pid}/maps").read_text(encoding="utf-8"))
    for pieces in wanted:
        if pieces.region not in known:
            known[pieces.region] = address_by_shape(pieces.block, mappings, set(known.values()))
    return [placed(pieces, known[pieces.region], mappings, pid) for pieces in wanted]


def address_by_shape(block: RamBlock, mappings: Sequence[Mapping], taken: set[int]) -> int:
    """Return where a private block must be, by its size and the guard page behind it. Pure.

    Raises MemoryNotFound when no mapping fits, or more than one.
    """
    fitting = []
    for mapping, behind in itertools.pairwise(mappings):
        start = mapping.end - block.total_bytes
        if (
            mapping.access == "rw-p"
            and not mapping.path
            and behind.start == mapping.end
            and behind.access == "---p"
            and behind.end - behind.start == block.page_size_bytes
            and start >= mapping.start
            and start % RAM_ALIGNMENT_BYTES == 0
            and start not in taken
            and (start == mapping.start or mapping.end - mapping.start < 2 * block.total_bytes)
        ):
            fitting.append(start)
    if len(fitting) != 1:
        raise MemoryNotFound(
            "memory-not-found",
            f"{len(fitting)} mappings of QEMU look like block {block.name}; one was expected",
        )
    return fitting[0]
