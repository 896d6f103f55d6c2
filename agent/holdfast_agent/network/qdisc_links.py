"""What carries a `plug` qdisc for one tap: an IFB of ours, and the tap's ingress aimed at it.

Needs CAP_NET_ADMIN; talks rtnetlink, in the network namespace of the calling thread.

    guest -> tap, ingress: matchall, mirred redirect -> IFB, root qdisc plug -> tap's bridge

Every ether type is redirected, and a packet that leaves the IFB goes on as if it had just arrived
on the tap, past the filter. While the IFB is down or gone the kernel drops what is redirected to
it: the wall stands by itself.

Everything is found again by name after a crash. An IFB is called `hf-`, ten hex digits of the
tap's hash and a digit; its alias tells the tap, the QEMU whose output it holds (pid and start
time) and whether the tap's ingress qdisc is ours. The IFB that holds now is the one that the
filter in effect, which is the one of the lower preference, leads to; older IFBs (by index) may
hold the end of an earlier epoch, younger ones are spares. Two preferences take turns, so that
aiming anew is one step for the packets: whichever filter is added or taken, one is in effect.

A tap whose ingress somebody else filters, or that runs an XDP program, is refused: what those let
through, or send elsewhere, would leave unheld.

Source: Linux 6.1, `drivers/net/ifb.c`, `net/sched/act_mirred.c`, `net/core/dev.c`.
"""

import contextlib
import errno
import hashlib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from holdfast_agent.core.failures import VirtualMachineFailed
from holdfast_agent.host.processes import is_alive
from holdfast_agent.network.qdisc_netlink import PLUG_HANDLE

LOGGER = logging.getLogger(__name__)
NAME_PREFIX = "hf-"
NAME_PATTERN = re.compile(r"^hf-[0-9a-f]{10}[0-9]$")
ALIAS_PATTERN = re.compile(r"^holdfast plug of (\S+) for (\d+):(\d+), ingress (ours|shared)$")
IFBS_PER_TAP_MAX = 8
CLSACT_INGRESS = 0xFFFF_FFF2
"""Parent of filters on what arrives; a plain ingress qdisc takes it as well."""
CLSACT_EGRESS = 0xFFFF_FFF3
PREFERENCES = (1, 2)
ETH_P_ALL = 0x0003
QUEUE_PACKETS = 1_000_000
"""Of an IFB, behind its plug: it must never stop the plug while that lets an epoch go."""
IPV6_SWITCH = "/proc/sys/net/ipv6/conf/{}/disable_ipv6"


class PlugUnfit(VirtualMachineFailed):
    """The kernel's plug cannot hold this tap's output; `code` is the preflight issue's."""

    def __init__(self, code: str, message: str) -> None:
        """Keep the issue's code beside the message."""
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Owner:
    """The QEMU whose output is held: a pid alone would be used again."""

    pid: int
    start_ticks: int


@dataclass(frozen=True, order=True)
class Ifb:
    """An IFB of ours; the younger one has the higher index."""

    index: int
    name: str
    tap: str
    owner: Owner | None = None
    is_ingress_ours: bool = False


@dataclass(frozen=True)
class Found:
    """What an earlier holder left on a tap."""

    older: tuple[Ifb, ...]
    """Hold the end of an earlier epoch, perhaps."""
    aimed: Ifb | None
    """Takes what the guest sends; None: nothing is held."""
    younger: tuple[Ifb, ...]
    """Spares; everything that is there when nothing is aimed at."""


def name_base_of(tap: str) -> str:
    """Return what the names of all IFBs of `tap` begin with."""
    return NAME_PREFIX + hashlib.sha256(tap.encode()).hexdigest()[:10]


def alias_of(tap: str, owner: Owner, *, is_ingress_ours: bool) -> str:
    """Return the alias of an IFB of ours; `read_alias` reads it."""
    whose = "ours" if is_ingress_ours else "shared"
    return f"holdfast plug of {tap} for {owner.pid}:{owner.start_ticks}, ingress {whose}"


def read_alias(index: int, name: str, alias: str | None) -> Ifb | None:
    """Return the IFB of this name and alias; None when it is not ours.

    One whose maker died before the alias was set is ours by its name; its tap is empty.
    """
    if not NAME_PATTERN.match(name):
        return None
    if not alias:
        return Ifb(index, name, "")
    found = ALIAS_PATTERN.match(alias)
    if found is None or not name.startswith(name_base_of(found[1])):
        return None
    owner = Owner(int(found[2]), int(found[3]))
    return Ifb(index, name, found[1], owner, found[4] == "ours")


