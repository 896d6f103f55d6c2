"""Reading what QEMU prints about memory; the samples are QEMU 7.2's."""

from pathlib import Path

import pytest

from holdfast_agent.hypervisor.guest_memory import (
    BlockPieces,
    MemoryNotFound,
    address_by_shape,
    blocks_to_cover,
    placed,
)
from holdfast_agent.hypervisor.memory_text import (
    MappedRange,
    Mapping,
    RamBlock,
    parse_flat_view,
    parse_host_address,
    parse_maps,
    parse_ram_blocks,
)

MB = 1 << 20
GB = 1 << 30


def sample(name: str) -> str:
    return Path(__file__).with_name("samples").joinpath(f"{name}.txt").read_text()


def test_the_blocks_of_a_q35_machine_are_its_memory_and_its_video_memory() -> None:
    covered = blocks_to_cover(
        parse_ram_blocks(sample("q35-256m.ramblock")), parse_flat_view(sample("q35-256m.mtree"))
    )
    assert [(c.region, c.block.used_bytes) for c in covered] == [
        ("ram0", 256 * MB),
        ("vga.vram", 16 * MB),
    ]


def test_memory_above_four_gigabytes_is_a_second_range_of_the_same_block() -> None:
    covered = blocks_to_cover(
        parse_ram_blocks(sample("pc-4g-dimm.ramblock")), parse_flat_view(sample("pc-4g-dimm.mtree"))
    )
    assert [(c.region, c.block.used_bytes) for c in covered] == [
        ("pc.ram", 4 * GB),
        ("dm0", 128 * MB),
        ("vga.vram", 16 * MB),
    ]
    high = [piece for piece in covered[0].pieces if piece.start == 4 * GB]
    assert [(piece.offset, piece.size_bytes) for piece in high] == [(3 * GB, 1 * GB)]


@pytest.mark.parametrize("name", ["q35-256m", "pc-4g-dimm"])
def test_a_block_lies_where_each_of_its_pieces_says(name: str) -> None:
    covered = blocks_to_cover(
        parse_ram_blocks(sample(f"{name}.ramblock")), parse_flat_view(sample(f"{name}.mtree"))
    )
    mappings = parse_maps(sample(f"{name}.maps"))
    starts = {"0x0": 0, "0xfd000000": 0xFD000000, "0x100000000": 4 * GB, "0x140000000": 0x140000000}
    checked = 0
    for line, start in zip(sample(f"{name}.gpa2hva").splitlines(), starts.values(), strict=True):
        found = parse_host_address(line)
        if found is None:
            continue
        block = next(c for c in covered if c.region == found[0])
        piece = next(p for p in block.pieces if p.start == start)
        location = placed(block, found[1] - piece.offset, mappings, 7)
        assert location.size_bytes == block.block.used_bytes
        assert location.shared == (found[0] == "ram0")
        assert (location.map_path or "").startswith("/proc/7/map_files/") == location.shared
        checked += 1
    assert checked >= 2


@pytest.mark.parametrize("name", ["q35-256m", "pc-4g-dimm"])
def test_video_memory_is_found_by_its_shape_where_gpa2hva_has_it(name: str) -> None:
    blocks = parse_ram_blocks(sample(f"{name}.ramblock"))
    (vram,) = (block for block in blocks if block.is_of_region("vga.vram"))
    line = next(x for x in sample(f"{name}.gpa2hva").splitlines() if "vga.vram" in x)
    told = parse_host_address(line)
    assert told is not None
    assert address_by_shape(vram, parse_maps(sample(f"{name}.maps")), set()) == told[1]


def test_a_view_that_is_not_rendered_lends_no_ranges_from_the_next() -> None:
    text = (
        "FlatView #0\n"
        ' AS "memory", root: system\n'
        " Root memory region: (none)\n"
        "  No rendered FlatView\n\n"
        "FlatView #1\n"
        ' AS "other", root: x\n'
        "  0000000000000000-0000000000000fff (prio 0, ram): other.ram\n"
    )
    assert parse_flat_view(text) == []
    assert len(parse_flat_view(text, "other")) == 1


@pytest.mark.parametrize("suffix", ["", " KVM", " KVM KVM", " @0000000000001000 KVM KVM"])
def test_a_region_is_known_whatever_its_accelerator_says_behind_it(suffix: str) -> None:
    view = 'FlatView #0\n AS "memory", root: system\n'
    line = f"  0000000000000000-0000000003ffffff (prio 0, ram): pc.ram{suffix}"
    offset = 0x1000 if "@" in suffix else 0
    assert parse_flat_view(view + line) == [MappedRange(0, 64 * MB, "ram", "pc.ram", offset)]


def test_newer_qemus_print_the_host_address() -> None:
    text = (
        "              Block Name    PSize              Offset               Used"
        "              Total                HVA  RO\n"
        "                  pc.ram    2 MiB  0x0000000000000000 0x0000000010000000"
        " 0x0000000010000000 0x00007f2a3be00000  rw\n"
    )
    (block,) = parse_ram_blocks(text)
    assert (block.host_address, block.page_size_bytes) == (0x7F2A3BE00000, 2 * MB)


def test_a_suffix_of_another_name_is_not_the_blocks_region() -> None:
    block = RamBlock("0000:00:01.0/vga.vram", 4096, 4096, 4096, None)
    assert block.is_of_region("vga.vram")
    assert not block.is_of_region("vram")


