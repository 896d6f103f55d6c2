"""What people and their tools ask: hosts, VMs, protections, policies. Routes under `/v1`.

Answers come from the world in memory, which is refused while the store is out of reach; changes go
through the store, and return when this controller's own world shows them, so that whoever changes
something reads it back here.
"""

from typing import Annotated

from fastapi import APIRouter, Body

from holdfast_api import transitions
from holdfast_api.errors import Refused
from holdfast_api.messages import (
    HostList,
    HostPatch,
    PolicyList,
    PolicyPatch,
    Preflight,
    ProtectRequest,
    SwitchoverRequest,
    VmList,
)
from holdfast_api.records import (
    DEFAULT_POLICY_NAME,
    Host,
    HostSettings,
    Policy,
    Protection,
    ProtectionRecord,
    StoredPolicy,
    Vm,
)
from holdfast_api.transitions import LIVE, Outcome
from holdfast_api.words import EventKind, HostId, Phase, PolicyName, Severity, VmId
from holdfast_controller.adapters.etcd import Compare
from holdfast_controller.adapters.keys import Kind, key_of
from holdfast_controller.adapters.store import Changed, EventDraft, compare
from holdfast_controller.control import Control
from holdfast_controller.core.planner import effective_policy
from holdfast_controller.http import answers
from holdfast_controller.http.context import TheControl
from holdfast_controller.http.problems import RESPONSES

router = APIRouter(prefix="/v1", responses=RESPONSES)


# --- hosts ----------------------------------------------------------------------------------------


@router.get("/hosts", tags=["hosts"])
async def list_hosts(control: TheControl) -> HostList:
    """List every host that was ever seen."""
    control.world.require_live()
    view = control.world.present
    return HostList(
        hosts=tuple(_host(control, name) for name in sorted(view.hosts)),
    )


@router.get("/hosts/{host}", tags=["hosts"])
async def get_host(host: HostId, control: TheControl) -> Host:
    """Show one host."""
    _require_host(control, host)
    return _host(control, host)


@router.patch("/hosts/{host}", tags=["hosts"])
async def patch_host(host: HostId, patch: HostPatch, control: TheControl) -> Host:
    """Change labels (null removes one) and maintenance; what is left out stays."""
    _require_host(control, host)

    def decide(settings: HostSettings) -> HostSettings:
        labels = dict(settings.labels) | (patch.labels or {})
        kept = {key: value for key, value in labels.items() if value is not None}
        if len(kept) > LABELS_MAX:
            raise Refused("invalid-request", f"a host has at most {LABELS_MAX} labels")
        maintenance = settings.maintenance if patch.maintenance is None else patch.maintenance
        return HostSettings(labels=kept, maintenance=maintenance)

    message = f"the settings of {host} were changed"
    _, revision = await control.store.change_host(host, decide, message)
    await control.world.reached(revision)
    _require_host(control, host)
    return _host(control, host)


LABELS_MAX = 64


def _require_host(control: Control, host: HostId) -> None:
    control.world.require_live()
    if host not in control.world.present.hosts:
        raise Refused("unknown-host", f"no agent of {host} was ever heard; see the list of hosts")


def _host(control: Control, host: HostId) -> Host:
    return answers.host_answer(control.world.present, host, control.world.vms_of(host))


# --- VMs ------------------------------------------------------------------------------------------


@router.get("/vms", tags=["vms"])
async def list_vms(control: TheControl) -> VmList:
    """List every VM that a living host reports or that is protected."""
    control.world.require_live()
    view, now = control.world.present, control.store.now_seconds()
    found = (answers.vm_answer(view, name, now) for name in answers.vm_names(view))
    return VmList(vms=tuple(vm for vm in found if vm is not None))


@router.get("/vms/{vm}", tags=["vms"])
async def get_vm(vm: VmId, control: TheControl) -> Vm:
    """Show one VM."""
    control.world.require_live()
    found = answers.vm_answer(control.world.present, vm, control.store.now_seconds())
    if found is None:
        raise _unknown_vm(vm)
    return found


@router.get("/vms/{vm}/preflight", tags=["vms"])
async def get_preflight(vm: VmId, control: TheControl) -> Preflight:
    """Say what stands against protecting the VM; touches nothing."""
    control.world.require_live()
    found = answers.preflight_answer(control.world.present, vm)
    if found is None:
        raise _unknown_vm(vm)
    return found


def _unknown_vm(vm: VmId) -> Refused:
    return Refused("unknown-vm", f"no living host reports {vm}; see the list of VMs")


# --- protections ----------------------------------------------------------------------------------


