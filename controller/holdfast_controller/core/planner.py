"""From a view of the world to the next steps, each fully specified. Pure.

A step holds the whole successor of one record, the revision the record must still have, and the
event that tells of it; whoever executes has no choice left to make. At most one step is planned per
key and pass: the next one is planned from the world that results. A plan that is carried out twice,
late, or by two controllers at once fails its compare-and-swaps and changes nothing.

What the planner does, and what it leaves alone:

| seen                                                          | step                          |
|---------------------------------------------------------------|-------------------------------|
| a heartbeat of a host not present; a present host without one | note the host, tell of it     |
| live, its named policy was changed                            | take the policy over          |
| seeding, the backup's host is silent                          | drop the backup               |
| unprotected, a backup is wanted, the primary reports the VM   | assign a backup, or note why  |
|                                                               | there is none, if that is new |
| unprotected or seeding, the primary lives and has nothing     | declare the VM lost           |
| releasing, the primary lives and has nothing                  | retire                        |
| protected, both hosts live and have nothing                   | declare the VM lost           |
| protected otherwise                                           | none: its own two sides claim |

"Lives and has nothing" needs a heartbeat *newer than the record*, without the VM and without
anything held for it, of whatever generation. A side that has just won a claim reports the standby
it won with, under the old generation, until it has reported the VM: so it is never mistaken for
empty-handed.
"""

from dataclasses import dataclass

from holdfast_api import transitions
from holdfast_api.records import (
    DEFAULT_POLICY_NAME,
    HostSettings,
    PlacementNote,
    Policy,
    ProtectionRecord,
)
from holdfast_api.transitions import LIVE, Outcome, Refusal
from holdfast_api.words import EventKind, HostId, Phase, VmId
from holdfast_controller.core import placement
from holdfast_controller.core.placement import Occupancy
from holdfast_controller.core.view import HostView, ProtectionView, View


@dataclass(frozen=True)
class ChangeProtection:
    """Replace the record of `vm`, if it is still at `expected_revision`, and write the event."""

    vm: VmId
    expected_revision: int
    successor: ProtectionRecord
    kind: EventKind
    message: str
    host: HostId | None = None


@dataclass(frozen=True)
class NoteHost:
    """Store whether a host is present, if its entry is still at `expected_revision` (0: absent)."""

    host: HostId
    expected_revision: int
    settings: HostSettings
    present: bool
    kind: EventKind
    message: str


Step = ChangeProtection | NoteHost


@dataclass(frozen=True)
class Plan:
    """What to do next, and from which revision of the world it was planned."""

    revision: int
    steps: tuple[Step, ...]


def plan(view: View) -> Plan:
    """Plan the next steps of everything that `view` shows."""
    steps: list[Step] = []
    for name in sorted(view.hosts):
        noted = _note_host(view.hosts[name])
        if noted is not None:
            steps.append(noted)
    occupancy = Occupancy.of(view)
    for vm in sorted(view.protections):
        step = _protection_step(view, occupancy, view.protections[vm])
        if step is not None:
            steps.append(step)
    return Plan(revision=view.revision, steps=tuple(steps))


def effective_policy(view: View, name: str) -> Policy | None:
    """Return the policy called `name`; `default` always exists."""
    stored = view.policies.get(name)
    if stored is not None:
        return stored.policy
    return Policy() if name == DEFAULT_POLICY_NAME else None


def _note_host(host: HostView) -> NoteHost | None:
    if host.alive == host.present:
        return None
    if not host.alive:
        kind, message = EventKind.HOST_WENT_SILENT, f"{host.host} does not answer any more"
    elif host.settings_revision == 0:
        kind, message = EventKind.HOST_APPEARED, f"{host.host} answers for the first time"
    else:
        kind, message = EventKind.HOST_RETURNED, f"{host.host} answers again"
    return NoteHost(
        host=host.host,
        expected_revision=host.settings_revision,
        settings=host.settings,
        present=host.alive,
        kind=kind,
        message=message,
    )


def _protection_step(
    view: View, occupancy: Occupancy, known: ProtectionView
) -> ChangeProtection | None:
    record = known.record
    if record.phase in LIVE:
        adopted = _adopt_policy(view, known)
        if adopted is not None:
            return adopted
    match record.phase:
        case Phase.UNPROTECTED:
            return _declare_lost(view, known) or _find_backup(view, occupancy, known)
        case Phase.SEEDING:
            return _declare_lost(view, known) or _drop_silent_backup(view, known)
        case Phase.RELEASING:
            return _retire(view, known)
        case Phase.PROTECTED:
            return _declare_lost(view, known)
        case Phase.ENDED | Phase.RETIRED:
            return None


