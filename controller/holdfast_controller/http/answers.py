"""From a view of the world to what the API shows: hosts, VMs, protections, assignments. Pure.

A protection is its record merged with what its workers last reported. Figures are taken over only
from a report of the record's own generation: those of an earlier one describe another pair.
"""

from collections.abc import Iterable

from holdfast_api.messages import Assignment, Preflight
from holdfast_api.records import (
    Host,
    PreflightIssue,
    Protection,
    ProtectionRecord,
    Vm,
    VmFacts,
    WorkerReport,
)
from holdfast_api.transitions import LIVE
from holdfast_api.words import ClaimReason, HostId, Phase, Role, Severity, VmId
from holdfast_controller.core import placement
from holdfast_controller.core.placement import MEBIBYTE, Occupancy
from holdfast_controller.core.planner import effective_policy, why_nobody
from holdfast_controller.core.view import ProtectionView, View

STANDING = LIVE | {Phase.RELEASING}
"""Phases in which hosts have something to do for a protection."""


# --- hosts ----------------------------------------------------------------------------------------


def host_answer(view: View, name: HostId, vms: Iterable[VmId]) -> Host:
    """Return host `name`; `vms` are those whose records name it."""
    known = view.hosts[name]
    records = [r for r in (view.record(vm) for vm in sorted(vms)) if r and r.phase in STANDING]
    return Host(
        host=name,
        alive=known.alive,
        settings=known.settings,
        facts=None if known.heartbeat is None else known.heartbeat.facts,
        primaries=tuple(r.vm for r in records if r.primary == name),
        backups=tuple(r.vm for r in records if r.backup == name),
    )


# --- VMs ------------------------------------------------------------------------------------------


def vm_names(view: View) -> list[VmId]:
    """Return every VM that a living host reports or that a standing protection names."""
    names = {vm for vm, known in view.protections.items() if known.record.phase in STANDING}
    for host in view.hosts.values():
        if host.heartbeat is not None:
            names.update(host.heartbeat.vms)
    return sorted(names)


def locate(view: View, vm: VmId) -> tuple[HostId, VmFacts] | None:
    """Return where `vm` runs: where its record says, else the first host that runs it."""
    record = view.record(vm)
    if record is not None and record.phase in STANDING:
        facts = view.vm_facts(record.primary, vm)
        return None if facts is None else (record.primary, facts)
    reporters = sorted(view.reporters(vm), key=lambda found: (not found[1].running, found[0]))
    return reporters[0] if reporters else None


def vm_answer(view: View, vm: VmId, now_seconds: float) -> Vm | None:
    """Return the VM, or None when nobody knows it."""
    record = view.record(vm)
    standing = record is not None and record.phase is not Phase.RETIRED
    found = locate(view, vm)
    if found is None and not standing:
        return None
    return Vm(
        vm=vm,
        host=None if found is None else found[0],
        facts=None if found is None else found[1],
        protection=protection_answer(view, record, now_seconds) if record and standing else None,
    )


def preflight_answer(view: View, vm: VmId) -> Preflight | None:
    """Return what stands against protecting `vm`, or None when no living host reports it."""
    found = locate(view, vm)
    if found is None:
        return None
    host, facts = found
    issues = list(facts.issues)
    if not facts.running:
        issues.append(_blocking("not-running", f"{vm} does not run; start it first"))
    others = [name for name, _ in view.reporters(vm) if name != host]
    if others:
        where = ", ".join([host, *others])
        issues.append(_blocking("on-several-hosts", f"{vm} is reported by {where}; keep one"))
    issues.extend(_older_copy_issue(view, vm, host))
    issues.extend(_no_host_issue(view, vm, host, facts))
    protectable = all(issue.severity is not Severity.BLOCKING for issue in issues)
    return Preflight(vm=vm, protectable=protectable, issues=tuple(issues))


def _blocking(code: str, message: str) -> PreflightIssue:
    return PreflightIssue(code=code, severity=Severity.BLOCKING, message=message)


def _older_copy_issue(view: View, vm: VmId, host: HostId) -> list[PreflightIssue]:
    """Refuse a copy that lost to another host: what others heard since is not in its memory.

    To begin a protection with it would make it primary of a newer generation, as if it had won.
    """
    record, heartbeat = view.record(vm), view.heartbeat(host)
    if record is None or record.primary == host or heartbeat is None or vm not in heartbeat.held:
        return []
    message = (
        f"{host} still has an older copy of {vm}: {record.primary} went on with it. It is told to "
        "destroy it; ask again then"
    )
    return [_blocking("older-copy", message)]


def _no_host_issue(view: View, vm: VmId, host: HostId, facts: VmFacts) -> list[PreflightIssue]:
    """Warn when no host could back the VM up now; one that has its backup needs no other."""
    record = view.record(vm)
    if record is not None and record.phase in STANDING:
        known = view.protections[vm]
        if record.phase is not Phase.UNPROTECTED:
            return []
    else:
        policy = effective_policy(view, "default")
        assert policy is not None
        dry = ProtectionRecord(
            vm=vm, generation=1, phase=Phase.UNPROTECTED, primary=host, policy=policy
        )
        known = ProtectionView(dry, revision=0)
    if any(issue.severity is Severity.BLOCKING for issue in facts.issues):
        return []
    note = placement.choose(view, Occupancy.of(view), known)
    if note.chosen is not None:
        return []
    message = f"no host can back {vm} up now, it will be protected when one can: {why_nobody(note)}"
    return [PreflightIssue(code="no-backup-host", severity=Severity.WARNING, message=message)]


