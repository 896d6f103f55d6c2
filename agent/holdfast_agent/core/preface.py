"""The first bytes of a connection: for which VM and generation it is, and how it goes on. Pure.

The agent reads exactly these, in the clear, and picks the worker by them. Nothing in them is secret
and nothing in them is believed: the worker compares them with the HELLO, which under TLS only a
host with a certificate can say. Whoever writes a false preface is led to somebody who refuses it.

| offset | size | field      | refused when                                     |
|--------|------|------------|--------------------------------------------------|
| 0      | 4    | magic      | not `HFRP`                                       |
| 4      | 1    | version    | not ours                                         |
| 5      | 1    | security   | neither 0 (frames follow) nor 1 (TLS follows)    |
| 6      | 2    | zeros      | not zeros                                        |
| 8      | 8    | generation | 0; little-endian                                 |
| 16     | 64   | VM         | not a name, in ASCII, padded with zeros          |
"""

import re
import struct
from dataclasses import dataclass

from holdfast_agent.core.frames import FrameRejected, RejectionCode
from holdfast_api.words import NAME_PATTERN, Generation, VmId

PREFACE_MAGIC = b"HFRP"
PREFACE_VERSION = 1
PREFACE = struct.Struct("<4sBBHQ64s")
PREFACE_SIZE_BYTES = PREFACE.size


@dataclass(frozen=True)
class Preface:
    """What a primary says before anything else."""

    vm: VmId
    generation: Generation
    tls: bool
    """A TLS handshake follows, else frames."""


def encode_preface(preface: Preface) -> bytes:
    """Return the bytes that say this."""
    return PREFACE.pack(
        PREFACE_MAGIC,
        PREFACE_VERSION,
        int(preface.tls),
        0,
        preface.generation,
        preface.vm.encode("ascii"),
    )


def decode_preface(data: bytes) -> Preface:
    """Return what `data`, of exactly PREFACE_SIZE_BYTES, says. Raises FrameRejected."""
    magic, version, security, zeros, generation, name = PREFACE.unpack(data)
    if magic != PREFACE_MAGIC:
        raise FrameRejected(RejectionCode.BAD_MAGIC, f"a connection begins with {magic!r}")
    if version != PREFACE_VERSION:
        raise FrameRejected(
            RejectionCode.BAD_VERSION, f"preface version {version}, ours is {PREFACE_VERSION}"
        )
    if security not in (0, 1) or zeros or generation == 0:
        raise FrameRejected(
            RejectionCode.BAD_PAYLOAD, f"preface with {security}, {zeros}, generation {generation}"
        )
    vm = name.rstrip(b"\0").decode("latin-1")
    if re.fullmatch(NAME_PATTERN, vm) is None:
        raise FrameRejected(RejectionCode.BAD_PAYLOAD, f"{vm!r} is no name of a VM")
    return Preface(vm, generation, tls=security == 1)
