"""The events: listed, or followed as server-sent events. Route `/v1/events`.

A follower reads the log by position, so it needs no queue and can not hold anything up: it gets
what is kept after its position, then waits. It resumes with `Last-Event-ID` (what browsers send by
themselves) or `after`. It ends when the client hangs up or the controller stops.
"""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Query, Response
from fastapi.responses import JSONResponse, StreamingResponse

from holdfast_api.messages import EventList
from holdfast_api.records import Event
from holdfast_controller.control import Control
from holdfast_controller.http.context import TheControl
from holdfast_controller.http.problems import RESPONSES

KEEP_ALIVE_SECONDS = 10.0
BATCH = 100
LIST_MAX = 1000

router = APIRouter(prefix="/v1", responses=RESPONSES, tags=["events"])


@router.get(
    "/events",
    response_model=EventList,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def get_events(
    control: TheControl,
    after: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=LIST_MAX)] = LIST_MAX,
    follow: bool = False,  # noqa: FBT001, FBT002 - a query parameter
    last_event_id: Annotated[int | None, Header(ge=0)] = None,
) -> Response:
    """Return events later than `after`, the oldest first; with `follow=true` go on for ever."""
    control.world.require_live()
    if not follow:
        events = EventList(events=tuple(control.world.events.after(after, limit)))
        return JSONResponse(events.model_dump(mode="json"))
    control.followers.require_one()
    return StreamingResponse(
        _follow(control, after if last_event_id is None else last_event_id),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _follow(control: Control, position: int) -> AsyncIterator[str]:
    with control.followers.occupy():
        yield ": events follow\n\n"
        while not control.world.signals.closed:
            events = control.world.events.after(position, BATCH)
            for event in events:
                yield _sent(event)
                position = event.position
            if not events and not await _more(control, position):
                yield ": still here\n\n"


async def _more(control: Control, position: int) -> bool:
    """Wait for an event later than `position`; False after a while without."""
    events = control.world.events
    return await control.world.signals.wait(
        "events", lambda: events.reaches(position), KEEP_ALIVE_SECONDS
    )


def _sent(event: Event) -> str:
    return f"id: {event.position}\nevent: {event.kind}\ndata: {event.model_dump_json()}\n\n"
