"""What surrounds every request: a limit on its body, and its time in the metrics. ASGI.

A body is read whole before the application sees the request, because every body here is a small
JSON document; a slow or endless one is refused by size or by deadline.
"""

import asyncio
import time
from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from holdfast_api.errors import HoldfastError
from holdfast_controller.http.problems import problem_response
from holdfast_controller.metrics import Metrics

BODY_BYTES_MAX = 1024 * 1024
BODY_SECONDS_MAX = 10.0
BODY = "holdfast.body"
"""Where `BodyLimit` leaves the body in the scope, for who needs it before the application does."""


class _Gone(Exception):  # noqa: N818 - an outcome
    """The client hung up before its request was complete."""


class BodyLimit:
    """Refuse bodies that are too large or take too long."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap `app`."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body, then pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(BODY_SECONDS_MAX):
                body = await _read(receive)
        except _Gone:
            return
        except TimeoutError:
            detail = f"the body was not complete after {BODY_SECONDS_MAX:.0f} s"
            await _refuse("invalid-request", detail, scope, receive, send)
            return
        if body is None:
            detail = f"a body may have at most {BODY_BYTES_MAX} bytes"
            await _refuse("too-large", detail, scope, receive, send)
            return
        scope[BODY] = body
        await self._app(scope, _replay(body, receive), send)


async def _read(receive: Receive) -> bytes | None:
    """Return the whole body, None if it is too large."""
    parts: list[bytes] = []
    size_bytes = 0
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        part: bytes = message.get("body", b"")
        size_bytes += len(part)
        if size_bytes > BODY_BYTES_MAX:
            return None
        parts.append(part)
        more = message.get("more_body", False)
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _refuse(code: str, detail: str, scope: Scope, receive: Receive, send: Send) -> None:
    # What is left of the body is not read: the connection can not be used again.
    response = problem_response(HoldfastError(code, detail).problem, {"Connection": "close"})
    await response(scope, receive, send)


class Timing:
    """Count every request and how long it took, by route."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        """Wrap `app`; count in `metrics`."""
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and note its status."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.perf_counter()
        status = "500"

        async def noting(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            route = getattr(scope.get("route"), "path", "(none)")
            method = scope["method"] if route != "(none)" else "(any)"
            labels = self._metrics.requests.labels(method, route, status)
            labels.observe(time.perf_counter() - begun)
