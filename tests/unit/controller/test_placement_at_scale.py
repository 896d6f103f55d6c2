"""A search asks few hosts every rule; it answers as if it had asked every rule of every host."""

from itertools import product
from typing import Any

import pytest
from tests.unit.controller.worlds import (
    MEBIBYTE,
    heartbeat,
    host,
    policy,
    reasons,
    record,
    standby,
    view,
    vm_facts,
)

from holdfast_api.records import Policy, Setback
from holdfast_controller.core import placement
from holdfast_controller.core.placement import REJECTIONS_MAX, WOULD_DO, Occupancy, choose
from holdfast_controller.core.view import HostView, View

WISHES = {
    "nothing": Policy(),
    "labels": policy(require_labels={"fast": "yes"}, prefer_labels={"near": "yes"}),
    "another rack": policy(failure_domain="rack", prefer_labels={"near": "yes"}),
    "some hosts": policy(hosts=("h2", "h4", "h6"), exclude_hosts=("h4",)),
    "distance": policy(anti_affinity=("v0", "v1")),
}


def hosts_of_every_kind() -> list[HostView]:
    """Hosts that differ in room, labels, maintenance and what they hold."""
    hosts = []
    kinds = product((600, 1024), ("yes", "no"), ("r1", "r2"), (False, True))
    for number, (room, near, rack, busy) in enumerate(kinds, start=2):
        beat = heartbeat(
            held=(standby("v2"),) if number % 5 == 0 else (),
            memory_available_bytes=room * MEBIBYTE,
            bridges=() if number % 7 == 0 else ("br0",),
        )
        labels: Any = {"near": near, "rack": rack, "fast": "no" if busy else "yes"}
        hosts.append(host(f"h{number}", None if number == 9 else beat, **labels))
    return hosts


def world(wanted: Policy) -> View:
    facts = [vm_facts(f"v{number}", memory_bytes=400 * MEBIBYTE) for number in range(8)]
    primary = host("h1", heartbeat(*facts), rack="r1")
    failed = (Setback(host="h6", count=1, reason="full"),)
    records = [record(vm=each.vm, policy=wanted, setbacks=failed) for each in facts]
    return view([primary, *hosts_of_every_kind()], records, now=1.0)


def by_asking_everybody(seen: View, occupancy: Occupancy, vm: str) -> dict[str, str | None]:
    """Return each host's first objection to `vm`, or None."""
    known = seen.protections[vm]
    facts = seen.vm_facts("h1", vm)
    assert facts is not None
    search = placement._Search(seen, occupancy, known.record, facts, known.since_seconds)
    rules = placement._RULES
    return {name: placement._objection(rules, search, one) for name, one in seen.hosts.items()}


@pytest.mark.parametrize("wish", sorted(WISHES))
def test_the_short_way_answers_as_every_rule_of_every_host_would(wish: str) -> None:
    seen = world(WISHES[wish])
    occupancy = Occupancy.of(seen)
    prefer = WISHES[wish].placement.prefer_labels
    for vm in sorted(seen.protections):
        objections = by_asking_everybody(seen, occupancy, vm)
        fit = [seen.hosts[name] for name, objection in objections.items() if objection is None]
        fit.sort(
            key=lambda one: (
                -sum(one.settings.labels.get(key) == value for key, value in prefer.items()),
                occupancy.ranks[one.host],
            )
        )
        note = choose(seen, occupancy, seen.protections[vm])
        assert note.chosen == (fit[0].host if fit else None)
        for name, objection in objections.items():
            if name != note.chosen:
                expected = objection or WOULD_DO
                assert reasons(note)[name] == expected
        if note.chosen is not None:
            occupancy.assign(vm, note.chosen, 400 * MEBIBYTE)


def test_a_note_names_a_bounded_number_of_hosts_and_objections_first() -> None:
    others = [host(f"b{number:04d}", heartbeat()) for number in range(200)]
    objecting = [host(f"x{number}", heartbeat(), maintenance=True) for number in range(5)]
    seen = view([host("h1", heartbeat(vm_facts())), *others, *objecting], [record()])
    note = choose(seen, Occupancy.of(seen), seen.protections["vm"])
    assert note.chosen == "b0000"
    assert len(note.rejections) == REJECTIONS_MAX
    assert {"h1", *(f"x{number}" for number in range(5))} <= set(reasons(note))
    assert [one.host for one in note.rejections] == sorted(reasons(note))