@router.put("/vms/{vm}/protection", status_code=202, tags=["protections"])
async def protect(
    vm: VmId,
    control: TheControl,
    request: Annotated[ProtectRequest | None, Body()] = None,
) -> Protection:
    """Protect a VM, or change the policy under which it is protected. Idempotent."""
    control.world.require_live()
    name, policy, conditions = await _wanted_policy(control, request or ProtectRequest())
    primary = _primary_to_be(control, vm)

    def decide(record: ProtectionRecord | None) -> Outcome:
        if record is not None and record.phase in LIVE:
            changed = transitions.change_policy(record, policy, name)
            assert isinstance(changed, ProtectionRecord), changed
            return transitions.want_backup(changed)
        if primary is None:
            raise _unknown_vm(vm)
        _require_preflight(control, vm)
        return transitions.begin(
            vm=vm,
            primary=primary,
            policy=policy,
            policy_name=name,
            previous=record,
            now_seconds=control.store.now_seconds(),
        )

    def describe(before: ProtectionRecord | None, after: ProtectionRecord) -> EventDraft:
        if before is not None and before.generation == after.generation:
            return _draft(EventKind.PROTECTION_CHANGED, after, f"the policy of {vm} was changed")
        message = f"{vm} is to be protected; it runs on {after.primary}"
        return _draft(EventKind.PROTECTION_REQUESTED, after, message)

    changed = await control.store.change(vm, decide, describe, also=conditions)
    return await _protection(control, changed)


@router.get("/vms/{vm}/protection", tags=["protections"])
async def get_protection(vm: VmId, control: TheControl) -> Protection:
    """Show the protection: its record, its figures, and why it is not protected if it is not."""
    control.world.require_live()
    view = control.world.present
    record = view.record(vm)
    if record is None or record.phase is Phase.RETIRED:
        raise _not_protected(control, vm)
    return answers.protection_answer(view, record, control.store.now_seconds())


@router.patch("/vms/{vm}/protection", tags=["protections"])
async def patch_protection(vm: VmId, patch: PolicyPatch, control: TheControl) -> Protection:
    """Change fields of the policy while running; from then on the policy is the VM's own."""
    control.world.require_live()
    wanted = patch.model_dump(exclude_none=True)

    def decide(record: ProtectionRecord | None) -> Outcome:
        if record is None or record.phase is Phase.RETIRED:
            raise _not_protected(control, vm)
        if all(getattr(record.policy, field) == value for field, value in wanted.items()):
            return record
        fields = record.policy.model_dump() | wanted
        if fields["min_interval_ms"] > fields["interval_ms"]:
            raise Refused(
                "invalid-request",
                f"min_interval_ms ({fields['min_interval_ms']}) must not exceed "
                f"interval_ms ({fields['interval_ms']})",
            )
        return transitions.change_policy(record, Policy.model_validate(fields), None)

    def describe(_before: ProtectionRecord | None, after: ProtectionRecord) -> EventDraft:
        what = ", ".join(f"{field}={value}" for field, value in wanted.items())
        return _draft(EventKind.PROTECTION_CHANGED, after, f"the policy of {vm} has now {what}")

    return await _protection(control, await control.store.change(vm, decide, describe))


@router.delete("/vms/{vm}/protection", status_code=202, tags=["protections"])
async def unprotect(vm: VmId, control: TheControl) -> Protection:
    """Stop protecting; the VM runs on where it runs. Idempotent while it is being released."""
    control.world.require_live()

    def decide(record: ProtectionRecord | None) -> Outcome:
        if record is None or record.phase is Phase.RETIRED:
            raise _not_protected(control, vm)
        return transitions.release(record)

    def describe(_before: ProtectionRecord | None, after: ProtectionRecord) -> EventDraft:
        if after.phase is Phase.RETIRED:
            return _draft(EventKind.PROTECTION_RELEASED, after, f"{vm} is released")
        return _draft(EventKind.PROTECTION_CHANGED, after, f"{vm} is being released")

    return await _protection(control, await control.store.change(vm, decide, describe))


@router.post("/vms/{vm}/switchover", status_code=202, tags=["protections"])
async def switch_over(
    vm: VmId,
    control: TheControl,
    request: Annotated[SwitchoverRequest | None, Body()] = None,
) -> Protection:
    """Ask the primary to hand the VM over to its backup after its next checkpoint. Idempotent."""
    control.world.require_live()
    to = None if request is None else request.to

    def decide(record: ProtectionRecord | None) -> Outcome:
        if record is None or record.phase is Phase.RETIRED:
            raise _not_protected(control, vm)
        if record.phase is Phase.UNPROTECTED:
            raise Refused("no-backup", f"{vm} has no backup to switch over to")
        outcome = transitions.request_handover(record, to)
        if isinstance(outcome, ProtectionRecord):
            _require_ready_target(control, outcome)
        return outcome

    def describe(_before: ProtectionRecord | None, after: ProtectionRecord) -> EventDraft:
        message = f"{vm} is to move from {after.primary} to {after.backup}"
        return _draft(EventKind.SWITCHOVER_REQUESTED, after, message)

    return await _protection(control, await control.store.change(vm, decide, describe))


