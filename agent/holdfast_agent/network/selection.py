"""Chooses how a VM's output is held: by the kernel if it can, else by QEMU. Asks the kernel.

| plug | serves |
|---|---|
| `qdisc` | every tap that nobody else filters, with vhost and any number of queues |
| `filter` | taps without vhost, with one queue |

`qdisc` needs the kernel's modules ifb, sch_plug, sch_ingress, cls_matchall and act_mirred, and
CAP_NET_ADMIN and CAP_NET_RAW; `filter` needs nothing.

Whether the kernel can is found out by making one plug and removing it. It loads modules by itself
where it may. A yes is remembered while this process lives; a no is asked again after a while, as
somebody may have loaded what was missing.
"""

import errno
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from holdfast_agent.core.failures import VirtualMachineFailed
from holdfast_agent.host.processes import start_ticks_of
from holdfast_agent.hypervisor.qmp import QmpConnection
from holdfast_agent.network.filter_plug import WALL_PREFIX, FilterPlug
from holdfast_agent.network.packet_sense import PacketSense
from holdfast_agent.network.qdisc_links import (
    PREFERENCES,
    Ifb,
    Owner,
    PlugLinks,
    PlugUnfit,
    add_filter,
    check_ingress,
    delete_link,
    list_ifbs,
    make_ifb,
    name_base_of,
)
from holdfast_agent.network.qdisc_netlink import PlugAction, PlugSocket, switch_message
from holdfast_agent.network.qdisc_plug import QdiscPlug

Plug: TypeAlias = QdiscPlug | FilterPlug

PLUGS: Final = (QdiscPlug.name, FilterPlug.name)
"""Names of all plugs, best first."""
ASK_AGAIN_SECONDS = 60.0
PROBE_LIMIT_BYTES = 1 << 20
_MISSING = frozenset({errno.ENOENT, errno.EOPNOTSUPP, errno.ENODEV, errno.EPROTONOSUPPORT})

_known: dict[str, tuple[float, str | None]] = {}


@dataclass(frozen=True)
class PlugOutlook:
    """Which plugs this host may use, best first, and why each other one may not."""

    usable: tuple[str, ...]
    passed_over: tuple[tuple[str, str], ...] = ()

    def reason(self, name: str) -> str:
        """Return why `name` is not usable here; empty if it is."""
        return dict(self.passed_over).get(name, "")


FILTER_ONLY: Final = PlugOutlook((FilterPlug.name,))


def outlook_of(configured: str) -> PlugOutlook:
    """Return which plugs this host may use under the agent's configured `plug`."""
    if configured == FilterPlug.name:
        why = "the agent's configuration says plug = filter"
        return PlugOutlook((FilterPlug.name,), ((QdiscPlug.name, why),))
    reason = qdisc_unavailable()
    usable = (QdiscPlug.name,) if reason is None else ()
    passed_over = () if reason is None else ((QdiscPlug.name, reason),)
    if configured == QdiscPlug.name:
        why = "the agent's configuration says plug = qdisc"
        return PlugOutlook(usable, (*passed_over, (FilterPlug.name, why)))
    return PlugOutlook((*usable, FilterPlug.name), passed_over)


def qdisc_unavailable(now: Callable[[], float] = time.monotonic) -> str | None:
    """Return why the kernel's plug cannot be used here; None if it can."""
    asked_at, reason = _known.get(QdiscPlug.name, (float("-inf"), ""))
    if reason is not None and now() - asked_at >= ASK_AGAIN_SECONDS:
        reason = _probe()
        _known[QdiscPlug.name] = now(), reason
    return reason


def tap_objection(tap: str) -> tuple[str, str] | None:
    """Return why the kernel's plug cannot hold this tap's output, as (code, message), or None."""
    try:
        with IPRoute() as netlink:
            for index in netlink.link_lookup(ifname=tap):
                ours = {ifb.index for ifb in list_ifbs(netlink)}
                (link,) = netlink.get_links(index)
                check_ingress(netlink, link, ours)
    except PlugUnfit as unfit:
        return unfit.code, str(unfit)
    except NetlinkError as error:
        return "tap-not-readable", f"tap {tap} cannot be looked at: {error}"
    return None


def leftover_plug(qmp: QmpConnection, taps: Sequence[str]) -> str | None:
    """Return the name of the plug that a holder which died left on this VM, or None.

    Whatever would be chosen now: only a plug of the same kind can take it over.
    """
    if taps:
        with IPRoute() as netlink:
            owner = Owner(qmp.peer_pid, start_ticks_of(qmp.peer_pid))
            if any(ifb.owner == owner and ifb.tap in taps for ifb in list_ifbs(netlink)):
                return QdiscPlug.name
    objects = qmp.execute("qom-list", {"path": "/objects"})
    left = any(str(entry["name"]).startswith(WALL_PREFIX) for entry in objects)
    return FilterPlug.name if left else None


def make_plug(
    name: str,
    qmp: QmpConnection,
    *,
    netdev_ids: Sequence[str],
    taps: Sequence[str],
    limit_bytes: int,
) -> Plug:
    """Return the plug called `name` for a VM; nothing is changed before its `install`.

    Raises VirtualMachineFailed.
    """
    if name == FilterPlug.name:
        return FilterPlug(qmp, netdev_ids, limit_bytes=limit_bytes)
    assert name == QdiscPlug.name, name
    owner = Owner(qmp.peer_pid, start_ticks_of(qmp.peer_pid))
    return make_qdisc_plug(owner, taps, limit_bytes=limit_bytes)


def make_qdisc_plug(owner: Owner, taps: Sequence[str], *, limit_bytes: int) -> QdiscPlug:
    """Return the kernel's plug for the taps of the QEMU `owner`. Raises VirtualMachineFailed."""
    try:
        return QdiscPlug(
            taps,
            limit_bytes=limit_bytes,
            links=PlugLinks(owner),
            switches=PlugSocket(),
            sense=PacketSense(),
        )
    except OSError as error:
        raise VirtualMachineFailed(f"the kernel's plug cannot be used: {error}") from error


def _probe() -> str | None:
    """Make all that a plug needs and remove it; return what is missing, with what to do."""
    name = f"{name_base_of(f'probe of {os.getpid()}')}0"
    owner = Owner(os.getpid(), start_ticks_of(os.getpid()))
    step, modules = "open its sockets", ""
    try:
        with IPRoute() as netlink, PlugSocket() as switches:
            socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0).close()
            step, modules = "make an IFB with a plug", "ifb sch_plug"
            ifb = make_ifb(netlink, Ifb(0, name, name, owner), PROBE_LIMIT_BYTES)
            try:
                switches.exchange([switch_message(ifb.index, PlugAction.RELEASE_INDEFINITE)])
                step, modules = "filter what arrives", "sch_ingress"
                netlink.tc("add", "clsact", ifb.index)
                step, modules = "redirect what arrives", "cls_matchall act_mirred"
                add_filter(netlink, ifb.index, PREFERENCES[0], ifb.index)
            finally:
                delete_link(netlink, ifb.index)
    except (NetlinkError, OSError) as error:
        code = error.code if isinstance(error, NetlinkError) else error.errno
        if code in (errno.EPERM, errno.EACCES):
            return f"cannot {step}: the agent needs CAP_NET_ADMIN and CAP_NET_RAW"
        if modules and code in _MISSING:
            return f"cannot {step}: load what this kernel lacks (modprobe -a {modules})"
        return f"cannot {step}: {error}"
    return None
