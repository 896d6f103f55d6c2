"""The asyncio client that an agent uses. Talks HTTP to one controller after the other.

As `client` says, but for `claim`, which has no deadline of its own: the worker that claims holds
its output until the answer is known, and has nothing better to do with an unknown one than to ask
again (INV-5).
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

import httpx
from pydantic import BaseModel

from holdfast_api.exchange import (
    Answer,
    Attempt,
    Controllers,
    Search,
    expect_success,
    name_segment,
    query_of,
    read_answer,
    read_claim_answer,
)
from holdfast_api.messages import (
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
from holdfast_api.records import ProtectionRecord
from holdfast_api.wire import (
    PAUSE_SECONDS_MAX,
    PAUSE_SECONDS_MIN,
    STALE,
    Verify,
    answer_of,
    checked_size,
    headers_of,
    json_of,
    positive,
    timeout_of,
    url_of,
)
from holdfast_api.words import HostId

PATIENCE_SECONDS = 1.0
"""For one controller while there are others: a heartbeat that waits longer for a controller that
hangs comes late everywhere. Low: a slow store is asked by every controller for the same thing."""
CLAIM_ATTEMPT_SECONDS_MIN = 0.25
"""First patience with one controller in a claim. Low: a slow store is asked twice for the same
thing, which is harmless. High: a hung controller lengthens a failover by so much."""
CLAIM_ATTEMPT_SECONDS_MAX = 4.0
"""The patience doubles each round up to this, so that a slow store gets to answer."""

logger = logging.getLogger(__name__)


class AgentClient:
    """Asyncio client of one host's agent. Safe for concurrent calls on one event loop.

    Keeps its connections open without limit of time, so that a claim finds the one warm that the
    heartbeats use. Owns them: use it as an async context manager, or call `aclose`.
    Every method raises `Refused` or `Unavailable`, and `claim` neither.
    """

    def __init__(
        self,
        urls: Sequence[str],
        host: HostId,
        *,
        timeout_seconds: float = 5.0,
        verify: Verify = True,
    ) -> None:
        """Take the controllers' base URLs, the host's own name and the deadline of each call.

        Raises:
            ValueError: An URL is none, or the timeout is not positive.
            Refused: `host` can not be a name.
        """
        self._controllers = Controllers(urls)
        self._host_path = f"/agent/hosts/{name_segment(host)}"
        self._timeout_seconds = positive(timeout_seconds)
        self._http = httpx.AsyncClient(
            verify=verify,
            trust_env=False,
            limits=httpx.Limits(max_keepalive_connections=None, keepalive_expiry=None),
        )

    async def __aenter__(self) -> Self:
        """Return the client itself."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close all connections."""
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def heartbeat(self, heartbeat: Heartbeat) -> HeartbeatAnswer:
        """Say that the host lives and what it has; return its full set of assignments."""
        answer = await self._call("POST", f"{self._host_path}/heartbeat", heartbeat)
        return read_answer(answer, HeartbeatAnswer)

    async def assignments(self, after: int, wait_ms: int) -> Assignments:
        """Wait up to `wait_ms` for assignments newer than `after`; return the full set.

        The deadline is `wait_ms` and the client's timeout together.
        """
        answer = await self._call(
            "GET",
            f"{self._host_path}/assignments",
            parameters=query_of(after=after, wait_ms=wait_ms),
            wait_seconds=wait_ms / 1000,
        )
        return read_answer(answer, Assignments)

    async def seeded(self, report: SeededReport) -> ProtectionRecord:
        """Report that output is plugged and the first checkpoint acknowledged. Idempotent."""
        answer = await self._call("POST", "/agent/seeded", report)
        return read_answer(answer, RecordAnswer).record

    async def released(self, report: ReleasedReport) -> ProtectionRecord:
        """Report that nothing of the protection is left on the primary. Idempotent."""
        answer = await self._call("POST", "/agent/released", report)
        return read_answer(answer, RecordAnswer).record

    async def seeding_failed(self, report: SeedingFailedReport) -> ProtectionRecord:
        """Report that the backup could not be filled; only before output was plugged."""
        answer = await self._call("POST", "/agent/seeding-failed", report)
        return read_answer(answer, RecordAnswer).record

    async def event(self, report: EventReport) -> None:
        """Have something remembered. If the first try got lost, it may show twice."""
        expect_success(await self._call("POST", "/agent/events", report))

    async def claim(self, claim: Claim) -> ClaimVerdict:
        """Ask to go on alone; return only a decided verdict with a record, however long it takes.

        Repeats the same claim at every controller in turn until one decides (INV-5); only the
        caller's cancellation ends it earlier. Cancelled, the claim may still be won: to learn
        that, call again with the same claim.
        """
        pause_seconds = PAUSE_SECONDS_MIN
        patience_seconds = CLAIM_ATTEMPT_SECONDS_MIN
        said: str | None = None
        while True:
            for url in self._controllers.order():
                result = await self._claim_once(Attempt(url, patience_seconds), claim)
                if isinstance(result, ClaimVerdict):
                    self._controllers.remember(url)
                    return result
                if result != said:
                    logger.warning("claim of %s undecided at %s: %s", claim.vm, url, result)
                    said = result
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, PAUSE_SECONDS_MAX)
            patience_seconds = min(2 * patience_seconds, CLAIM_ATTEMPT_SECONDS_MAX)

    async def _claim_once(self, attempt: Attempt, claim: Claim) -> ClaimVerdict | str:
        try:
            answer = await self._ask(attempt, "POST", "/agent/claims", claim)
        except (httpx.RequestError, TimeoutError) as error:
            self._controllers.pass_over(attempt.url)
            return str(error) or type(error).__name__
        return read_claim_answer(answer, claim)

    async def _call(
        self,
        method: str,
        path: str,
        body: BaseModel | None = None,
        parameters: Mapping[str, str] | None = None,
        *,
        wait_seconds: float = 0.0,
    ) -> Answer:
        deadline_seconds = time.monotonic() + self._timeout_seconds + wait_seconds
        search = Search(
            self._controllers,
            deadline_seconds,
            wait_seconds=wait_seconds,
            patience_seconds=PATIENCE_SECONDS,
        )
        while (attempt := search.next(time.monotonic())) is not None:
            try:
                answer = await self._ask(attempt, method, path, body, parameters)
            except (httpx.RequestError, TimeoutError) as error:
                search.failed(attempt, error, stale=isinstance(error, STALE))
                continue
            if search.settled(attempt, answer):
                return answer
        raise search.unavailable() from search.cause

    async def _ask(
        self,
        attempt: Attempt,
        method: str,
        path: str,
        body: BaseModel | None = None,
        parameters: Mapping[str, str] | None = None,
    ) -> Answer:
        async with (
            asyncio.timeout(attempt.seconds),
            self._http.stream(
                method,
                url_of(attempt, path),
                params=parameters,
                content=json_of(body),
                headers=headers_of(body),
                timeout=timeout_of(attempt.seconds),
            ) as response,
        ):
            parts: list[bytes] = []
            size_bytes = 0
            async for part in response.aiter_bytes():
                size_bytes = checked_size(size_bytes + len(part))
                parts.append(part)
            return answer_of(response, parts)
