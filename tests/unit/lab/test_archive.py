"""The first root file system of a guest, read back by the rules of the format."""

import stat
from dataclasses import dataclass

from holdfast_lab.archive import Archive

HEADER_SIZE = 110


@dataclass
class Entry:
    mode: int
    content: bytes
    device: tuple[int, int]


def read(data: bytes) -> dict[str, Entry]:
    """Return the entries up to the trailer."""
    entries: dict[str, Entry] = {}
    position = 0
    while True:
        assert position % 4 == 0
        assert data[position : position + 6] == b"070701"
        header = data[position + 6 : position + HEADER_SIZE]
        fields = [int(header[start : start + 8], 16) for start in range(0, 104, 8)]
        start = position + HEADER_SIZE
        name = data[start : start + fields[11] - 1].decode()
        assert data[start + fields[11] - 1] == 0
        begin = (start + fields[11] + 3) // 4 * 4
        if name == "TRAILER!!!":
            return entries
        assert name not in entries, f"{name} is there twice"
        content = data[begin : begin + fields[6]]
        entries[name] = Entry(fields[1], content, (fields[9], fields[10]))
        position = (begin + fields[6] + 3) // 4 * 4


def test_files_of_every_length_come_back_whole() -> None:
    archive = Archive()
    contents = {f"file{size}": bytes(range(size)) for size in range(9)}
    for name, content in contents.items():
        archive.add_file(name, content)
    assert {name: entry.content for name, entry in read(archive.finish()).items()} == contents


def test_a_folder_comes_before_what_is_in_it_and_only_once() -> None:
    archive = Archive()
    archive.add_file("usr/lib/a", b"1")
    archive.add_file("usr/lib/b", b"2")
    archive.add_folder("usr")
    entries = read(archive.finish())
    assert list(entries) == ["usr", "usr/lib", "usr/lib/a", "usr/lib/b"]
    assert stat.S_ISDIR(entries["usr"].mode)


def test_modes_tell_programs_links_and_devices_apart() -> None:
    archive = Archive()
    archive.add_file("program", b"", executable=True)
    archive.add_file("data", b"")
    archive.add_link("link", "program")
    archive.add_character_device("console", 5, 1)
    entries = read(archive.finish())
    assert entries["program"].mode == stat.S_IFREG | 0o755
    assert entries["data"].mode == stat.S_IFREG | 0o644
    assert stat.S_ISLNK(entries["link"].mode)
    assert entries["link"].content == b"program"
    assert stat.S_ISCHR(entries["console"].mode)
    assert entries["console"].device == (5, 1)
