"""Saved device state, made loadable: from `xen-save-devices-state` to a migration stream. Pure.

QEMU saves its devices and CPUs as a migration stream without memory and without the
configuration section that a migration starts with; a QEMU that loads such a stream refuses it
("Configuration section missing"). So one is inserted behind the header, and an empty description
section appended, for whose absence QEMU would warn. Wire format (`migration/savevm.c`):

    offset  size  field
    0       4     magic 0x5145564d ("QEVM"), big-endian
    4       4     version 3
    8       1     0x07 QEMU_VM_CONFIGURATION             inserted
    9       4     length of the machine's name           inserted
    13      n     machine type, for example pc-q35-7.2   inserted
    13+n    ...   the device sections, as saved
    last    1     0x00 QEMU_VM_EOF                       as saved
    after   1+4   0x06 QEMU_VM_VMDESCRIPTION, length 0   appended
"""

import struct

STREAM_MAGIC = b"QEVM"
STREAM_VERSION = 3
HEADER_BYTES = 8
SECTION_EOF = 0x00
SECTION_VMDESCRIPTION = 0x06
SECTION_CONFIGURATION = 0x07
MACHINE_TYPE_BYTES_MAX = 255


def check_saved(saved: bytes) -> None:
    """Check that `saved` is a whole device state as QEMU saves it.

    Raises ValueError saying what is wrong with it.
    """
    if len(saved) <= HEADER_BYTES:
        raise ValueError(f"device state of {len(saved)} bytes is too short to be one")
    if saved[:4] != STREAM_MAGIC:
        raise ValueError(f"device state begins with {saved[:4]!r}, not with {STREAM_MAGIC!r}")
    version = int.from_bytes(saved[4:HEADER_BYTES], "big")
    if version != STREAM_VERSION:
        raise ValueError(f"device state has stream version {version}, not {STREAM_VERSION}")
    if saved[HEADER_BYTES] == SECTION_CONFIGURATION:
        raise ValueError("device state has a configuration section already")
    if saved[-1] != SECTION_EOF:
        raise ValueError("device state is cut off: no end marker")


def incoming_stream(saved: bytes, machine_type: str) -> bytes:
    """Return `saved` as a stream that `migrate-incoming` of that machine type loads.

    Raises ValueError when `saved` is no device state or `machine_type` no machine's name.
    """
    check_saved(saved)
    name = machine_type.encode("ascii", "strict") if machine_type.isascii() else b""
    if not 0 < len(name) <= MACHINE_TYPE_BYTES_MAX:
        raise ValueError(f"{machine_type!r} is no machine type")
    return b"".join(
        (
            saved[:HEADER_BYTES],
            struct.pack(">BI", SECTION_CONFIGURATION, len(name)),
            name,
            saved[HEADER_BYTES:],
            struct.pack(">BI", SECTION_VMDESCRIPTION, 0),
        )
    )
