"""Which protection record may follow which: a table, and the functions that make the next record.

Pure. Every function takes the present record and returns its successor, or a `Refusal` that says
why there is none; what is illegal changes nothing. The store writes the successor only if the
record is still the one that was read (compare-and-swap), which makes each of these atomic.

| from        | by                       | to          | generation |
|-------------|--------------------------|-------------|------------|
| (none)      | `begin`                  | unprotected | 1, or last + 1 |
| unprotected | `assign_backup`          | seeding     | + 1        |
| seeding     | `become_protected`       | protected   | same       |
| seeding     | `drop_seeding_backup`    | unprotected | + 1        |
| seeding     | `claim` (primary)        | unprotected | + 1        |
| protected   | `claim` (either side)    | unprotected | + 1        |
| any live    | `claim` (guest ended)    | ended       | + 1        |
| protected   | `request_handover`       | protected   | same       |
| any live    | `change_policy`          | same        | same       |
| any live    | `want_backup`            | same        | same       |
| unprotected | `note_placement`         | unprotected | same       |
| any live    | `release`                | releasing   | + 1        |
| releasing   | `retire`                 | retired     | same       |
| ended       | `release`                | retired     | same       |
| live        | `lose`                   | ended       | + 1        |

INV-4 (exactly one side goes on alone): `claim` demands the exact generation, so after one claim won
no other of that generation can. INV-7 (protected means plugged first): a backup's claim is refused
in every phase but `protected`. A claim that won stays recognisable by its stamp until the next
claim wins, also when the planner has moved the record on meanwhile: told that it had lost, the
winner would destroy the only copy of the VM (INV-5, INV-6).
"""

from dataclasses import dataclass

from holdfast_api.records import ClaimStamp, PlacementNote, Policy, ProtectionRecord, Setback
from holdfast_api.words import ClaimReason, Generation, HostId, Phase, Role, VmId

LIVE = frozenset({Phase.UNPROTECTED, Phase.SEEDING, Phase.PROTECTED})
SETBACKS_KEPT = 32


@dataclass(frozen=True)
class Refusal:
    """Why a transition is illegal: a stable code of `errors.PROBLEMS` and a sentence."""

    code: str
    explanation: str


Outcome = ProtectionRecord | Refusal


def begin(
    *,
    vm: VmId,
    primary: HostId,
    policy: Policy,
    policy_name: str | None,
    previous: ProtectionRecord | None,
    now_seconds: float,
) -> Outcome:
    """Start protecting a VM that runs on `primary`; `previous` is what the store holds."""
    if previous is not None and previous.phase in LIVE | {Phase.RELEASING}:
        return Refusal("wrong-phase", f"{vm} is {previous.phase} already")
    return ProtectionRecord(
        vm=vm,
        generation=1 if previous is None else previous.generation + 1,
        phase=Phase.UNPROTECTED,
        primary=primary,
        policy=policy,
        policy_name=policy_name,
        claimed=_claim_of(previous, primary),
        unprotected_since=now_seconds,
    )


def assign_backup(record: ProtectionRecord, note: PlacementNote) -> Outcome:
    """Give an unprotected VM the backup that `note` chose."""
    if record.phase is not Phase.UNPROTECTED:
        return Refusal("wrong-phase", f"{record.vm} is {record.phase}, not unprotected")
    if note.chosen is None or note.chosen == record.primary:
        return Refusal("no-backup", f"{note.chosen} can not back up {record.primary}")
    return _next(record, phase=Phase.SEEDING, backup=note.chosen, placement=note)


def become_protected(record: ProtectionRecord, host: HostId, generation: Generation) -> Outcome:
    """The primary holds output and its first checkpoint is acknowledged. Idempotent."""
    refusal = _current(record, generation) or _is_primary(record, host)
    if refusal:
        return refusal
    if record.phase is Phase.PROTECTED:
        return record
    if record.phase is not Phase.SEEDING:
        return Refusal("wrong-phase", f"{record.vm} is {record.phase}, not seeding")
    return record.model_copy(
        update={"phase": Phase.PROTECTED, "unprotected_since": None, "setbacks": ()}
    )


def drop_seeding_backup(
    record: ProtectionRecord, host: HostId, generation: Generation, *, setback: str | None = None
) -> Outcome:
    """The primary gives a backup up that was never plugged for; no claim is needed.

    `setback` says why a living backup could not be filled: it is passed over for a while then.
    """
    refusal = _current(record, generation) or _is_primary(record, host)
    if refusal:
        return refusal
    if record.phase is not Phase.SEEDING:
        return Refusal("wrong-phase", f"{record.vm} is {record.phase}, not seeding")
    return _next(
        record,
        phase=Phase.UNPROTECTED,
        backup=None,
        handover=False,
        backup_wanted=record.policy.reprotect == "auto",
        setbacks=record.setbacks if setback is None else _with_setback(record, setback),
    )


def claim(
    record: ProtectionRecord,
    *,
    host: HostId,
    generation: Generation,
    stamp: ClaimStamp,
    reason: ClaimReason,
    now_seconds: float,
) -> Outcome:
    """Let `host` go on alone from `generation` to the next, if it may.

    A retry of a claim that was won already returns the record unchanged; it may be at a later
    generation by then.
    """
    stamp = stamp.model_copy(update={"generation": generation + 1})
    if record.claimed == stamp:
        return record
    refusal = _current(record, generation)
    if refusal:
        return refusal
    refusal = _may_claim(record, host, reason)
    if refusal:
        return refusal
    ended = reason is ClaimReason.GUEST_ENDED
    lost_while_seeding = record.phase is Phase.SEEDING and not ended
    lost_backup = record.backup is not None and reason is not ClaimReason.HANDOVER
    return _next(
        record,
        phase=Phase.ENDED if ended else Phase.UNPROTECTED,
        primary=host,
        backup=None,
        claimed=stamp,
        handover=False,
        backup_wanted=record.policy.reprotect == "auto" if lost_backup else record.backup_wanted,
        setbacks=_with_setback(record, reason) if lost_while_seeding else record.setbacks,
        unprotected_since=record.unprotected_since or now_seconds,
    )


