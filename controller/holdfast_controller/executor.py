"""Carry a plan out, without a choice left to make. Needs the store.

Every step is one compare-and-swap with its event: a step whose record has changed since the view
was taken is *overtaken* and does nothing; the next pass plans from what is there then.
"""

import logging
from collections.abc import Callable

from holdfast_controller.adapters.keys import HostEntry
from holdfast_controller.adapters.store import EventDraft, Store
from holdfast_controller.core.planner import ChangeProtection, NoteHost, Plan, Step
from holdfast_controller.metrics import Metrics

logger = logging.getLogger(__name__)


async def execute(
    store: Store, plan: Plan, metrics: Metrics, *, may_go_on: Callable[[], bool] = lambda: True
) -> list[str]:
    """Carry out `plan`; return what was done, as sentences. Raises Unavailable in the middle.

    Asks `may_go_on` before each step, and leaves the rest undone at the first no.
    """
    done: list[str] = []
    for step in plan.steps:
        if not may_go_on():
            break
        if await _carry_out(store, step):
            metrics.planner_steps.labels(step.kind).inc()
            done.append(step.message)
        else:
            metrics.planner_steps.labels("overtaken").inc()
    return done


async def _carry_out(store: Store, step: Step) -> bool:
    match step:
        case ChangeProtection():
            draft = EventDraft(
                step.kind,
                step.message,
                vm=step.vm,
                host=step.host,
                generation=step.successor.generation,
            )
            return await store.swap(step.vm, step.expected_revision, step.successor, draft)
        case NoteHost():
            entry = HostEntry(settings=step.settings, present=step.present)
            draft = EventDraft(step.kind, step.message, host=step.host)
            revision = await store.store_host(step.host, step.expected_revision, entry, draft)
            return revision is not None
