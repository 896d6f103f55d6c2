"""Every error as an RFC 9457 problem document with a stable code. Touches nothing but answers.

The last handler is an outermost net: a fault of ours becomes `internal`, without its details (they
are in the log), and the process goes on serving.
"""

import logging
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from holdfast_api.errors import PROBLEMS, HoldfastError, Problem

MEDIA_TYPE = "application/problem+json"
FAULTS_MAX = 100
INTERNAL = "the controller made a mistake; its log has the details"

logger = logging.getLogger(__name__)

RESPONSES: dict[int | str, dict[str, Any]] = {
    "default": {
        "model": Problem,
        "description": "An RFC 9457 problem document; `code` is one of: "
        + ", ".join(f"`{code}` ({status})" for code, (status, _) in sorted(PROBLEMS.items())),
        "content": {MEDIA_TYPE: {}},
    }
}
"""What every operation may answer besides success, for OpenAPI."""


def problem_response(problem: Problem, headers: dict[str, str] | None = None) -> JSONResponse:
    """Return the HTTP answer of a problem."""
    extra = dict(headers or {})
    if problem.status == 503:  # noqa: PLR2004 - HTTP's own number
        extra.setdefault("Retry-After", "1")
    return JSONResponse(
        problem.model_dump(mode="json"),
        status_code=problem.status,
        media_type=MEDIA_TYPE,
        headers=extra,
    )


def install(app: FastAPI) -> None:
    """Make every error of `app` a problem document."""
    app.add_exception_handler(HoldfastError, _on_holdfast_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_fault)


async def _on_holdfast_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HoldfastError)
    return problem_response(error.problem)


async def _on_validation_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    faults = [_fault(found) for found in error.errors()]
    detail = f"{len(faults)} faults; each is named" if len(faults) != 1 else faults[0]
    refused = HoldfastError("invalid-request", detail, faults[:FAULTS_MAX])
    return problem_response(refused.problem)


def _fault(found: dict[str, Any]) -> str:
    message = str(found.get("msg", "is not valid"))
    if found.get("type") == "extra_forbidden":
        message = "there is no such field"
    return f"{'.'.join(str(part) for part in found.get('loc', ()))}: {message}"


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 404:  # noqa: PLR2004 - HTTP's own number
        found = HoldfastError("unknown-path", f"{request.url.path} is not a path of this API")
    elif error.status_code == 405:  # noqa: PLR2004
        allowed = headers.get("allow") or headers.get("Allow") or "other methods"
        detail = f"{request.url.path} takes {allowed}, not {request.method}"
        found = HoldfastError("method-not-allowed", detail)
    else:
        found = HoldfastError("invalid-request", str(error.detail))
    return problem_response(found.problem, headers)


async def _on_fault(request: Request, error: Exception) -> Response:
    logger.error("%s %s failed: %r", request.method, request.url.path, error)
    return problem_response(HoldfastError("internal", INTERNAL).problem)
