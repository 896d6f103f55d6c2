"""What agents say and ask: heartbeats, assignments, claims, reports. Routes under `/v1/agent`.

Level-triggered: a heartbeat's answer and the long poll both carry the full set of the host's
orders. Whoever asks again after a lost answer is told the same.
"""

from typing import Annotated

from fastapi import APIRouter, Query

from holdfast_api import transitions
from holdfast_api.errors import Refused
from holdfast_api.messages import (
    Assignment,
    Assignments,
    Claim,
    ClaimVerdict,
    EventReport,
    Heartbeat,
    HeartbeatAnswer,
    RecordAnswer,
    ReleasedReport,
    SeededReport,
    SeedingFailedReport,
)
from holdfast_api.records import Event, ProtectionRecord
from holdfast_api.transitions import Outcome
from holdfast_api.words import EventKind, HostId, VmId
from holdfast_controller.adapters.store import Decide, Describe, EventDraft
from holdfast_controller.claims import decide_claim
from holdfast_controller.control import Control
from holdfast_controller.http.answers import assignments_for
from holdfast_controller.http.context import TheControl
from holdfast_controller.http.problems import RESPONSES

WAIT_MS_MAX = 30_000

router = APIRouter(prefix="/v1/agent", responses=RESPONSES, tags=["agents"])


@router.post("/hosts/{host}/heartbeat")
async def hear_heartbeat(
    host: HostId, heartbeat: Heartbeat, control: TheControl
) -> HeartbeatAnswer:
    """Hear that a host lives and what it has; answer with all its orders."""
    world = control.world
    world.require_live()
    async with control.beats.take():
        known, rhythm = world.known_heartbeat(host), control.rhythm()
        revision = await control.heartbeats.hear(host, heartbeat, known, rhythm)
    world.require_live()
    await world.reached(revision)
    return HeartbeatAnswer(
        position=world.orders_revision(host),
        assignments=_orders(control, host),
        beat_seconds=rhythm.beat_seconds,
    )


@router.get("/hosts/{host}/assignments")
async def get_assignments(
    host: HostId,
    control: TheControl,
    after: Annotated[int, Query(ge=0)] = 0,
    wait_ms: Annotated[int, Query(ge=0, le=WAIT_MS_MAX)] = 0,
) -> Assignments:
    """Return all orders of a host: at once if one is newer than `after`, else after `wait_ms`."""
    world = control.world
    world.require_live()
    if wait_ms and after <= world.revision:  # a position from the future: another store; answer
        control.polls.require_one()
        with control.polls.occupy():
            await world.signals.wait(
                f"host:{host}", lambda: world.orders_revision(host) > after, wait_ms / 1000
            )
        world.require_live()
    return Assignments(position=world.orders_revision(host), assignments=_orders(control, host))


@router.post("/claims")
async def claim(claim: Claim, control: TheControl) -> ClaimVerdict:
    """Decide who may go on alone. An error means: not decided; ask again with the same claim."""
    return await decide_claim(control, claim)


@router.post("/seeded")
async def seeded(report: SeededReport, control: TheControl) -> RecordAnswer:
    """Hear that output is held and the first checkpoint acknowledged: protected from now on."""

    def decide(record: ProtectionRecord | None) -> Outcome:
        return transitions.become_protected(
            _present(record, report.vm), report.host, report.generation
        )

    def describe(_before: ProtectionRecord | None, after: ProtectionRecord) -> EventDraft:
        message = f"{after.vm} is protected: {after.backup} holds its first checkpoint"
        return _draft(EventKind.PROTECTED, after, report.host, message)

    return await _changed(control, report.vm, decide, describe)


@router.post("/released")
async def released(report: ReleasedReport, control: TheControl) -> RecordAnswer:
    """Hear that a primary has taken out everything of the protection."""

    def decide(record: ProtectionRecord | None) -> Outcome:
        return transitions.retire(_present(record, report.vm), report.host, report.generation)

    def describe(_before: ProtectionRecord | None, after: ProtectionRecord) -> EventDraft:
        message = f"{after.vm} runs on {after.primary}, no longer protected"
        return _draft(EventKind.PROTECTION_RELEASED, after, report.host, message)

    return await _changed(control, report.vm, decide, describe)


@router.post("/seeding-failed")
async def seeding_failed(report: SeedingFailedReport, control: TheControl) -> RecordAnswer:
    """Hear that a backup could not be filled; another one is looked for."""

    def decide(record: ProtectionRecord | None) -> Outcome:
        return transitions.drop_seeding_backup(
            _present(record, report.vm), report.host, report.generation, setback=report.reason
        )

    def describe(before: ProtectionRecord | None, after: ProtectionRecord) -> EventDraft:
        backup = None if before is None else before.backup
        message = f"{backup} could not be filled for {after.vm}: {report.reason}"
        return _draft(EventKind.BACKUP_DROPPED, after, backup, message)

    return await _changed(control, report.vm, decide, describe)


@router.post("/events", status_code=202)
async def report_event(report: EventReport, control: TheControl) -> Event:
    """Remember something that an agent saw; asked again, it is remembered again."""
    draft = EventDraft(
        kind=report.kind,
        message=report.message,
        vm=report.vm,
        host=report.host,
        generation=report.generation,
        evidence=report.evidence,
    )
    event = await control.store.add_event(draft)
    assert event is not None, "the name was chosen at random"
    await control.world.reached(event.position)
    control.metrics.agent_events.inc()
    return event


def _present(record: ProtectionRecord | None, vm: VmId) -> ProtectionRecord:
    if record is None:
        raise Refused("not-protected", f"{vm} is not protected")
    return record


def _draft(
    kind: EventKind, record: ProtectionRecord, host: HostId | None, message: str
) -> EventDraft:
    return EventDraft(kind, message, vm=record.vm, host=host, generation=record.generation)


async def _changed(control: Control, vm: VmId, decide: Decide, describe: Describe) -> RecordAnswer:
    changed = await control.store.change(vm, decide, describe)
    return RecordAnswer(record=changed.record)


def _orders(control: Control, host: HostId) -> tuple[Assignment, ...]:
    world = control.world
    return assignments_for(world.present, host, world.vms_of(host))
