"""Which host backs a VM up, and the sentence for every one that does not."""

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

from holdfast_api.records import (
    PlacementNote,
    Policy,
    ProtectionRecord,
    SeedingProgress,
    Setback,
    WorkerReport,
)
from holdfast_api.words import Phase, Role, WorkerPhase
from holdfast_controller.core.placement import (
    MEMORY_RESERVE_BYTES,
    WOULD_DO,
    Occupancy,
    choose,
    retry_after_seconds,
)
from holdfast_controller.core.view import HostView, View


def search(seen: View, vm: str = "vm") -> PlacementNote:
    return choose(seen, Occupancy.of(seen), seen.protections[vm])


def place(
    *others: HostView, wanted: Policy | None = None, facts: Any = None, **primary_labels: str
) -> PlacementNote:
    labels: Any = primary_labels
    primary = host("h1", heartbeat(facts or vm_facts()), **labels)
    return search(view([primary, *others], [record(policy=wanted or Policy())]))


def refused(*others: HostView, wanted: Policy | None = None, **primary_labels: str) -> str:
    note = place(*others, wanted=wanted, **primary_labels)
    assert note.chosen is None
    return reasons(note)[others[0].host]


def test_a_host_that_can_do_it_is_chosen_and_the_primary_never() -> None:
    note = place(host("h2", heartbeat()))
    assert note.chosen == "h2"
    assert reasons(note) == {"h1": "is the primary"}


def test_without_any_other_host_nobody_is_chosen() -> None:
    assert place() == PlacementNote(chosen=None, rejections=place().rejections)
    assert reasons(place()) == {"h1": "is the primary"}


@pytest.mark.parametrize(
    ("other", "wanted", "reason"),
    [
        (host("h2", None), None, "does not answer"),
        (host("h2", heartbeat(), maintenance=True), None, "is in maintenance"),
        (host("h2", heartbeat()), policy(exclude_hosts=["h2"]), "is excluded by the policy"),
        (
            host("h2", heartbeat()),
            policy(hosts=["h9"]),
            "is not among the hosts that the policy names",
        ),
        (host("h2", heartbeat()), policy(require_labels={"ssd": "y"}), "lacks the label ssd=y"),
        (
            host("h2", heartbeat(), ssd="n"),
            policy(require_labels={"ssd": "y"}),
            "lacks the label ssd=y",
        ),
        (host("h2", heartbeat(qemu_version="8.0.0")), None, "runs QEMU 8.0.0, the VM runs 7.2.22"),
        (
            host("h2", heartbeat(machine_types=("pc-q35-8.0",))),
            None,
            "its QEMU has no machine type pc-q35-7.2",
        ),
        (host("h2", heartbeat(accelerators=("kvm",))), None, "has no accelerator tcg"),
        (host("h2", heartbeat(bridges=("br7",))), None, "has no bridge br0"),
        (
            host("h2", heartbeat(held=(standby(),))),
            None,
            "still holds an older copy of the VM; it is told to destroy it",
        ),
    ],
)
def test_every_host_passed_over_has_its_reason(
    other: HostView, wanted: Policy | None, reason: str
) -> None:
    assert refused(other, wanted=wanted) == reason


def test_a_host_named_by_the_policy_with_its_labels_is_chosen() -> None:
    wanted = policy(hosts=["h2"], require_labels={"ssd": "y"})
    assert place(host("h2", heartbeat(), ssd="y"), wanted=wanted).chosen == "h2"


@pytest.mark.parametrize(
    ("mine", "theirs", "reason"),
    [
        ({}, {"rack": "a"}, "has no label rack, so its failure domain is not known"),
        ({"rack": "a"}, {}, "the primary has no label rack, so its failure domain is not known"),
        ({"rack": "a"}, {"rack": "a"}, "is in the primary's failure domain (rack=a)"),
    ],
)
def test_a_failure_domain_must_be_known_and_differ(mine: Any, theirs: Any, reason: str) -> None:
    wanted = policy(failure_domain="rack")
    assert refused(host("h2", heartbeat(), **mine), wanted=wanted, **theirs) == reason
    other = host("h2", heartbeat(), rack="b")
    assert place(other, wanted=wanted, rack="a").chosen == "h2"


def test_memory_must_suffice_for_the_vm_and_the_reserve_to_the_byte() -> None:
    needed = 256 * MEBIBYTE + MEMORY_RESERVE_BYTES
    assert place(host("h2", heartbeat(memory_available_bytes=needed))).chosen == "h2"
    reason = refused(host("h2", heartbeat(memory_available_bytes=needed - 1)))
    assert reason == "has less than 320 MiB of memory to spare"


def seeding_world(report: WorkerReport | None, phase: Phase = Phase.SEEDING) -> View:
    """`other` is being filled on h2, which has room for one more only when that is done."""
    other = record(phase, vm="other")
    beat = heartbeat(vm_facts(), vm_facts("other"), workers=(report,) if report else ())
    room = 256 * MEBIBYTE + MEMORY_RESERVE_BYTES + 100 * MEBIBYTE
    two = host("h2", heartbeat(memory_available_bytes=room))
    return view([host("h1", beat), two], [record(), other])


def progress(generation: int = 3, **seeding: int) -> WorkerReport:
    return WorkerReport(
        vm="other",
        generation=generation,
        role=Role.PRIMARY,
        phase=WorkerPhase.SEEDING,
        seeding=SeedingProgress.model_validate(seeding),
    )