class PlugLinks:
    """Makes, finds, aims and removes the IFBs of taps; owns a netlink socket."""

    def __init__(self, owner: Owner) -> None:
        """Work for one QEMU."""
        self._owner = owner
        self._netlink = IPRoute()

    # --- finding ----------------------------------------------------------------------------------

    def find(self, tap: str) -> Found:
        """Return what an earlier holder left for this QEMU, with spare filters taken out.

        What was held for a QEMU that has ended must never leave (INV-1): it is removed. Raises
        PlugUnfit when the tap is missing, or somebody else's program is on it.
        """
        with _speaking(tap):
            link = self._tap(tap)
            self._remove_of_others(tap)
            ours = {ifb.index: ifb for ifb in list_ifbs(self._netlink) if _is_of(ifb, tap)}
            check_ingress(self._netlink, link, set(ours))
            filters = _filters(self._netlink, link["index"])
            for preference, _ in filters[1:]:
                delete_filter(self._netlink, link["index"], preference)
        if not filters:
            return Found((), None, tuple(sorted(ours.values())))
        aimed = ours[filters[0][1]]
        return Found(
            tuple(sorted(ifb for ifb in ours.values() if ifb.index < aimed.index)),
            aimed,
            tuple(sorted(ifb for ifb in ours.values() if ifb.index > aimed.index)),
        )

    def _remove_of_others(self, tap: str) -> None:
        for ifb in list_ifbs(self._netlink):
            if ifb.tap != tap or ifb.owner in (None, self._owner):
                continue
            assert ifb.owner is not None, "just looked at"
            if is_alive(ifb.owner.pid, ifb.owner.start_ticks):
                raise PlugUnfit(
                    "tap-held-for-another",
                    f"output of tap {tap} is held for process {ifb.owner.pid}, which lives: one "
                    "tap serves one VM",
                )
            remove_plug(self._netlink, tap, ifb.owner)

    def _tap(self, tap: str) -> Any:
        indexes = self._netlink.link_lookup(ifname=tap)
        if not indexes:
            raise PlugUnfit("tap-missing", f"there is no tap {tap} in this network namespace")
        (link,) = self._netlink.get_links(indexes[0])
        return link

    # --- making -----------------------------------------------------------------------------------

    def prepare(self, tap: str) -> bool:
        """Give `tap` an ingress qdisc unless it has one; return whether it is ours.

        One of an earlier holder of ours counts as ours. Raises VirtualMachineFailed.
        """
        with _speaking(tap):
            index = self._tap(tap)["index"]
            ours = [ifb for ifb in list_ifbs(self._netlink) if ifb.tap == tap]
            is_ours = any(ifb.is_ingress_ours for ifb in ours)
            is_ours = is_ours or _ingress(self._netlink, index) is None
            if is_ours:
                with _tolerating(errno.EEXIST):
                    self._netlink.tc("add", "clsact", index)
        return is_ours

    def make(self, tap: str, limit_bytes: int, *, is_ingress_ours: bool) -> Ifb:
        """Make an IFB for `tap` whose plug holds; nothing is aimed at it yet.

        Raises VirtualMachineFailed, and nothing is left of it.
        """
        base = name_base_of(tap)
        with _speaking(tap):
            taken = {ifb.name for ifb in list_ifbs(self._netlink)}
            names = (f"{base}{digit}" for digit in range(IFBS_PER_TAP_MAX))
            name = next((name for name in names if name not in taken), None)
            if name is None:
                raise VirtualMachineFailed(f"tap {tap} has {IFBS_PER_TAP_MAX} plugs already")
            ifb = Ifb(0, name, tap, self._owner, is_ingress_ours)
            return make_ifb(self._netlink, ifb, limit_bytes)

    def aim(self, tap: str, ifb: Ifb) -> None:
        """Let all that arrives on `tap` go to `ifb` from now on. Raises VirtualMachineFailed."""
        with _speaking(tap):
            index = self._tap(tap)["index"]
            present = _filters(self._netlink, index)
            for preference, _ in present[1:]:  # an earlier try got stuck halfway
                delete_filter(self._netlink, index, preference)
            in_effect = present[:1]
            if in_effect and in_effect[0][1] == ifb.index:
                return
            used = [preference for preference, _ in in_effect]
            free = next(preference for preference in PREFERENCES if preference not in used)
            add_filter(self._netlink, index, free, ifb.index)
            for preference in used:
                delete_filter(self._netlink, index, preference)

    # --- taking down ------------------------------------------------------------------------------

    def release(self, tap: str) -> None:
        """Let what arrives on `tap` go straight on. Idempotent; so is a tap that is gone."""
        with _speaking(tap):
            for index in self._netlink.link_lookup(ifname=tap):
                release_tap(self._netlink, tap, index)

    def delete(self, ifb: Ifb) -> None:
        """Remove an IFB; what it holds is dropped. Idempotent."""
        with _speaking(ifb.tap):
            delete_link(self._netlink, ifb.index)

    def restore(self, tap: str) -> None:
        """Take the ingress qdisc of ours off `tap`, unless somebody filters there by now."""
        with _speaking(tap):
            for index in self._netlink.link_lookup(ifname=tap):
                remove_ingress(self._netlink, index)

    def clear(self, tap: str) -> None:
        """Take out everything of ours on `tap`; what is held is dropped. Idempotent.

        Nothing is done while the QEMU lives: what it sends must go on being held. `sweep` removes
        it later.
        """
        if is_alive(self._owner.pid, self._owner.start_ticks):
            LOGGER.warning("process %d still lives: tap %s stays held", self._owner.pid, tap)
            return
        with _speaking(tap):
            remove_plug(self._netlink, tap, self._owner)

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self._netlink.close()

    def __enter__(self) -> Self:
        """Use it as a context."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


# --- on any netlink socket ------------------------------------------------------------------------


def list_ifbs(netlink: IPRoute) -> list[Ifb]:
    """Return all IFBs of ours."""
    links = netlink.link("dump", kind="ifb")
    found = [
        read_alias(
            link["index"], str(link.get_attr("IFLA_IFNAME")), link.get_attr("IFLA_IFALIAS") or None
        )
        for link in links
    ]
    return [ifb for ifb in found if ifb is not None]


def make_ifb(netlink: IPRoute, ifb: Ifb, limit_bytes: int) -> Ifb:
    """Make `ifb`, whose index is not known yet, with a plug that holds; return it with its index.

    It is put up last, with its plug, and without IPv6, whose solicitations would be held as well.
    Raises NetlinkError or OSError, and nothing is left of it.
    """
    assert ifb.owner is not None, "an IFB is made for somebody"
    netlink.link("add", ifname=ifb.name, kind="ifb", txqlen=QUEUE_PACKETS)
    (index,) = netlink.link_lookup(ifname=ifb.name)
    try:
        alias = alias_of(ifb.tap, ifb.owner, is_ingress_ours=ifb.is_ingress_ours)
        netlink.link("set", index=index, ifalias=alias)
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
            Path(IPV6_SWITCH.format(ifb.name)).write_text("1", encoding="ascii")
        netlink.tc(
            "add", "plug", index, handle=PLUG_HANDLE, action="TCQ_PLUG_BUFFER", limit=limit_bytes
        )
        netlink.link("set", index=index, state="up")
    except BaseException:
        delete_link(netlink, index)
        raise
    return Ifb(index, ifb.name, ifb.tap, ifb.owner, ifb.is_ingress_ours)


def add_filter(netlink: IPRoute, index: int, preference: int, target: int) -> None:
    """Redirect all that arrives on `index` to the egress of `target`."""
    netlink.tc(
        "add-filter",
        "matchall",
        index,
        parent=CLSACT_INGRESS,
        prio=preference,
        protocol=ETH_P_ALL,
        action={
            "kind": "mirred",
            "direction": "egress",
            "action": "redirect",
            "ifindex": target,
        },
    )


def delete_filter(netlink: IPRoute, index: int, preference: int) -> None:
    """Take out the filter of this preference. Idempotent."""
    info = (preference << 16) | _network_order(ETH_P_ALL)
    with _tolerating(errno.ENOENT, errno.EINVAL):
        netlink.tc("del-filter", index=index, parent=CLSACT_INGRESS, info=info)


def check_ingress(netlink: IPRoute, link: Any, ours: set[int]) -> None:
    """Refuse a tap that somebody else's program or filter is on. Raises PlugUnfit."""
    tap = str(link.get_attr("IFLA_IFNAME"))
    if link.get_nested("IFLA_XDP", "IFLA_XDP_ATTACHED"):
        raise PlugUnfit(
            "xdp-on-tap",
            f"tap {tap} runs an XDP program, which sees packets before a plug could hold them: "
            "detach it (ip link set dev TAP xdp off)",
        )
    if any(target not in ours for _, target in _filters(netlink, link["index"])):
        raise PlugUnfit(
            "ingress-filtered",
            f"tap {tap} has ingress filters of somebody else, past or before which output would "
            "leave unheld: remove them (tc filter del dev TAP ingress; libvirt's outbound "
            "bandwidth limit is one), or protect this host's VMs with the filter plug",
        )