# --- protections ----------------------------------------------------------------------------------


def protection_answer(view: View, record: ProtectionRecord, now_seconds: float) -> Protection:
    """Merge `record` with what its workers last reported; `now_seconds` is UTC."""
    primary = _report(view, record.primary, record.vm, Role.PRIMARY)
    backup = None if record.backup is None else _report(view, record.backup, record.vm, Role.BACKUP)
    current = primary if primary and primary.generation == record.generation else None
    since = record.unprotected_since
    figures = {} if current is None else {name: getattr(current, name) for name in _FIGURES}
    return Protection(
        vm=record.vm,
        phase=record.phase,
        generation=record.generation,
        primary=record.primary,
        backup=record.backup,
        policy_name=record.policy_name,
        policy=record.policy,
        handover=record.handover,
        unprotected_seconds=0.0 if since is None else max(0.0, now_seconds - since),
        reason=_why_not_protected(view, record, current),
        placement=record.placement,
        primary_report=primary,
        backup_report=backup,
        **figures,
    )


_FIGURES = (
    "acknowledged_epoch",
    "pause_ms",
    "acknowledgement_ms",
    "checkpoint_bytes",
    "held_bytes",
    "seeding",
)


def _report(view: View, host: HostId, vm: VmId, role: Role) -> WorkerReport | None:
    heartbeat = view.heartbeat(host)
    report = None if heartbeat is None else heartbeat.workers.get(vm)
    return report if report is not None and report.role is role else None


def _why_not_protected(
    view: View, record: ProtectionRecord, report: WorkerReport | None
) -> str | None:
    match record.phase:
        case Phase.PROTECTED:
            return None
        case Phase.RELEASING:
            return "it is being released"
        case Phase.RETIRED:
            return "it was released"
        case Phase.ENDED:
            return _why_ended(record)
        case Phase.SEEDING:
            return _why_seeding(view, record, report)
        case Phase.UNPROTECTED:
            return _why_unprotected(view, record)


def _why_ended(record: ProtectionRecord) -> str:
    stamp = record.claimed
    if (
        stamp is not None
        and stamp.reason == ClaimReason.GUEST_ENDED
        and stamp.generation == record.generation
    ):
        return "the guest ended"
    return "the VM was lost while it had no backup that could take over"


def _why_seeding(view: View, record: ProtectionRecord, report: WorkerReport | None) -> str:
    if view.heartbeat(record.primary) is None:
        return f"{record.primary} does not answer, and {record.backup} is not filled yet"
    progress = None if report is None else report.seeding
    if progress is None:
        return f"{record.backup} is about to be filled"
    sent, total = progress.sent_bytes // MEBIBYTE, progress.total_bytes // MEBIBYTE
    return f"{record.backup} is being filled: round {progress.round}, {sent} of {total} MiB sent"


def _why_unprotected(view: View, record: ProtectionRecord) -> str:
    if view.heartbeat(record.primary) is None:
        return f"{record.primary} does not answer, and there is no backup"
    if not record.backup_wanted:
        return "its backup was lost and the policy says `reprotect: manual`; protect it again"
    if view.vm_facts(record.primary, record.vm) is None:
        return f"{record.primary} does not report the VM yet"
    if record.placement is not None and record.placement.chosen is None:
        return f"no host can back it up: {why_nobody(record.placement)}"
    return "a backup is being looked for"


# --- assignments ----------------------------------------------------------------------------------


def assignments_for(view: View, host: HostId, vms: Iterable[VmId]) -> tuple[Assignment, ...]:
    """Return the full set of orders of `host`; `vms` are those whose records name it.

    A host that holds something for a VM whose record names others is told to let go (INV-6); one
    that holds something of an ended or retired protection of its own is told the phase. Of a
    holding without a record nothing is said: nobody knows what it is.
    """
    orders: dict[VmId, Assignment] = {}
    for vm in vms:
        record = view.record(vm)
        if record is not None and record.phase in STANDING:
            orders[vm] = _assignment(view, record, record.role_of(host))
    heartbeat = view.heartbeat(host)
    for vm in heartbeat.held if heartbeat is not None else ():
        record = view.record(vm)
        if record is not None and vm not in orders:
            orders[vm] = _assignment(view, record, record.role_of(host))
    return tuple(orders[vm] for vm in sorted(orders))


def _assignment(view: View, record: ProtectionRecord, role: Role) -> Assignment:
    peer: HostId | None = None
    address: str | None = None
    if role is Role.PRIMARY and record.backup is not None:
        peer = record.backup
        heartbeat = view.heartbeat(peer)
        address = None if heartbeat is None else heartbeat.facts.peer_address
    elif role is Role.BACKUP:
        peer = record.primary
    return Assignment(
        vm=record.vm,
        generation=record.generation,
        role=role,
        phase=record.phase,
        policy=record.policy,
        peer=peer,
        peer_address=address,
        handover=record.handover,
    )
