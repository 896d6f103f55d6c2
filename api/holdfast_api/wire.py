"""What both clients need around httpx: URLs, timeouts, whole bodies with a limit.

Touches httpx objects given by its callers, opens nothing.
"""

import ssl
import time

import httpx
from pydantic import BaseModel

from holdfast_api.exchange import ANSWER_BYTES_MAX, Answer, Attempt

CONNECT_SECONDS_MAX = 1.0
"""A host that does not answer a connection in this time is passed over; far above any LAN's."""
PAUSE_SECONDS_MIN = 0.02
PAUSE_SECONDS_MAX = 0.5
"""Distance of rounds through the controllers: doubles from the first to the second."""

Verify = ssl.SSLContext | bool
STALE = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)
"""What a request meets on a kept connection that the controller had closed."""


def url_of(attempt: Attempt, path: str) -> str:
    """Return the whole URL of a path below `/v1`."""
    return f"{attempt.url}/v1{path}"


def json_of(body: BaseModel | None) -> bytes | None:
    """Return the request's body."""
    return None if body is None else body.model_dump_json().encode()


def headers_of(body: BaseModel | None) -> dict[str, str]:
    """Return the request's headers."""
    return {} if body is None else {"content-type": "application/json"}


def positive(timeout_seconds: float) -> float:
    """Return a timeout that leaves time for an answer, or raise `ValueError`."""
    if timeout_seconds <= 0:
        raise ValueError(f"a timeout of {timeout_seconds} s leaves no time for an answer")
    return timeout_seconds


def timeout_of(seconds: float, *, silence_seconds: float | None = None) -> httpx.Timeout:
    """Return httpx's limits for each step; the whole is limited by the caller."""
    return httpx.Timeout(
        seconds, connect=min(seconds, CONNECT_SECONDS_MAX), read=silence_seconds or seconds
    )


def read_whole(response: httpx.Response, deadline_seconds: float) -> Answer:
    """Read the whole body; one that only drips in ends one read after the deadline."""
    parts: list[bytes] = []
    size_bytes = 0
    for part in response.iter_bytes():
        size_bytes = checked_size(size_bytes + len(part))
        parts.append(part)
        if time.monotonic() > deadline_seconds:
            raise httpx.ReadTimeout("the answer took too long")
    return answer_of(response, parts)


def answer_of(response: httpx.Response, parts: list[bytes]) -> Answer:
    """Return the answer whose body came in `parts`."""
    content_type = response.headers.get("content-type", "")
    return Answer(response.status_code, content_type, b"".join(parts))


def checked_size(size_bytes: int) -> int:
    """Return the size of a body so far, or raise what httpx raises for an unreadable one."""
    if size_bytes > ANSWER_BYTES_MAX:
        raise httpx.DecodingError(f"the answer is larger than {ANSWER_BYTES_MAX} bytes")
    return size_bytes