def release_tap(netlink: IPRoute, tap: str, index: int, owner: Owner | None = None) -> None:
    """Take out the filters of ours (or of this owner's) on `tap`, which is interface `index`."""
    ours = {ifb.index for ifb in list_ifbs(netlink) if _is_of(ifb, tap, owner)}
    for preference, target in _filters(netlink, index):
        if target in ours:
            delete_filter(netlink, index, preference)


def remove_plug(netlink: IPRoute, tap: str, owner: Owner | None = None) -> None:
    """Take everything of ours (or of this owner's) off `tap`, which may be gone. Idempotent.

    What is held is dropped.
    """
    ours = [ifb for ifb in list_ifbs(netlink) if _is_of(ifb, tap, owner)]
    if not ours:
        return
    for index in netlink.link_lookup(ifname=tap):
        release_tap(netlink, tap, index, owner)
        if any(ifb.is_ingress_ours for ifb in ours):
            remove_ingress(netlink, index)
    for ifb in ours:
        delete_link(netlink, ifb.index)


def sweep() -> None:
    """Remove what holds for nobody any more: its QEMU has ended, or its tap is gone. Idempotent.

    Raises VirtualMachineFailed.
    """
    with _speaking("of a VM that is gone"), IPRoute() as netlink:
        for ifb in list_ifbs(netlink):
            if ifb.owner is None:
                continue  # its maker is at it, or died: the tap's next holder takes it out
            if not is_alive(ifb.owner.pid, ifb.owner.start_ticks):
                remove_plug(netlink, ifb.tap, ifb.owner)
            elif not netlink.link_lookup(ifname=ifb.tap):
                delete_link(netlink, ifb.index)


