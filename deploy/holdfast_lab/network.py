"""The lab's network: a switch, parties attached to it, cut and healed links.

Needs CAP_NET_ADMIN; calls `ip` and `tc`. Nothing is made in the machine's own network namespace.

    hf-LAB-switch   bridge br0 with one port for each party, named after it; sink0-sink1
    hf-LAB-h1, ...  bridge br0 with the host's address, port `uplink` to the switch, taps of VMs
    hf-LAB-control  `uplink` with the control plane's address
    hf-LAB-etcd-1, hf-LAB-controller-1, ...  the same, where there are several of a kind
    hf-LAB-client   `uplink` with the test clients' address

A cut is a rule at the sender's port of the switch: packets with the two parties' addresses are
redirected into `sink0`. Its other end has no address and takes nothing that is not sent to it, so
they vanish as on a broken cable; the sender is told nothing, and what the guests send passes. (A
firewall rule at the sender would answer it with an error, and the usual `drop` action of tc is
missing in small kernels; redirecting is in all of them.)

A power loss takes the port at the switch down first. So not one packet that a dying process sends
(the closing of its connections, for example) gets out.
"""

import ipaddress
import re
import socket
import subprocess
import time

from holdfast_lab import namespaces
from holdfast_lab.errors import LabError

CONTROL = "control"
CLIENT = "client"
SWITCH = "switch"
HOSTS_MAX = 80
REPLICAS_MAX = 5
"""Of controllers, and of etcd's members: these have up to five."""
NICS_MAX = 4
NAME_PATTERN = r"[a-z0-9][a-z0-9-]{0,19}"
"""Of a lab. Short, because it is part of socket paths, which end at 107 characters."""

_BRIDGE_OPTIONS = "type bridge stp_state 0 forward_delay 0 mcast_snooping 0"


def host_address(host: str) -> str:
    """Return the management address of a host `hN`."""
    return f"10.77.0.{10 + int(host[1:])}"


def party_address(party: str) -> str:
    """Return the management address of any party."""
    kind, _, number = party.partition("-")
    match kind:
        case "controller":
            return f"10.77.0.{100 + int(number)}"
        case "etcd":
            return f"10.77.0.{110 + int(number)}"
        case _:
            known = {CONTROL: "10.77.0.2", CLIENT: "10.77.0.100"}
            return known.get(party) or host_address(party)


def guest_address(number: int, nic: int) -> str:
    """Return the address of NIC `nic` (from 0) of the lab's guest `number` (from 1).

    Every further NIC is in a network of its own, so that replies leave by the NIC they are for.
    """
    assert 0 <= nic < NICS_MAX, nic
    return str(ipaddress.IPv4Address(f"10.{77 + nic}.1.0") + number)


def guest_mac(number: int, nic: int) -> str:
    """Return the MAC of the same NIC: from QEMU's range, unique in the lab."""
    return f"52:54:00:{77 + nic:02x}:{number >> 8:02x}:{number & 255:02x}"


