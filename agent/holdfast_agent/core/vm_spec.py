"""What a backup must know to build a standby of a VM; it travels in the transport's hello. Pure.

The primary makes it from its running QEMU, the backup starts a QEMU from it and then checks that
machine type, QEMU version and memory blocks came out the same: device state only loads into an
identical machine.
"""

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from holdfast_agent.core.memory_map import MemoryMap
from holdfast_api.words import VmId

INTERFACE_PATTERN = r"^[^\s/:]{1,15}$"
"""What the kernel takes as a name of a network interface."""
InterfaceName = Annotated[str, Field(pattern=INTERFACE_PATTERN)]
Word = Annotated[str, Field(pattern=r"^[^\x00]*$")]
"""What the kernel passes to a program: anything without a zero byte."""
MAC_PATTERN = r"^([0-9a-f]{2}:){5}[0-9a-f]{2}$"


class NicSpec(BaseModel):
    """One NIC of a VM: a tap on a bridge."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    netdev_id: str = Field(min_length=1, max_length=255)
    tap: InterfaceName
    """Name on the primary; the standby's may differ."""
    bridge: InterfaceName | None = None
    """A bridge of this name must exist on the backup; None when the tap is on none."""
    mac: str | None = Field(default=None, pattern=MAC_PATTERN)


class VmSpec(BaseModel):
    """Everything a standby is built from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vm: VmId
    argv: tuple[Word, ...] = Field(min_length=1, max_length=4096)
    """The primary's command line, as it runs."""
    machine_type: str = Field(min_length=1, max_length=255)
    """As QEMU resolved it, for example `pc-q35-7.2`."""
    qemu_version: str = Field(min_length=1, max_length=255)
    accelerator: str = Field(min_length=1, max_length=32)
    vcpus: int = Field(ge=1)
    memory_bytes: int = Field(ge=1)
    blocks: tuple[tuple[str, int], ...] = Field(min_length=1, max_length=4096)
    """(name, size in bytes) of every memory block a checkpoint covers, in their order."""
    nics: tuple[NicSpec, ...] = Field(default=(), max_length=64)

    @model_validator(mode="after")
    def _blocks_fit(self) -> Self:
        MemoryMap.of_sizes(self.blocks)
        for name in ("netdev_id", "tap"):
            values = [getattr(nic, name) for nic in self.nics]
            if len(set(values)) != len(values):
                raise ValueError(f"two NICs share a {name}: {values}")
        return self

    @property
    def memory_map(self) -> MemoryMap:
        """How the pages of this VM are numbered, on both sides."""
        return MemoryMap.of_sizes(self.blocks)
