"""What every booted host offers, whatever its kernel."""

import ctypes
import fcntl
import mmap
import os
import struct
import subprocess
from pathlib import Path

import pytest

MODULES = (
    *("sch_plug", "ifb", "act_mirred", "cls_matchall", "cls_u32", "sch_ingress", "sch_netem"),
    *("veth", "bridge", "tun", "vhost_net", "kvm_amd", "tls"),
    *("rdma_rxe", "ib_uverbs", "rdma_ucm"),
)
KVM_GET_API_VERSION = 0xAE00
PAGEMAP_SCAN = 0xC0606610
PAGE_BYTES = 4096
SOFT_DIRTY_BIT = 55


def command(*argv: str) -> str:
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, f"{argv}: {ended.stdout}{ended.stderr}"
    return ended.stdout


@pytest.mark.parametrize("name", MODULES)
def test_a_module_loads(name: str) -> None:
    command("modprobe", name)
    assert (Path("/sys/module") / name).is_dir()


def test_kvm_answers() -> None:
    command("modprobe", "kvm_amd")
    descriptor = os.open("/dev/kvm", os.O_RDWR)
    try:
        assert fcntl.ioctl(descriptor, KVM_GET_API_VERSION) == 12
    finally:
        os.close(descriptor)


def test_packets_of_a_tap_can_be_held_by_a_plug() -> None:
    command("modprobe", "-a", "ifb", "tun")
    command("ip", "tuntap", "add", "tap9", "mode", "tap")
    command("ip", "link", "add", "ifb9", "type", "ifb")
    command("ip", "link", "set", "ifb9", "up")
    command("tc", "qdisc", "add", "dev", "tap9", "ingress")
    command(
        *("tc", "filter", "add", "dev", "tap9", "parent", "ffff:", "protocol", "all", "matchall"),
        *("action", "mirred", "egress", "redirect", "dev", "ifb9"),
    )
    command("tc", "qdisc", "add", "dev", "ifb9", "root", "plug", "limit", "65536")
    assert "plug" in command("tc", "qdisc", "show", "dev", "ifb9")


def test_rdma_devices_are_made_and_seen_by_the_library() -> None:
    from pyverbs.device import get_device_list  # noqa: PLC0415 - only in a booted host

    command("modprobe", "-a", "rdma_rxe", "ib_uverbs")
    command("ip", "link", "set", "lo", "up")
    command("rdma", "link", "add", "rxe9", "type", "rxe", "netdev", "lo")
    try:
        assert b"rxe9" in [device.name for device in get_device_list()]
    finally:
        command("rdma", "link", "delete", "rxe9")


def pagemap_entry(address: int) -> int:
    descriptor = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        return int.from_bytes(os.pread(descriptor, 8, address // PAGE_BYTES * 8), "little")
    finally:
        os.close(descriptor)


def test_a_written_page_is_soft_dirty_and_others_are_not() -> None:
    with mmap.mmap(-1, 2 * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
        pages[:] = bytes(2 * PAGE_BYTES)
        address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        Path("/proc/self/clear_refs").write_text("4")
        pages[PAGE_BYTES] = 1
        entries = [pagemap_entry(address), pagemap_entry(address + PAGE_BYTES)]
        assert [entry >> SOFT_DIRTY_BIT & 1 for entry in entries] == [0, 1]


def test_pagemap_scan_is_there_since_6_7() -> None:
    major, minor = (int(number) for number in os.uname().release.split(".")[:2])
    arguments = struct.pack("12Q", 96, *(0 for _ in range(11)))
    descriptor = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        if (major, minor) >= (6, 7):
            assert fcntl.ioctl(descriptor, PAGEMAP_SCAN, arguments)
        else:
            with pytest.raises(OSError, match=r"Inappropriate ioctl|Invalid argument"):
                fcntl.ioctl(descriptor, PAGEMAP_SCAN, arguments)
    finally:
        os.close(descriptor)