async def _wanted_policy(
    control: Control, request: ProtectRequest
) -> tuple[PolicyName | None, Policy, tuple[Compare, ...]]:
    """Return name, policy, and the condition that the named policy is still the one that was read.

    Without the condition a protection could begin under a policy that was removed meanwhile.
    """
    if request.policy is not None:
        if request.policy_name is not None:
            raise Refused("invalid-request", "give policy_name or policy, not both")
        return None, request.policy, ()
    name = request.policy_name or DEFAULT_POLICY_NAME
    policy, revision = await control.store.read_policy(name)
    if policy is None:
        if name != DEFAULT_POLICY_NAME:
            raise Refused("unknown-policy", f"there is no policy {name}; see the list of policies")
        policy = Policy()
    return name, policy, (compare(key_of(Kind.POLICIES, name), revision),)


def _primary_to_be(control: Control, vm: VmId) -> HostId | None:
    found = answers.locate(control.world.present, vm)
    return None if found is None else found[0]


def _require_preflight(control: Control, vm: VmId) -> None:
    preflight = answers.preflight_answer(control.world.present, vm)
    if preflight is None:
        raise _unknown_vm(vm)
    if not preflight.protectable:
        blocking = [i for i in preflight.issues if i.severity is Severity.BLOCKING]
        raise Refused(
            "preflight-failed",
            f"{vm} can not be protected as it is; nothing was touched",
            [f"{issue.code}: {issue.message}" for issue in blocking],
        )


def _require_ready_target(control: Control, record: ProtectionRecord) -> None:
    assert record.backup is not None, record
    backup = control.world.present.hosts.get(record.backup)
    if backup is None or not backup.alive:
        raise Refused("host-not-alive", f"{record.backup} does not answer")
    if backup.settings.maintenance:
        raise Refused("host-in-maintenance", f"{record.backup} takes no VM now")


def _not_protected(control: Control, vm: VmId) -> Refused:
    if vm not in answers.vm_names(control.world.present):
        return _unknown_vm(vm)
    return Refused("not-protected", f"{vm} is not protected")


def _draft(kind: EventKind, record: ProtectionRecord, message: str) -> EventDraft:
    return EventDraft(
        kind, message, vm=record.vm, host=record.primary, generation=record.generation
    )


async def _protection(control: Control, changed: Changed) -> Protection:
    await control.world.reached(changed.revision)
    now = control.store.now_seconds()
    return answers.protection_answer(control.world.present, changed.record, now)


# --- policies -------------------------------------------------------------------------------------


@router.get("/policies", tags=["policies"])
async def list_policies(control: TheControl) -> PolicyList:
    """List the stored policies and the built-in one, `default`."""
    control.world.require_live()
    view = control.world.present
    names = sorted({DEFAULT_POLICY_NAME, *view.policies})
    return PolicyList(policies=tuple(_stored_policy(control, name) for name in names))


@router.get("/policies/{name}", tags=["policies"])
async def get_policy(name: PolicyName, control: TheControl) -> StoredPolicy:
    """Show one policy."""
    control.world.require_live()
    return _stored_policy(control, name)


@router.put("/policies/{name}", tags=["policies"])
async def put_policy(name: PolicyName, policy: Policy, control: TheControl) -> StoredPolicy:
    """Store a policy; protections under it follow. `default` may be replaced too. Idempotent."""
    control.world.require_live()
    revision = await control.store.store_policy(name, policy)
    await control.world.reached(revision)
    return StoredPolicy(name=name, policy=policy)


@router.delete("/policies/{name}", status_code=204, tags=["policies"])
async def delete_policy(name: PolicyName, control: TheControl) -> None:
    """Remove a policy that no protection uses; a replaced `default` is the built-in one again."""
    control.world.require_live()
    _stored_policy(control, name)
    users = _users_of(control, name)
    if users and name != DEFAULT_POLICY_NAME:
        raise Refused("policy-in-use", f"{name} protects {', '.join(users[:10])}", users[:100])
    revision = await control.store.remove_policy(name)
    if revision is not None:
        await control.world.reached(revision)


def _users_of(control: Control, name: PolicyName) -> list[VmId]:
    known = control.world.present.protections.values()
    return sorted(
        k.record.vm for k in known if k.record.policy_name == name and k.record.phase in LIVE
    )


def _stored_policy(control: Control, name: PolicyName) -> StoredPolicy:
    policy = effective_policy(control.world.present, name)
    if policy is None:
        raise Refused("unknown-policy", f"there is no policy {name}; see the list of policies")
    return StoredPolicy(name=name, policy=policy)