@pytest.mark.parametrize(
    ("report", "chosen"),
    [
        (None, None),
        (progress(round=1, sent_bytes=100 * MEBIBYTE), None),
        (progress(round=1, sent_bytes=156 * MEBIBYTE), "h2"),
        (progress(round=2, sent_bytes=0), "h2"),
        (progress(round=1, sent_bytes=999 * MEBIBYTE), "h2"),
        (progress(generation=2, round=2), None),
    ],
)
def test_what_a_standby_being_filled_will_still_take_is_kept_for_it(
    report: WorkerReport | None, chosen: str | None
) -> None:
    assert search(seeding_world(report)).chosen == chosen


def test_a_standby_that_is_filled_takes_nothing_more() -> None:
    assert search(seeding_world(None, Phase.PROTECTED)).chosen == "h2"


@pytest.mark.parametrize(
    ("mine", "where"),
    [
        (True, "backup"),
        (False, "backup"),
        (True, "primary"),
        (False, "primary"),
        (True, "not protected"),
    ],
)
def test_vms_that_must_not_share_a_host_are_kept_apart_in_both_directions(
    mine: bool, where: str
) -> None:
    wanted, theirs = policy(anti_affinity=["other"]), policy(anti_affinity=["vm"])
    records = [record(policy=wanted if mine else Policy())]
    others: Any = {"policy": Policy() if mine else theirs, "vm": "other"}
    two = heartbeat()
    if where == "backup":
        records.append(record(Phase.PROTECTED, **others))
    elif where == "primary":
        records.append(record(primary="h2", **others))
    else:
        two = heartbeat(vm_facts("other"))
    seen = view([host("h1", heartbeat(vm_facts())), host("h2", two)], records)
    assert reasons(search(seen))["h2"] == "is used by other, which must not share a host with vm"


def test_a_vm_that_is_not_protected_any_more_keeps_nobody_away() -> None:
    retired = record(Phase.RETIRED, vm="other", primary="h2")
    mine = record(policy=policy(anti_affinity=["other"]))
    seen = view([host("h1", heartbeat(vm_facts())), host("h2", heartbeat())], [mine, retired])
    assert search(seen).chosen == "h2"


def setback_world(now: float, since: float = 100.0) -> View:
    failed = record(setbacks=(Setback(host="h2", count=2, reason="disk full"),))
    hosts = [host("h1", heartbeat(vm_facts())), host("h2", heartbeat())]
    return view(hosts, [failed], now=now, since=since)


def test_a_host_that_could_not_be_filled_is_tried_again_later() -> None:
    wait = retry_after_seconds(Setback(host="h2", count=2, reason="x"))
    note = search(setback_world(100.0 + wait - 0.01))
    assert reasons(note)["h2"] == "could not be filled (disk full); it is tried again later"
    assert search(setback_world(100.0 + wait)).chosen == "h2"


def test_each_setback_doubles_the_wait_up_to_a_limit() -> None:
    waits = [retry_after_seconds(Setback(host="h", count=n, reason="x")) for n in (1, 2, 3, 99)]
    assert waits == [5.0, 10.0, 20.0, 300.0]


def test_a_vm_with_a_blocking_issue_goes_nowhere() -> None:
    issue = {"code": "vhost-user", "severity": "blocking", "message": "x"}
    note = place(host("h2", heartbeat()), facts=vm_facts(issues=[issue]))
    assert note.chosen is None
    assert reasons(note)["h2"] == "the VM can not be protected as it is: vhost-user"
    warning = issue | {"severity": "warning"}
    assert place(host("h2", heartbeat()), facts=vm_facts(issues=[warning])).chosen == "h2"


def test_a_vm_of_which_nothing_is_known_goes_nowhere() -> None:
    note = search(view([host("h1", heartbeat()), host("h2", heartbeat())], [record()]))
    assert note.chosen is None
    assert "h1 does not report it" in reasons(note)["h2"]


def ranked(*hosts: HostView, records: tuple[ProtectionRecord, ...] = (), **wanted: Any) -> str:
    primary = host("h1", heartbeat(vm_facts()))
    seen = view([primary, *hosts], [record(policy=policy(**wanted)), *records])
    note = search(seen)
    assert note.chosen is not None
    for passed in {h.host for h in hosts} - {note.chosen}:
        assert reasons(note)[passed] == WOULD_DO
    return note.chosen


def test_preferred_labels_come_first_then_few_backups_then_memory_then_the_name() -> None:
    plain, roomy = heartbeat(), heartbeat(memory_available_bytes=2048 * MEBIBYTE)
    prefer = {"ssd": "y", "fast": "y"}
    busy = record(Phase.PROTECTED, vm="other", primary="h9", backup="h4")
    assert ranked(host("h3", plain), host("h2", plain)) == "h2"
    assert ranked(host("h2", plain), host("h3", roomy)) == "h3"
    assert ranked(host("h3", plain), host("h4", roomy), records=(busy,)) == "h3"
    both = host("h4", plain, ssd="y", fast="y")
    one = host("h3", roomy, ssd="y")
    assert ranked(one, both, records=(busy,), prefer_labels=prefer) == "h4"
    wrong = host("h2", plain, ssd="n")
    assert ranked(wrong, one, prefer_labels=prefer) == "h3"


def test_a_vm_whose_nics_need_the_kernels_plug_is_not_sent_where_there_is_none() -> None:
    facts = vm_facts(plugs=("qdisc",))
    without = host("h2", heartbeat(plugs=("filter",)))
    with_it = host("h2", heartbeat(plugs=("qdisc", "filter")))
    refusal = "has no plug for its NICs (qdisc): modprobe -a ifb sch_plug"
    assert reasons(place(without, facts=facts))["h2"] == refusal
    assert place(with_it, facts=facts).chosen == "h2"
    assert place(host("h2", heartbeat()), facts=facts).chosen == "h2", "an older agent says nothing"
    assert place(without, facts=vm_facts(plugs=("qdisc", "filter"))).chosen == "h2"
