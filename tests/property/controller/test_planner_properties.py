"""Random worlds: a plan is repeatable, legal, harmless when late, and comes to an end."""

from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.controller.worlds import MEBIBYTE, heartbeat, policy, vm_facts

from holdfast_api.records import Policy, ProtectionRecord, Setback
from holdfast_api.words import Phase, Role
from holdfast_controller.core.placement import MEMORY_RESERVE_BYTES
from holdfast_controller.core.planner import ChangeProtection, NoteHost, Step, plan
from holdfast_controller.core.view import HeartbeatView, Held, HostView, ProtectionView, View

HOSTS = [f"h{n}" for n in range(1, 6)]
VMS = ["a", "b", "c", "d"]
few = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def heartbeats(draw: st.DrawFn) -> HeartbeatView | None:
    if draw(st.integers(0, 3)) == 0:
        return None
    vms = draw(st.sets(st.sampled_from(VMS)))
    held = draw(st.sets(st.sampled_from(VMS), max_size=2))
    return heartbeat(
        *(vm_facts(vm) for vm in vms),
        held=tuple(Held(vm, draw(st.integers(1, 9)), draw(st.sampled_from(Role))) for vm in held),
        revision=draw(st.integers(1, 60)),
        memory_available_bytes=draw(st.integers(0, 1500)) * MEBIBYTE,
        qemu_version=draw(st.sampled_from(["7.2.22", "7.2.22", "7.2.22", "8.0"])),
    )


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    return policy(
        exclude_hosts=draw(st.lists(st.sampled_from(HOSTS), max_size=2, unique=True)),
        anti_affinity=draw(st.lists(st.sampled_from(VMS), max_size=2, unique=True)),
        require_labels=draw(st.sampled_from([{}, {}, {"ssd": "y"}])),
        failure_domain=draw(st.sampled_from([None, None, "rack"])),
    ).model_copy(update={"reprotect": draw(st.sampled_from(["auto", "manual"]))})


@st.composite
def records(draw: st.DrawFn, vm: str) -> ProtectionRecord:
    phase = draw(st.sampled_from(Phase))
    primary, backup = draw(st.permutations(HOSTS))[:2]
    paired = phase in (Phase.SEEDING, Phase.PROTECTED)
    return ProtectionRecord(
        vm=vm,
        generation=draw(st.integers(1, 9)),
        phase=phase,
        primary=primary,
        backup=backup if paired else None,
        policy=draw(policies()),
        policy_name=draw(st.sampled_from([None, "default", "gone"])),
        backup_wanted=draw(st.booleans()),
        setbacks=draw(st.sampled_from([(), (Setback(host="h2", count=1, reason="disk full"),)])),
    )


@st.composite
def views(draw: st.DrawFn) -> View:
    hosts = {}
    for name in draw(st.sets(st.sampled_from(HOSTS), min_size=1)):
        labels = draw(st.sampled_from([{}, {"ssd": "y", "rack": "1"}, {"rack": "2"}]))
        known = draw(st.booleans())
        hosts[name] = HostView(
            host=name,
            settings_revision=draw(st.integers(1, 60)) if known else 0,
            present=known and draw(st.booleans()),
            heartbeat=draw(heartbeats()),
        )
        settings_ = hosts[name].settings.model_copy(
            update={"labels": labels, "maintenance": draw(st.integers(0, 5)) == 0}
        )
        hosts[name] = replace(hosts[name], settings=settings_)
    chosen = draw(st.sets(st.sampled_from(VMS)))
    return View(
        revision=60,
        now_seconds=draw(st.floats(0, 20)),
        hosts=hosts,
        protections={
            vm: ProtectionView(draw(records(vm)), draw(st.integers(1, 60))) for vm in chosen
        },
    )


def carry_out(view: View, step: Step) -> View:
    """Do what the store does with a step: nothing, unless its revision is the present one."""
    revision = view.revision + 1
    if isinstance(step, NoteHost):
        host = view.hosts[step.host]
        if host.settings_revision != step.expected_revision:
            return view
        noted = replace(host, settings_revision=revision, present=step.present)
        return replace(view, revision=revision, hosts={**view.hosts, step.host: noted})
    known = view.protections[step.vm]
    if known.revision != step.expected_revision:
        return view
    changed = ProtectionView(step.successor, revision, view.now_seconds)
    return replace(view, revision=revision, protections={**view.protections, step.vm: changed})


@few
@given(views())
def test_the_same_view_gives_the_same_plan(view: View) -> None:
    shuffled = replace(
        view,
        hosts=dict(reversed(list(view.hosts.items()))),
        protections=dict(reversed(list(view.protections.items()))),
    )
    assert plan(view) == plan(view) == plan(shuffled)


