"""Taps and their bridges. Needs CAP_NET_ADMIN; talks rtnetlink and /dev/net/tun.

A standby's taps are made before it is needed, attached to their bridges and down: a tap that is
down neither sends nor floods. Raising one is the only step left for a promotion: two ioctls on a
socket that is open already, some ten microseconds.

Everything acts on the network namespace of the calling thread. Bridges are looked up over netlink
and not in /sys, which may show another namespace.
"""

import errno
import fcntl
import os
import socket
import struct
from typing import Any, Self

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

TUNSETIFF = 0x400454CA
TUNSETPERSIST = 0x400454CB
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
SIOCGIFFLAGS = 0x8913
SIOCSIFFLAGS = 0x8914
IFF_UP = 0x1
NAME_BYTES_MAX = 15


class TapFailed(OSError):  # noqa: N818 - reads as a sentence where it is raised
    """A tap or its bridge is not as it must be; the message says what to do."""


def bridge_of(tap: str) -> str | None:
    """Return the bridge that `tap` is attached to; None when there is no such tap or bridge."""
    with IPRoute() as netlink:
        link = _link(netlink, tap)
        master = link.get_attr("IFLA_MASTER") if link is not None else None
        if master is None:
            return None
        (bridge,) = netlink.get_links(master)
        return str(bridge.get_attr("IFLA_IFNAME"))


def bridges() -> list[str]:
    """Return the names of all bridges of this host."""
    with IPRoute() as netlink:
        found = netlink.link("dump", kind="bridge")
        return sorted(str(link.get_attr("IFLA_IFNAME")) for link in found)


def create_tap(name: str, bridge: str | None) -> None:
    """Make a persistent tap, attached to `bridge` and down; one that exists is taken over.

    Raises TapFailed when the bridge is missing (nothing is made then) or the tap is in use.
    """
    if not 0 < len(name) <= NAME_BYTES_MAX:
        raise TapFailed(errno.EINVAL, f"{name!r} is no name of an interface")
    with IPRoute() as netlink:
        master = _link(netlink, bridge) if bridge is not None else None
        if bridge is not None and master is None:
            raise TapFailed(
                errno.ENODEV,
                f"no bridge {bridge} on this host: make it (ip link add {bridge} type bridge) and "
                "connect it to the same network as on the primary",
            )
        _make_persistent(name, persistent=True)
        try:
            link = _link(netlink, name)
            assert link is not None, "the kernel made the tap"
            index = link["index"]
            netlink.link("set", index=index, state="down")
            if master is not None:
                netlink.link("set", index=index, master=master["index"], mtu=_mtu(master))
        except NetlinkError as error:
            _make_persistent(name, persistent=False)
            raise TapFailed(
                error.code, f"cannot attach tap {name} to bridge {bridge}: {error}"
            ) from error


def remove_tap(name: str) -> None:
    """Remove a tap, also one that a QEMU has open. Idempotent."""
    with IPRoute() as netlink:
        link = _link(netlink, name)
        if link is None:
            return
        try:
            netlink.link("del", index=link["index"])
        except NetlinkError as error:
            if error.code != errno.ENODEV:
                raise TapFailed(error.code, f"cannot remove tap {name}: {error}") from error


class TapSwitch:
    """Raises and lowers interfaces without delay; owns a socket."""

    def __init__(self) -> None:
        """Open the socket the ioctls go through."""
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def raise_up(self, name: str) -> None:
        """Set the interface up."""
        self._change(name, IFF_UP, 0)

    def lower(self, name: str) -> None:
        """Set the interface down: nothing passes it from now on."""
        self._change(name, 0, IFF_UP)

    def _change(self, name: str, add: int, take: int) -> None:
        try:
            request = struct.pack("16sH14x", name.encode(), 0)
            (flags,) = struct.unpack_from("H", fcntl.ioctl(self._socket, SIOCGIFFLAGS, request), 16)
            request = struct.pack("16sH14x", name.encode(), (flags | add) & ~take)
            fcntl.ioctl(self._socket, SIOCSIFFLAGS, request)
        except OSError as error:
            raise TapFailed(error.errno, f"cannot switch tap {name}: {error}") from error

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self._socket.close()

    def __enter__(self) -> Self:
        """Use it as a context."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


def _link(netlink: IPRoute, name: str) -> Any:
    """Return the link of this name, or None."""
    indexes = netlink.link_lookup(ifname=name)
    if not indexes:
        return None
    (link,) = netlink.get_links(indexes[0])
    return link


def _mtu(link: Any) -> int:
    return int(link.get_attr("IFLA_MTU"))


def _make_persistent(name: str, *, persistent: bool) -> None:
    try:
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise TapFailed(error.errno, f"cannot open /dev/net/tun: {error}") from error
    try:
        flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
        fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        fcntl.ioctl(tun, TUNSETPERSIST, int(persistent))
    except OSError as error:
        raise TapFailed(
            error.errno, f"cannot make tap {name}: {error}; is it another VM's?"
        ) from error
    finally:
        os.close(tun)
