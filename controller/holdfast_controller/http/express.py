"""What a thousand agents ask all the time, answered without the framework. ASGI.

Heartbeats, polls and claims are nearly all of a controller's requests, and the framework takes
several times the processor time of what is asked. So a request that is exactly one of these three
is handed to its route's function directly. Everything else, and whatever does not validate, goes on
to the application: what is refused is refused in one place, with the same words.
"""

import re
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from starlette.types import ASGIApp, Receive, Scope, Send

from holdfast_api.errors import HoldfastError
from holdfast_api.messages import Claim, Heartbeat
from holdfast_api.words import NAME_PATTERN
from holdfast_controller.control import Control
from holdfast_controller.http import agents
from holdfast_controller.http.limits import BODY
from holdfast_controller.http.problems import INTERNAL, problem_response

CLAIMS = "/v1/agent/claims"
HEARTBEAT = "/v1/agent/hosts/{host}/heartbeat"
ASSIGNMENTS = "/v1/agent/hosts/{host}/assignments"
_OF_HOST = re.compile(
    f"/v1/agent/hosts/(?P<host>{NAME_PATTERN[1:-1]})/(?P<what>heartbeat|assignments)"
)
_POLL = re.compile(rb"after=([0-9]{1,18})&wait_ms=([0-9]{1,6})")
_JSON = (b"content-type", b"application/json")


@dataclass(frozen=True)
class Route:
    """Which route a request has taken, for who counts them."""

    path: str


_Answer = Coroutine[Any, Any, BaseModel]
_Met = tuple[str, _Answer]


class Express:
    """Answer agents' frequent requests; pass on all others."""

    def __init__(self, app: ASGIApp, control: Control) -> None:
        """Wrap `app`, which must be inside of `limits.BodyLimit`."""
        self._app = app
        self._control = control

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        met = self._meet(scope) if scope["type"] == "http" else None
        if met is None:
            await self._app(scope, receive, send)
            return
        path, answer = met
        scope["route"] = Route(path)
        try:
            body = (await answer).model_dump_json().encode()
        except HoldfastError as error:
            await problem_response(error.problem)(scope, receive, send)
            return
        except Exception:
            fault = HoldfastError("internal", INTERNAL)
            await problem_response(fault.problem)(scope, receive, send)
            raise  # to the server, which logs it and goes on
        headers = [_JSON, (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _meet(self, scope: Scope) -> _Met | None:
        """Return the route of a request that is one of ours, and its answer to be awaited."""
        asked = _OF_HOST.fullmatch(scope["path"])
        host, what = (asked["host"], asked["what"]) if asked is not None else ("", scope["path"])
        try:
            match scope["method"], what:
                case "POST", "heartbeat" if _JSON in scope["headers"]:
                    heartbeat = Heartbeat.model_validate_json(scope[BODY])
                    return HEARTBEAT, agents.hear_heartbeat(host, heartbeat, self._control)
                case "GET", "assignments":
                    return self._meet_poll(host, scope["query_string"])
                case "POST", "/v1/agent/claims" if _JSON in scope["headers"]:
                    claim = Claim.model_validate_json(scope[BODY])
                    return CLAIMS, agents.claim(claim, self._control)
                case _:
                    return None
        except ValidationError:
            return None

    def _meet_poll(self, host: str, query: bytes) -> _Met | None:
        poll = _POLL.fullmatch(query)
        if poll is None or int(poll[2]) > agents.WAIT_MS_MAX:
            return None
        answer = agents.get_assignments(host, self._control, int(poll[1]), int(poll[2]))
        return ASSIGNMENTS, answer
