"""Small worlds for planner tests: hosts, VMs and records in a few words."""

from typing import Any

from holdfast_api.records import (
    HostFacts,
    HostSettings,
    PlacementNote,
    Policy,
    ProtectionRecord,
    VmFacts,
    WorkerReport,
)
from holdfast_api.words import Phase, Role
from holdfast_controller.core.view import (
    HeartbeatView,
    Held,
    HostView,
    PolicyView,
    ProtectionView,
    View,
)

MEBIBYTE = 1024**2
RECORD_REVISION = 10
LATER = 20


def vm_facts(vm: str = "vm", **changes: Any) -> VmFacts:
    fields: dict[str, Any] = {
        "vm": vm,
        "running": True,
        "memory_bytes": 256 * MEBIBYTE,
        "vcpus": 1,
        "machine_type": "pc-q35-7.2",
        "qemu_version": "7.2.22",
        "accelerator": "tcg",
        "bridges": ("br0",),
        "pid": 1,
    }
    return VmFacts.model_validate(fields | changes)


def heartbeat(
    *vms: VmFacts,
    held: tuple[Held, ...] = (),
    workers: tuple[WorkerReport, ...] = (),
    revision: int = LATER,
    **changes: Any,
) -> HeartbeatView:
    facts: dict[str, Any] = {
        "peer_address": "host:7001",
        "memory_total_bytes": 4096 * MEBIBYTE,
        "memory_available_bytes": 1024 * MEBIBYTE,
        "qemu_version": "7.2.22",
        "machine_types": ("pc-q35-7.2",),
        "accelerators": ("tcg",),
        "bridges": ("br0", "br1"),
        "agent_version": "0.1.0",
    }
    return HeartbeatView(
        revision=revision,
        facts=HostFacts.model_validate(facts | changes),
        vms={each.vm: each for each in vms},
        workers={each.vm: each for each in workers},
        held={each.vm: each for each in held},
    )


def host(
    name: str,
    beat: HeartbeatView | None,
    *,
    maintenance: bool = False,
    present: bool | None = None,
    **labels: str,
) -> HostView:
    return HostView(
        host=name,
        settings=HostSettings(labels=labels, maintenance=maintenance),
        settings_revision=5,
        present=beat is not None if present is None else present,
        heartbeat=beat,
    )


def record(phase: Phase = Phase.UNPROTECTED, vm: str = "vm", **changes: Any) -> ProtectionRecord:
    fields: dict[str, Any] = {
        "vm": vm,
        "generation": 3,
        "phase": phase,
        "primary": "h1",
        "backup": "h2" if phase in (Phase.SEEDING, Phase.PROTECTED) else None,
        "policy": Policy(),
        "unprotected_since": 1.0,
    }
    return ProtectionRecord.model_validate(fields | changes)


def policy(**placement: Any) -> Policy:
    return Policy.model_validate({"placement": placement})


def view(
    hosts: list[HostView],
    records: list[ProtectionRecord],
    *,
    now: float = 0.0,
    since: float = 0.0,
    policies: dict[str, Policy] | None = None,
) -> View:
    return View(
        revision=LATER,
        now_seconds=now,
        hosts={each.host: each for each in hosts},
        protections={r.vm: ProtectionView(r, RECORD_REVISION, since) for r in records},
        policies={name: PolicyView(p, 1) for name, p in (policies or {}).items()},
    )


def standby(vm: str = "vm", generation: int = 2) -> Held:
    return Held(vm, generation, Role.BACKUP)


def reasons(note: PlacementNote | None) -> dict[str, str]:
    assert note is not None
    return {rejection.host: rejection.reason for rejection in note.rejections}
