r"""What `info network` prints, read into records. Pure.

Each NIC stands with its backend under it (`net/net.c`, `hmp_info_network`); filters follow:

    virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56
     \ n0: index=0,type=tap,ifname=tap0,script=no,downscript=no
    filters:
      - y: type=filter-buffer,...
"""

import re
from dataclasses import dataclass

_CLIENT = re.compile(
    r"^(?P<indent> \\ )?(?P<name>\S+): index=(?P<index>\d+),type=(?P<kind>[^,]+),?(?P<rest>.*)$"
)
_MAC = re.compile(r"macaddr=(?P<mac>[0-9a-f:]{17})")
_INTERFACE = re.compile(r"(?:^|,)ifname=(?P<name>[^,]+)")


@dataclass(frozen=True)
class RunningNic:
    """A NIC of a running machine and its backend."""

    nic: str
    mac: str | None
    netdev_id: str
    """Empty when it has no backend."""
    kind: str
    """Of the backend: `tap`, `user`, ...; empty when it has none."""
    tap: str | None
    by_descriptor: bool
    queue_count: int = 1


def parse_network(text: str) -> list[RunningNic]:
    """Read the NICs with their backends; queues of one NIC are counted together."""
    nics: dict[str, RunningNic] = {}
    current, mac = "", None
    for line in text.splitlines():
        found = _CLIENT.match(line)
        if found is None:
            continue
        if found["kind"] == "nic" and not found["indent"]:
            address = _MAC.search(found["rest"])
            current, mac = found["name"], address["mac"] if address else None
            nics.setdefault(current, RunningNic(current, mac, "", "", None, by_descriptor=False))
        elif found["indent"] and current:
            known = nics[current]
            interface = _INTERFACE.search(found["rest"])
            nics[current] = RunningNic(
                nic=current,
                mac=known.mac,
                netdev_id=found["name"],
                kind=found["kind"],
                tap=interface["name"] if interface else known.tap,
                by_descriptor=re.search(r"(?:^|,)fd=", found["rest"]) is not None,
                queue_count=known.queue_count + 1 if known.netdev_id else 1,
            )
    return list(nics.values())
