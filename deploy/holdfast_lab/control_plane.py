"""What the control plane of a lab consists of, and at which party each part runs. Pure.

    one of a kind     `etcd`, `controller`           both at the party `control`
    several           `etcd 1`, `controller 2`, ...  each at a party of its own: `etcd-1`, ...

People may write a service with a blank or a hyphen, and `etcd 1` for the only one. The party
`control`, which is always there, stands for the whole control plane where links are cut.
"""

import re
from collections.abc import Mapping

from holdfast_lab.errors import LabRefused
from holdfast_lab.network import CLIENT, CONTROL, REPLICAS_MAX
from holdfast_lab.state import LabState

ETCD, CONTROLLER = "etcd", "controller"
KINDS = (ETCD, CONTROLLER)


def check_counts(counts: Mapping[str, int]) -> None:
    """Raise LabRefused for numbers of replicas that cannot be."""
    for kind, count in counts.items():
        if not 1 <= count <= REPLICAS_MAX:
            raise LabRefused(f"a lab has 1 to {REPLICAS_MAX} of {kind}, not {count}")


def names_of(state: LabState, kind: str) -> list[str]:
    """Return the services of a kind, the first one first; none without this component."""
    if kind not in state.components:
        return []
    count = state.replicas.get(kind, 1)
    return [kind] if count == 1 else [f"{kind} {number}" for number in range(1, count + 1)]


def all_names(state: LabState) -> list[str]:
    """Return all services of the control plane, in the order in which they are started."""
    return [name for kind in KINDS for name in names_of(state, kind)]


def canonical(state: LabState, name: str) -> str:
    """Return a service's own name for any way of writing it; other words as they are."""
    match = re.fullmatch(rf"({'|'.join(KINDS)})[ -](\d+)", name)
    if match is None:
        return name
    kind, number = match[1], int(match[2])
    alone = number == 1 and state.replicas.get(kind, 1) == 1
    return kind if alone else f"{kind} {number}"


def party_of(name: str) -> str:
    """Return where a service of the control plane runs."""
    return CONTROL if name in KINDS else name.replace(" ", "-")


def parties(state: LabState) -> list[str]:
    """Return all parties that are no hosts."""
    own = [party_of(name) for name in all_names(state)]
    return [*dict.fromkeys([CONTROL, *own]), CLIENT]


def parties_named(state: LabState, word: str) -> list[str]:
    """Return the parties that a word means where links are cut. Unknown words as they are."""
    if word == CONTROL:
        return [party for party in parties(state) if party != CLIENT]
    name = canonical(state, word)
    return [party_of(name) if name in all_names(state) else word]
