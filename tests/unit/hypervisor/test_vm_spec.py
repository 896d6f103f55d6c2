"""What travels from a primary to its backup."""

from typing import Any

import pytest
from pydantic import ValidationError

from holdfast_agent.core.vm_spec import NicSpec, VmSpec

GOOD: dict[str, Any] = {
    "vm": "web",
    "argv": ("qemu-system-x86_64", "-m", "256"),
    "machine_type": "pc-q35-7.2",
    "qemu_version": "7.2.22",
    "accelerator": "tcg",
    "vcpus": 1,
    "memory_bytes": 1 << 28,
    "blocks": (("pc.ram", 1 << 28), ("vga.vram", 1 << 24)),
    "nics": (NicSpec(netdev_id="n0", tap="tap0", bridge="br0", mac="52:54:00:00:00:01"),),
}


def test_a_spec_survives_its_journey() -> None:
    spec = VmSpec(**GOOD)
    assert VmSpec.model_validate_json(spec.model_dump_json()) == spec
    assert spec.memory_map.page_count == (272 << 20) // 4096


@pytest.mark.parametrize(
    "change",
    [
        {"vm": "Not A Name"},
        {"argv": ()},
        {"blocks": ()},
        {"blocks": (("pc.ram", 4097),)},
        {"blocks": (("a", 4096), ("a", 4096))},
        {"nics": (GOOD["nics"][0], GOOD["nics"][0])},
        {"nics": ({"netdev_id": "n0", "tap": "a name far too long for the kernel"},)},
        {"nics": ({"netdev_id": "n0", "tap": "../etc"},)},
        {"nics": ({"netdev_id": "n0", "tap": "t", "mac": "52:54"},)},
        {"surprise": 1},
    ],
)
def test_a_spec_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        VmSpec(**{**GOOD, **change})


def test_a_spec_cannot_be_changed() -> None:
    spec = VmSpec(**GOOD)
    with pytest.raises(ValidationError):
        spec.vcpus = 2
