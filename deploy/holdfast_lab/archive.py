"""Writes the cpio archives that a Linux kernel takes as its first root file system. Pure.

The `newc` format: for every entry a header of 110 ASCII characters, the name with a closing zero,
padding to four bytes, the content, padding to four bytes; at the end an entry `TRAILER!!!`.

| header field | characters                                                  |
|--------------|-------------------------------------------------------------|
| magic        | 6, `070701`                                                 |
| inode, mode, uid, gid, link count, mtime, size, device major and minor, special device
  major and minor, length of name with its zero, checksum (unused) | 8 hexadecimal digits each |

Written here rather than by the `cpio` program so that device nodes, owners and times do not depend
on who builds: the same input gives the same bytes.

Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst.
"""

import stat


class Archive:
    """An archive that grows entry by entry; every folder must be added before what is in it."""

    def __init__(self) -> None:
        """Start an empty archive."""
        self._parts: list[bytes] = []
        self._folders: set[str] = set()
        self._count = 0

    def add_folder(self, name: str) -> None:
        """Add a folder and those above it; one that is there already is left as it is."""
        if not name or name in self._folders:
            return
        self.add_folder(name.rpartition("/")[0])
        self._folders.add(name)
        self._add(name, stat.S_IFDIR | 0o755, b"")

    def add_file(self, name: str, content: bytes, *, executable: bool = False) -> None:
        """Add a regular file owned by root."""
        self.add_folder(name.rpartition("/")[0])
        self._add(name, stat.S_IFREG | (0o755 if executable else 0o644), content)

    def add_link(self, name: str, target: str) -> None:
        """Add a symbolic link."""
        self.add_folder(name.rpartition("/")[0])
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def add_character_device(self, name: str, major: int, minor: int) -> None:
        """Add a character device, for example the console that init is started with."""
        self.add_folder(name.rpartition("/")[0])
        self._add(name, stat.S_IFCHR | 0o600, b"", device=(major, minor))

    def finish(self) -> bytes:
        """Return the whole archive."""
        self._add("TRAILER!!!", 0, b"")
        return b"".join(self._parts)

    def _add(self, name: str, mode: int, content: bytes, device: tuple[int, int] = (0, 0)) -> None:
        assert not name.startswith("/"), f"names in the archive are relative: {name}"
        self._count += 1
        encoded = name.encode() + b"\0"
        fields = (
            self._count, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(encoded), 0,
        )  # fmt: skip
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + encoded
        self._parts.append(_padded(head))
        self._parts.append(_padded(content))


def _padded(part: bytes) -> bytes:
    return part + bytes(-len(part) % 4)