class Network:
    """The network of one lab. Holds no state of its own: the kernel does."""

    def __init__(self, lab: str) -> None:
        """Speak of the network of this lab; nothing is made yet."""
        assert re.fullmatch(NAME_PATTERN, lab), lab
        self._lab = lab

    def namespace(self, party: str) -> str:
        """Return the name of a party's namespace."""
        return f"hf-{self._lab}-{party}"

    def existing(self) -> list[str]:
        """Return the namespaces of this lab that are there, the switch last."""
        pattern = re.compile(
            rf"hf-{re.escape(self._lab)}-(h\d+|(etcd|controller)-\d|{CONTROL}|{CLIENT}|{SWITCH})"
        )
        found = [name for name in namespaces.names() if pattern.fullmatch(name)]
        return sorted(found, key=lambda name: name.endswith(f"-{SWITCH}"))

    def create_switch(self) -> None:
        """Make the switch, without ports."""
        name = self.namespace(SWITCH)
        namespaces.create(name)
        namespaces.batch(
            name,
            f"link add br0 {_BRIDGE_OPTIONS}",
            "link set br0 up",
            "link add sink0 type veth peer name sink1",
            "link set sink0 arp off up",
            "link set sink1 arp off up",
        )

    def attach(self, party: str) -> None:
        """Make a party's namespace and connect it to the switch."""
        name, switch = self.namespace(party), self.namespace(SWITCH)
        namespaces.create(name)
        namespaces.batch(
            switch,
            f"link add {party} type veth peer name uplink netns {name}",
            f"link set {party} master br0 up",
        )
        namespaces.run_tool(["tc", "-n", switch, "qdisc", "add", "dev", party, "ingress"])
        if not _is_host(party):
            # Clients talk to every NIC of a guest; each is in a network of its own.
            nics = range(NICS_MAX if party == CLIENT else 1)
            last = party_address(party).split(".", 2)[2]
            namespaces.batch(
                name,
                *(f"address add 10.{77 + nic}.{last}/16 dev uplink" for nic in nics),
                "link set uplink up",
            )
            return
        address = host_address(party)
        # Without a MAC of its own a bridge takes the lowest of its ports, and changes it with them.
        mac = f"02:00:00:77:00:{int(address.rsplit('.', 1)[1]):02x}"
        namespaces.batch(
            name,
            f"link add br0 address {mac} {_BRIDGE_OPTIONS}",
            "link set uplink master br0 up",
            f"address add {address}/16 dev br0",
            "link set br0 up",
        )

    def power_off(self, host: str) -> float:
        """Cut a host's uplink, end all its processes at once, let its interfaces vanish.

        Returns when the order was given, in seconds of the monotonic clock, which all processes
        of this machine share.
        """
        switch = self.namespace(SWITCH)
        ordered_at = time.monotonic()
        namespaces.batch(switch, f"link set {host} down")
        namespaces.kill_all(self.namespace(host))
        # Removing the namespace would remove it too, but later; a revival must not meet it.
        namespaces.batch(switch, f"link delete {host}")
        namespaces.remove(self.namespace(host))
        return ordered_at

    def cut(self, sender: str, receiver: str) -> None:
        """Let what `sender` sends to `receiver` vanish. Both are attached."""
        preference = _preference(sender, receiver)
        self._filter(
            "add", sender, preference,
            "u32", "match", "ip", "src", f"{party_address(sender)}/32",
            "match", "ip", "dst", f"{party_address(receiver)}/32",
            "action", "mirred", "egress", "redirect", "dev", "sink0",
        )  # fmt: skip

    def heal(self, sender: str, receiver: str) -> None:
        """Take back a cut."""
        self._filter("delete", sender, _preference(sender, receiver))

    def plug_tap(self, host: str, tap: str) -> None:
        """Connect the tap of a VM, which its QEMU made, to the host's bridge."""
        namespaces.batch(self.namespace(host), f"link set {tap} master br0 up")

    def remove(self) -> None:
        """End every process of the lab and remove all its namespaces. Idempotent."""
        faults = []
        for name in self.existing():
            try:
                namespaces.remove(name)
            except (LabError, subprocess.TimeoutExpired) as fault:
                faults.append(fault)
        if faults:
            raise LabError("; ".join(map(str, faults)))

    def has_interface(self, party: str, interface: str) -> bool:
        """Tell whether a party has an interface of this name."""

        def look() -> bool:
            return any(name == interface for _, name in socket.if_nameindex())

        return namespaces.enter(self.namespace(party), look)

    def _filter(self, verb: str, port: str, preference: int, *words: str) -> None:
        switch = self.namespace(SWITCH)
        namespaces.run_tool(
            ["tc", "-n", switch, "filter", verb, "dev", port, "ingress",
             "protocol", "ip", "pref", str(preference), *words]
        )  # fmt: skip


def _is_host(party: str) -> bool:
    return re.fullmatch(r"h\d+", party) is not None


def _preference(sender: str, receiver: str) -> int:
    """Return a number by which the rule of this pair is found again."""
    last = [int(party_address(party).rsplit(".", 1)[1]) for party in (sender, receiver)]
    return 1 + last[0] * 256 + last[1]