def remove_plugs_of(tap: str) -> None:
    """Take everything of ours off `tap`, or remove what is left of a tap that is gone.

    What is held is dropped. Idempotent. Raises VirtualMachineFailed.
    """
    with _speaking(tap), IPRoute() as netlink:
        remove_plug(netlink, tap)


def delete_link(netlink: IPRoute, index: int) -> None:
    """Remove an interface. Idempotent."""
    with _tolerating(errno.ENODEV):
        netlink.link("del", index=index)


def remove_ingress(netlink: IPRoute, index: int) -> None:
    """Take the ingress qdisc off, unless filters are left on it."""
    if _filters(netlink, index) or _filters(netlink, index, CLSACT_EGRESS):
        return
    with _tolerating(errno.ENOENT, errno.EINVAL, errno.ENODEV):
        netlink.tc("del", "clsact", index)


def _ingress(netlink: IPRoute, index: int) -> str | None:
    """Return the kind of the ingress qdisc of an interface."""
    for qdisc in netlink.get_qdiscs(index=index):
        kind = str(qdisc.get_attr("TCA_KIND"))
        if kind in ("ingress", "clsact"):
            return kind
    return None


def _filters(netlink: IPRoute, index: int, parent: int = CLSACT_INGRESS) -> list[tuple[int, int]]:
    """Return the filters there as (preference, interface redirected to or 0), in effect first.

    A plain ingress qdisc answers for either parent.
    """
    found: dict[int, int] = {}
    try:
        entries = list(netlink.get_filters(index=index, parent=parent))
    except NetlinkError as error:
        if error.code in (errno.ENODEV, errno.EINVAL, errno.ENOENT):
            return []
        raise
    for entry in entries:
        preference = entry["info"] >> 16
        found[preference] = found.get(preference) or _target(entry)
    return sorted(found.items())


def _target(entry: Any) -> int:
    """Return the interface that a filter of our kind redirects to; 0 for any other filter."""
    if entry.get_attr("TCA_KIND") != "matchall":
        return 0
    parameters = entry.get_nested(
        "TCA_OPTIONS", "TCA_MATCHALL_ACT", "TCA_ACT_PRIO_1", "TCA_ACT_OPTIONS", "TCA_MIRRED_PARMS"
    )
    return int(parameters["ifindex"]) if parameters else 0


def _is_of(ifb: Ifb, tap: str, owner: Owner | None = None) -> bool:
    """Tell whether `ifb` belongs to `tap`: by its alias, or by its name before it had one."""
    is_here = ifb.tap == tap or (not ifb.tap and ifb.name.startswith(name_base_of(tap)))
    return is_here and owner in (None, ifb.owner)


def _network_order(value: int) -> int:
    return ((value & 0xFF) << 8) | (value >> 8)


@contextlib.contextmanager
def _speaking(tap: str) -> Iterator[None]:
    """Turn the kernel's refusals into the failure of this VM's output."""
    try:
        yield
    except (NetlinkError, OSError) as error:
        raise VirtualMachineFailed(f"the plug of tap {tap or '(unknown)'}: {error}") from error


class _tolerating(contextlib.AbstractContextManager[None]):  # noqa: N801 - reads as a keyword
    """Passes over refusals of the kernel that mean: it is so already."""

    def __init__(self, *codes: int) -> None:
        self._codes = codes

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        return isinstance(error, NetlinkError) and error.code in self._codes