def request_handover(record: ProtectionRecord, to: HostId | None) -> Outcome:
    """Ask the primary to hand over to its backup. Idempotent."""
    if record.phase is not Phase.PROTECTED:
        return Refusal(
            "wrong-phase", f"{record.vm} is {record.phase}; a switchover needs it protected"
        )
    if to is not None and to != record.backup:
        return Refusal(
            "not-the-backup", f"{to} is not the backup of {record.vm}: {record.backup} is"
        )
    return record.model_copy(update={"handover": True})


def change_policy(record: ProtectionRecord, policy: Policy, policy_name: str | None) -> Outcome:
    """Replace the policy while running; roles stay as they are."""
    if record.phase not in LIVE:
        return Refusal("wrong-phase", f"{record.vm} is {record.phase}")
    wanted = record.backup_wanted or policy.reprotect == "auto"
    return record.model_copy(
        update={"policy": policy, "policy_name": policy_name, "backup_wanted": wanted}
    )


def want_backup(record: ProtectionRecord) -> Outcome:
    """The operator asks for a backup again, after one was lost under `reprotect: manual`."""
    if record.phase not in LIVE:
        return Refusal("wrong-phase", f"{record.vm} is {record.phase}")
    return record.model_copy(update={"backup_wanted": True})


def note_placement(record: ProtectionRecord, note: PlacementNote) -> Outcome:
    """Remember a search that found no host, so that the reasons can be shown."""
    if record.phase is not Phase.UNPROTECTED:
        return Refusal("wrong-phase", f"{record.vm} is {record.phase}, not unprotected")
    return record.model_copy(update={"placement": note})


def release(record: ProtectionRecord) -> Outcome:
    """Stop protecting. The VM keeps running on its primary; everybody else lets go."""
    if record.phase in (Phase.RELEASING, Phase.RETIRED):
        return record
    if record.phase is Phase.ENDED:
        return record.model_copy(update={"phase": Phase.RETIRED})
    return _next(record, phase=Phase.RELEASING, backup=None, handover=False)


def retire(record: ProtectionRecord, host: HostId, generation: Generation) -> Outcome:
    """The primary has taken its plugs out. Idempotent."""
    refusal = _current(record, generation) or _is_primary(record, host)
    if refusal:
        return refusal
    if record.phase is Phase.RETIRED:
        return record
    if record.phase is not Phase.RELEASING:
        return Refusal("wrong-phase", f"{record.vm} is {record.phase}, not releasing")
    return record.model_copy(update={"phase": Phase.RETIRED})


def lose(record: ProtectionRecord, generation: Generation) -> Outcome:
    """Every host that could go on is back without the VM: it is lost.

    The caller has the evidence; a claim that is still under way is of an older generation then.
    """
    refusal = _current(record, generation)
    if refusal:
        return refusal
    if record.phase not in LIVE:
        return Refusal("wrong-phase", f"{record.vm} is {record.phase}")
    return _next(record, phase=Phase.ENDED, backup=None, handover=False)


def _may_claim(record: ProtectionRecord, host: HostId, reason: ClaimReason) -> Refusal | None:
    if record.phase not in LIVE:
        return Refusal("wrong-phase", f"{record.vm} is {record.phase}")
    role = record.role_of(host)
    if role is Role.NONE:
        return Refusal("not-your-role", f"{host} has no role in {record.vm}")
    if role is Role.BACKUP and record.phase is not Phase.PROTECTED:  # INV-7
        return Refusal("wrong-phase", f"a backup may not claim while {record.phase}")
    if role is Role.BACKUP and reason is ClaimReason.GUEST_ENDED:
        return Refusal("not-your-role", "only the primary can know that the guest ended")
    if role is Role.PRIMARY and reason in (ClaimReason.HANDOVER, ClaimReason.VM_FAILED):
        return Refusal("not-your-role", f"only a backup claims for {reason}")
    return None


def _next(record: ProtectionRecord, **changes: object) -> ProtectionRecord:
    """Return the successor in the next generation; the stamp of the last claim stays."""
    fields = dict(record) | {"generation": record.generation + 1} | changes
    return ProtectionRecord.model_validate(fields)


def _claim_of(previous: ProtectionRecord | None, primary: HostId) -> ClaimStamp | None:
    """Return the stamp that a new protection inherits: of the claim that `primary` won before."""
    if previous is None or previous.claimed is None or previous.claimed.host != primary:
        return None
    return previous.claimed


def _with_setback(record: ProtectionRecord, reason: str) -> tuple[Setback, ...]:
    """Return the setbacks with one more of the present backup, the latest last."""
    assert record.backup is not None, record
    count = 1 + sum(s.count for s in record.setbacks if s.host == record.backup)
    others = [s for s in record.setbacks if s.host != record.backup]
    latest = Setback(host=record.backup, count=count, reason=str(reason))
    return (*others[-(SETBACKS_KEPT - 1) :], latest)


def _current(record: ProtectionRecord, generation: Generation) -> Refusal | None:
    if record.generation == generation:
        return None
    return Refusal(
        "stale-generation",
        f"{record.vm} is at generation {record.generation}, not {generation}",
    )


def _is_primary(record: ProtectionRecord, host: HostId) -> Refusal | None:
    if record.primary == host:
        return None
    return Refusal(
        "not-your-role", f"{host} is not the primary of {record.vm}: {record.primary} is"
    )
