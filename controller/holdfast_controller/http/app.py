"""The application: every route, every error a problem document, limits around it all."""

import asyncio
import json

from fastapi import APIRouter, FastAPI, Response
from starlette.types import ASGIApp

import holdfast_api
from holdfast_api.errors import Unavailable
from holdfast_controller.control import Control
from holdfast_controller.http import agents, events, people, problems
from holdfast_controller.http.context import TheControl
from holdfast_controller.http.express import Express
from holdfast_controller.http.limits import BodyLimit, Timing
from holdfast_controller.metrics import CONTENT_TYPE

health = APIRouter(responses=problems.RESPONSES, tags=["health"])


@health.get("/healthz")
async def healthz() -> dict[str, str]:
    """Say that this process serves, whatever the store does."""
    return {"status": "ok"}


@health.get("/readyz")
async def readyz(control: TheControl) -> dict[str, str]:
    """Say whether this controller can decide and answer: its store does, and is followed."""
    if not control.world.live:
        raise Unavailable("store-unavailable", "the store does not answer")
    if control.store_fault:
        raise Unavailable("store-unavailable", control.store_fault)
    return {"status": "ready"}


@health.get("/metrics", response_class=Response)
async def metrics(control: TheControl) -> Response:
    """Return the metrics in Prometheus' text format."""
    view, live = control.world.snapshot(), control.world.live
    leads, kept = control.leads(), len(control.world.events)
    text = await asyncio.to_thread(
        lambda: control.metrics.exposition(view, live=live, leads=leads, events=kept)
    )
    return Response(text, media_type=CONTENT_TYPE)


def create_app(control: Control | None) -> FastAPI:
    """Make the application; without `control` it serves nothing but its OpenAPI document."""
    app = FastAPI(
        title="Holdfast",
        summary="Fault tolerance for QEMU virtual machines by continuous checkpointing.",
        version=holdfast_api.__version__,
        docs_url=None,  # would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.control = control
    for router in (agents.router, people.router, events.router, health):  # in order of use
        app.include_router(router)
    problems.install(app)
    return app


def create_server(control: Control) -> ASGIApp:
    """Make what the server calls: the application and all that surrounds it."""
    return Timing(BodyLimit(Express(create_app(control), control)), control.metrics)


def openapi_document() -> str:
    """Return the OpenAPI document as it is checked in at docs/openapi.json."""
    return json.dumps(create_app(None).openapi(), indent=2, sort_keys=True) + "\n"