def test_nothing_is_mapped_there_reads_as_none() -> None:
    assert parse_host_address("No memory is mapped at address 0x100000000") is None


def test_unmapped_video_memory_is_an_issue_of_its_own() -> None:
    blocks = [RamBlock("pc.ram", 4096, MB, MB, None), RamBlock("0:1/vga.vram", 4096, MB, MB, None)]
    with pytest.raises(MemoryNotFound) as failure:
        blocks_to_cover(blocks, [MappedRange(0, MB, "ram", "pc.ram", 0)])
    assert failure.value.code == "video-memory-unmapped"


def test_a_region_of_two_blocks_is_refused() -> None:
    blocks = [RamBlock(f"0:{i}/shmem", 4096, MB, MB, None) for i in range(2)]
    with pytest.raises(MemoryNotFound, match="2 RAM blocks"):
        blocks_to_cover(blocks, [MappedRange(0, MB, "ram", "shmem", 0)])


def test_a_machine_without_memory_is_refused() -> None:
    with pytest.raises(MemoryNotFound, match="no RAM"):
        blocks_to_cover([], [MappedRange(0, MB, "rom", "pc.bios", 0)])


def test_rom_is_not_covered_and_flash_is() -> None:
    blocks = [RamBlock(name, 4096, MB, MB, None) for name in ("pc.ram", "pc.bios", "system.flash0")]
    view = [
        MappedRange(0, MB, "ram", "pc.ram", 0),
        MappedRange(MB, MB, "rom", "pc.bios", 0),
        MappedRange(2 * MB, MB, "romd", "system.flash0", 0),
    ]
    assert [c.region for c in blocks_to_cover(blocks, view)] == ["pc.ram", "system.flash0"]


def mapping(start: int, end: int, access: str = "rw-p", inode: int = 0, offset: int = 0) -> Mapping:
    return Mapping(start, end, access, offset, inode, "")


PIECES = BlockPieces(RamBlock("pc.ram", 4096, 4 * MB, 4 * MB, None), "pc.ram", ())


def test_a_block_may_lie_in_several_mappings_without_a_gap() -> None:
    halves = [mapping(0, 3 * MB), mapping(3 * MB, 8 * MB)]
    assert placed(PIECES, 2 * MB, halves, 7).host_address == 2 * MB


@pytest.mark.parametrize(
    "mappings",
    [
        [],
        [mapping(2 * MB, 4 * MB)],
        [mapping(3 * MB, 8 * MB)],
        [mapping(0, 3 * MB), mapping(4 * MB, 8 * MB)],
        [mapping(0, 3 * MB), mapping(3 * MB, 8 * MB, "rw-s", 5)],
        [mapping(0, 3 * MB, "rw-s", 5), mapping(3 * MB, 8 * MB, "rw-s", 5, 0)],
        [mapping(0, 8 * MB, "r--p")],
    ],
)
def test_a_block_that_is_not_mapped_whole_in_one_kind_is_refused(mappings: list[Mapping]) -> None:
    with pytest.raises(MemoryNotFound):
        placed(PIECES, 2 * MB, mappings, 7)


def test_a_shared_block_begins_inside_its_file() -> None:
    location = placed(PIECES, 2 * MB, [mapping(MB, 8 * MB, "rw-s", 5, 16 * MB)], 7)
    assert location.file_offset == 17 * MB
    assert location.map_path == f"/proc/7/map_files/{MB:x}-{8 * MB:x}"


def test_two_mappings_of_the_same_shape_are_not_guessed_between() -> None:
    block = RamBlock("0:1/vga.vram", 4096, 4 * MB, 4 * MB, None)
    one = [mapping(2 * MB, 6 * MB), mapping(6 * MB, 6 * MB + 4096, "---p")]
    other = [mapping(8 * MB, 12 * MB), mapping(12 * MB, 12 * MB + 4096, "---p")]
    assert address_by_shape(block, one, set()) == 2 * MB
    with pytest.raises(MemoryNotFound, match="2 mappings"):
        address_by_shape(block, one + other, set())
    assert address_by_shape(block, one + other, {8 * MB}) == 2 * MB


@pytest.mark.parametrize(
    "shape",
    [
        [mapping(2 * MB, 6 * MB), mapping(6 * MB, 7 * MB, "---p")],
        [mapping(2 * MB, 6 * MB), mapping(6 * MB, 6 * MB + 4096, "rw-p")],
        [mapping(2 * MB, 6 * MB, "rwxp"), mapping(6 * MB, 6 * MB + 4096, "---p")],
        [mapping(3 * MB, 7 * MB), mapping(7 * MB, 7 * MB + 4096, "---p")],
        [mapping(4 * MB, 6 * MB), mapping(6 * MB, 6 * MB + 4096, "---p")],
        [mapping(2 * MB, 6 * MB), mapping(8 * MB, 8 * MB + 4096, "---p")],
    ],
)
def test_another_shape_is_not_the_block(shape: list[Mapping]) -> None:
    with pytest.raises(MemoryNotFound, match="0 mappings"):
        address_by_shape(RamBlock("0:1/vga.vram", 4096, 4 * MB, 4 * MB, None), shape, set())
