"""Taps and bridges of this host."""

import fcntl
import os
import struct
from typing import Any

import pytest
from pyroute2 import IPRoute

from holdfast_agent.network.taps import (
    TapFailed,
    TapSwitch,
    bridge_of,
    bridges,
    create_tap,
    remove_tap,
)

pytestmark = pytest.mark.netns


def flags_of(name: str) -> int | None:
    with IPRoute() as netlink:
        found = netlink.link_lookup(ifname=name)
        return int(netlink.get_links(found[0])[0]["flags"]) if found else None


def test_a_tap_is_made_down_on_its_bridge_and_outlives_us(outside: Any) -> None:
    tap = outside.add_tap(up=False)
    assert bridge_of(tap) == outside.bridge
    assert outside.bridge in bridges()
    flags = flags_of(tap)
    assert flags is not None
    assert not flags & 1


def test_making_a_tap_again_takes_it_over(outside: Any) -> None:
    tap = outside.add_tap(up=True)
    create_tap(tap, outside.bridge)
    assert not (flags_of(tap) or 0) & 1
    assert bridge_of(tap) == outside.bridge


def test_raising_and_lowering(outside: Any) -> None:
    tap = outside.add_tap(up=False)
    with TapSwitch() as switch:
        switch.raise_up(tap)
        assert (flags_of(tap) or 0) & 1
        switch.lower(tap)
        assert not (flags_of(tap) or 0) & 1
        with pytest.raises(TapFailed, match="hf-nothing"):
            switch.raise_up("hf-nothing")


def test_removing_a_tap_twice_is_once(outside: Any) -> None:
    tap = outside.add_tap()
    remove_tap(tap)
    remove_tap(tap)
    assert flags_of(tap) is None
    assert bridge_of(tap) is None


def test_a_missing_bridge_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(TapFailed, match=r"no bridge hf-nowhere .*make it"):
        create_tap("hf-tap", "hf-nowhere")
    assert flags_of("hf-tap") is None


def test_a_bad_name_is_refused(outside: Any) -> None:
    with pytest.raises(TapFailed, match="no name"):
        create_tap("a-name-that-is-too-long", outside.bridge)


def test_a_tap_in_use_by_another_is_refused(outside: Any) -> None:
    tap = outside.add_tap()
    tun = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH22x", tap.encode(), 0x5002))
    with pytest.raises(TapFailed, match="another VM"):
        create_tap(tap, outside.bridge)
    os.close(tun)
    assert flags_of(tap) is not None