def _adopt_policy(view: View, known: ProtectionView) -> ChangeProtection | None:
    name = known.record.policy_name
    policy = None if name is None else effective_policy(view, name)
    if policy is None or policy == known.record.policy:
        return None
    outcome = transitions.change_policy(known.record, policy, name)
    message = f"{known.record.vm} follows the changed policy {name}"
    return _step(known, outcome, EventKind.PROTECTION_CHANGED, message)


def _empty_handed(view: View, known: ProtectionView, host: HostId) -> bool:
    """Whether `host` has said, since the record was written, that it has nothing of the VM."""
    heartbeat = view.heartbeat(host)
    if heartbeat is None or heartbeat.revision <= known.revision:
        return False
    return not heartbeat.keeps(known.record.vm)


def _declare_lost(view: View, known: ProtectionView) -> ChangeProtection | None:
    """Both sides of a protected VM must have come back with nothing: one that holds it claims."""
    record = known.record
    if not _empty_handed(view, known, record.primary):
        return None
    if record.phase is Phase.PROTECTED:
        assert record.backup is not None, record
        if not _empty_handed(view, known, record.backup):
            return None
    outcome = transitions.lose(record, record.generation)
    message = (
        f"{record.vm} is lost: {record.primary} answers and does not have it, "
        "and no backup could take over"
    )
    return _step(known, outcome, EventKind.VM_LOST, message, record.primary)


def _retire(view: View, known: ProtectionView) -> ChangeProtection | None:
    record = known.record
    if not _empty_handed(view, known, record.primary):
        return None
    outcome = transitions.retire(record, record.primary, record.generation)
    message = f"{record.vm} is released: {record.primary} has nothing of it any more"
    return _step(known, outcome, EventKind.PROTECTION_RELEASED, message, record.primary)


def _drop_silent_backup(view: View, known: ProtectionView) -> ChangeProtection | None:
    record = known.record
    assert record.backup is not None, record
    if view.heartbeat(record.backup) is not None:
        return None
    outcome = transitions.drop_seeding_backup(record, record.primary, record.generation)
    message = f"{record.backup} does not answer while it is being filled for {record.vm}"
    return _step(known, outcome, EventKind.BACKUP_DROPPED, message, record.backup)


def _find_backup(
    view: View, occupancy: Occupancy, known: ProtectionView
) -> ChangeProtection | None:
    record = known.record
    facts = view.vm_facts(record.primary, record.vm)
    if not record.backup_wanted or facts is None:
        return None
    note = placement.choose(view, occupancy, known)
    if note.chosen is None:
        return _note_nobody(known, note)
    occupancy.assign(record.vm, note.chosen, facts.memory_bytes)
    outcome = transitions.assign_backup(record, note)
    message = f"{note.chosen} was chosen to back up {record.vm}"
    return _step(known, outcome, EventKind.BACKUP_ASSIGNED, message, note.chosen)


def _note_nobody(known: ProtectionView, note: PlacementNote) -> ChangeProtection | None:
    if known.record.placement == note:
        return None
    outcome = transitions.note_placement(known.record, note)
    message = f"no host can back up {known.record.vm}: {why_nobody(note)}"
    return _step(known, outcome, EventKind.NO_BACKUP_FOUND, message)


def why_nobody(note: PlacementNote, limit: int = 8) -> str:
    """Return the rejections as one sentence, at most `limit` hosts of them."""
    if not note.rejections:
        return "there is no other host"
    sentences = [f"{r.host} {r.reason}" for r in note.rejections[:limit]]
    more = len(note.rejections) - limit
    counted = f"{more}" if len(note.rejections) < placement.REJECTIONS_MAX else f"at least {more}"
    return "; ".join(sentences) + (f"; and {counted} more hosts" if more > 0 else "")


def _step(
    known: ProtectionView,
    outcome: Outcome,
    kind: EventKind,
    message: str,
    host: HostId | None = None,
) -> ChangeProtection:
    """Make the step to `outcome`; the phase was checked, so a refusal is our own mistake."""
    assert not isinstance(outcome, Refusal), (known.record, outcome)
    return ChangeProtection(
        vm=known.record.vm,
        expected_revision=known.revision,
        successor=outcome,
        kind=kind,
        message=message,
        host=host,
    )