@few
@given(views())
def test_every_step_is_whole_and_touches_what_it_may(view: View) -> None:
    steps = plan(view).steps
    keys = [
        (type(step), step.vm if isinstance(step, ChangeProtection) else step.host) for step in steps
    ]
    assert len(keys) == len(set(keys)), "two steps for one key"
    for step in steps:
        assert step.message
        if isinstance(step, NoteHost):
            assert step.expected_revision == view.hosts[step.host].settings_revision
            assert step.settings == view.hosts[step.host].settings
            assert step.present == view.hosts[step.host].alive
            continue
        before, after = view.protections[step.vm].record, step.successor
        assert step.expected_revision == view.protections[step.vm].revision
        assert after != before
        assert after.primary == before.primary, "only a claim moves a VM"
        assert after.claimed == before.claimed
        assert after.generation in (before.generation, before.generation + 1)
        assert ProtectionRecord.model_validate_json(after.model_dump_json()) == after
        if before.phase is Phase.PROTECTED and after.phase is Phase.ENDED:
            for side in (before.primary, before.backup):
                heartbeat = view.heartbeat(str(side))
                assert heartbeat is not None, "a silent host may still hold the VM"
                assert not heartbeat.keeps(step.vm)
        elif before.phase is Phase.PROTECTED:
            assert (after.phase, after.backup) == (Phase.PROTECTED, before.backup)
            assert after.generation == before.generation


@few
@given(views())
def test_a_chosen_host_can_do_it_and_every_other_has_its_reason(view: View) -> None:
    for step in plan(view).steps:
        if not isinstance(step, ChangeProtection) or step.successor.backup is None:
            continue
        record = view.protections[step.vm].record
        if record.backup == step.successor.backup:
            continue
        chosen = view.hosts[step.successor.backup]
        note = step.successor.placement
        assert note is not None
        assert note.chosen == chosen.host
        assert {r.host for r in note.rejections} == set(view.hosts) - {chosen.host}
        wanted = record.policy.placement
        assert chosen.host != record.primary
        assert chosen.heartbeat is not None
        assert not chosen.settings.maintenance
        assert chosen.host not in wanted.exclude_hosts
        assert wanted.require_labels.items() <= chosen.settings.labels.items()
        assert chosen.heartbeat.facts.qemu_version == "7.2.22"
        assert not chosen.heartbeat.keeps(step.vm)
        assert record.backup_wanted
        assert view.vm_facts(record.primary, step.vm) is not None
        if wanted.failure_domain is not None:
            mine = chosen.settings.labels[wanted.failure_domain]
            assert mine != view.hosts[record.primary].settings.labels[wanted.failure_domain]


@few
@given(views())
def test_carried_out_backups_fit_in_memory_and_keep_apart(view: View) -> None:
    new: dict[str, list[str]] = {}
    after = view
    for step in plan(view).steps:
        after = carry_out(after, step)
        if isinstance(step, NoteHost) or step.successor.backup is None:
            continue
        if step.successor.backup != view.protections[step.vm].record.backup:
            new.setdefault(step.successor.backup, []).append(step.vm)
    for name, vms in new.items():
        beat = view.heartbeat(name)
        assert beat is not None
        needed = 256 * MEBIBYTE * len(vms) + MEMORY_RESERVE_BYTES
        assert needed <= beat.facts.memory_available_bytes
        for vm in vms:
            for other in after.protections[vm].record.policy.placement.anti_affinity:
                assert other == vm or other not in (*beat.vms, *vms)


@few
@given(views())
def test_planning_and_carrying_out_comes_to_an_end(view: View) -> None:
    for _ in range(6):
        steps = plan(view).steps
        if not steps:
            return
        for step in steps:
            view = carry_out(view, step)
    assert plan(view).steps == ()


@few
@given(views(), views())
def test_a_late_plan_harms_nothing_that_has_changed(view: View, later: View) -> None:
    moved = replace(
        later,
        hosts={
            **view.hosts,
            **{n: replace(h, settings_revision=100) for n, h in later.hosts.items()},
        },
        protections={
            **view.protections,
            **{vm: replace(p, revision=100) for vm, p in later.protections.items()},
        },
    )
    after = moved
    for step in plan(view).steps:
        after = carry_out(after, step)
    for vm, known in moved.protections.items():
        if known.revision == 100:
            assert after.protections[vm] == known
    twice = after
    for step in plan(view).steps:
        twice = carry_out(twice, step)
    assert twice == after


@few
@given(views())
def test_a_vm_is_declared_lost_only_on_evidence_newer_than_its_record(view: View) -> None:
    for step in plan(view).steps:
        if not isinstance(step, ChangeProtection) or step.successor.phase is not Phase.ENDED:
            continue
        known = view.protections[step.vm]
        beat = view.heartbeat(known.record.primary)
        assert beat is not None
        assert beat.revision > known.revision
        assert step.vm not in beat.vms
        assert step.vm not in beat.held
        assert known.record.phase in (Phase.UNPROTECTED, Phase.SEEDING, Phase.PROTECTED)
