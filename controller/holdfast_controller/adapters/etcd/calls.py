"""One request to etcd: attempts at one member after another, inside one deadline.

Talks gRPC. What may be repeated is decided by the kind of the call and by what is known about the
failed attempt (`errors.judge`):

    failed attempt            read     repeatable write   write
    not sent, not proposed    next     next               next
    token not known           once more, with a new token, for all three
    unknown                   next     next               EtcdUnavailable(maybe_applied=True)
    refused                   EtcdRefused, for all three

Each attempt gets an equal share of the deadline, so that a member that hangs costs a share and not
the whole. After every member failed in a row there is a short pause.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Generic, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from holdfast_controller.adapters.etcd.endpoints import Endpoint, Endpoints, NotConnected
from holdfast_controller.adapters.etcd.errors import EtcdUnavailable, Verdict, judge, refusal
from holdfast_controller.adapters.etcd.tokens import Tokens

_PAUSE_SECONDS = 0.05
"""Between two rounds over all members: short against an election (1 s), long against a spin."""
_ATTEMPT_SECONDS_MIN = 0.05
"""With less time left no further attempt is begun: a commit takes milliseconds, on a busy disk tens
of them."""

Metadata = tuple[tuple[str, str], ...]
Result = TypeVar("Result")
Request = TypeVar("Request", bound=Message)
Answer = TypeVar("Answer", bound=Message)
Perform = Callable[[Endpoint, Metadata, float], Awaitable[Result]]
"""One attempt at an endpoint with metadata and a timeout in seconds. Raises AioRpcError."""


class Kind(Enum):
    """What sending a request twice can do."""

    READ = auto()
    REPEATABLE_WRITE = auto()
    """The second application changes nothing."""
    WRITE = auto()


@dataclass(frozen=True)
class Method(Generic[Request, Answer]):
    """A method of etcd's API with one request and one answer."""

    path: str
    request: type[Request]
    answer: type[Answer]
    kind: Kind
    needs_leader: bool = True
    """A member without a leader says so at once, before it does anything."""

    @property
    def name(self) -> str:
        """The method's own name."""
        return self.path.rpartition("/")[2]


@dataclass
class _Progress:
    """What became known during one call."""

    what: str
    kind: Kind
    deadline: float
    reasons: dict[str, str] = field(default_factory=dict)
    failures: int = 0
    renewed_token: bool = False
    maybe_applied: bool = False

    def unavailable(self) -> EtcdUnavailable:
        """Return the error that sums it up."""
        return EtcdUnavailable(
            self.what, maybe_applied=self.maybe_applied, reasons=dict(self.reasons)
        )


class AttemptFailed(Exception):  # noqa: N818 - an outcome, not an error
    """One attempt did not bring an answer."""

    def __init__(self, verdict: Verdict, reason: str) -> None:
        """Say what it means and why, in words."""
        super().__init__(reason)
        self.verdict = verdict
        self.reason = reason


class Calls:
    """Sends requests to whichever member answers."""

    def __init__(self, endpoints: Endpoints, tokens: Tokens, timeout_seconds: float) -> None:
        """Share `endpoints` and `tokens` with the watches; own neither."""
        if timeout_seconds <= 0:
            raise ValueError(f"an etcd request needs time: {timeout_seconds} s is none")
        self.endpoints = endpoints
        self.tokens = tokens
        self.timeout_seconds = timeout_seconds
        self.closed = False

    async def unary(self, method: Method[Request, Answer], request: Request) -> Answer:
        """Send one request and return its answer. Errors as for `run`."""

        async def perform(endpoint: Endpoint, metadata: Metadata, timeout_seconds: float) -> Answer:
            call = endpoint.channel.unary_unary(
                method.path,
                request_serializer=method.request.SerializeToString,
                response_deserializer=method.answer.FromString,
            )
            return await call(request, metadata=metadata, timeout=timeout_seconds)

        return await self.run(method.name, method.kind, perform, needs_leader=method.needs_leader)

    async def run(
        self, what: str, kind: Kind, perform: Perform[Result], *, needs_leader: bool = True
    ) -> Result:
        """Attempt until there is an answer, a refusal or no time left.

        Raises EtcdUnavailable and EtcdRefused. On cancellation a write may have been applied.
        """
        progress = _Progress(what, kind, time.monotonic() + self.timeout_seconds)
        while True:
            if self.closed:
                progress.reasons["client"] = "closed"
                raise progress.unavailable()
            try:
                return await self._attempt(progress, perform, needs_leader=needs_leader)
            except AttemptFailed as failure:
                await self._after_failure(progress, failure)

    async def _after_failure(self, progress: _Progress, failure: AttemptFailed) -> None:
        """Decide whether there is another attempt; returns when it may begin."""
        if failure.verdict is Verdict.UNKNOWN and progress.kind is not Kind.READ:
            progress.maybe_applied = True
        if failure.verdict is Verdict.UNKNOWN and progress.kind is Kind.WRITE:
            raise progress.unavailable() from failure
        pause_seconds = 0.0
        if failure.verdict is not Verdict.NOT_AUTHENTICATED:
            progress.failures += 1
            if progress.failures % len(self.endpoints) == 0:
                pause_seconds = _PAUSE_SECONDS
        # A write sent with no time left for the answer would only make its outcome unknown.
        if progress.deadline - time.monotonic() <= pause_seconds + _ATTEMPT_SECONDS_MIN:
            raise progress.unavailable() from failure
        await asyncio.sleep(pause_seconds)

    async def _attempt(
        self, progress: _Progress, perform: Perform[Result], *, needs_leader: bool
    ) -> Result:
        """Make one attempt at the preferred member.

        Raises AttemptFailed, after having preferred another member, and EtcdRefused.
        """
        endpoint = self.endpoints.preferred
        now = time.monotonic()
        until = min(progress.deadline, now + self.timeout_seconds / len(self.endpoints))
        metadata: Metadata = ()
        try:
            metadata = await self.prepare(endpoint, until, needs_leader=needs_leader)
            return await self._send(perform, endpoint, metadata, until)
        except NotConnected as error:
            failure = AttemptFailed(Verdict.NOT_APPLIED, str(error))
            cause: BaseException | None = error
        except grpc.aio.AioRpcError as error:
            failure = self._judge(progress, error, metadata)
            cause = error
        except AttemptFailed as error:
            failure, cause = error, error.__cause__
        progress.reasons[endpoint.name] = failure.reason
        if failure.verdict is not Verdict.NOT_AUTHENTICATED:
            self.endpoints.pass_over(endpoint)
        raise failure from cause

    async def _send(
        self,
        perform: Perform[Result],
        endpoint: Endpoint,
        metadata: Metadata,
        until: float,
    ) -> Result:
        left_seconds = until - time.monotonic()
        if left_seconds <= 0:
            raise NotConnected("connecting took all of the time")
        try:
            return await perform(endpoint, metadata, left_seconds)
        except asyncio.CancelledError as error:
            if not self._was_closed_under_us():
                raise
            raise AttemptFailed(Verdict.UNKNOWN, "the client was closed meanwhile") from error

    def _judge(
        self, progress: _Progress, error: grpc.aio.AioRpcError, metadata: Metadata
    ) -> AttemptFailed:
        """Return what a status means for the attempt. Raises EtcdRefused."""
        code, details = error.code(), error.details() or ""
        verdict = judge(code, details)
        if verdict is Verdict.NOT_AUTHENTICATED:
            if progress.renewed_token or not self.tokens.can_renew:
                raise refusal(progress.what, code, details) from error
            progress.renewed_token = True
            self.tokens.discard(dict(metadata).get("token", ""))
        if verdict is Verdict.REFUSED:
            raise refusal(progress.what, code, details) from error
        return AttemptFailed(verdict, details or code.name)

    async def prepare(self, endpoint: Endpoint, until: float, *, needs_leader: bool) -> Metadata:
        """Connect, authenticate and return the metadata for a request; nothing of it is sent.

        Raises NotConnected, and EtcdRefused when etcd does not take user and password.
        """
        try:
            with self.closing_is_no_cancellation():
                await endpoint.connect(max(0.0, until - time.monotonic()))
                token = await self.tokens.current(endpoint, max(0.0, until - time.monotonic()))
        except TimeoutError as error:
            raise NotConnected("authenticating took too long") from error
        except grpc.aio.AioRpcError as error:
            code, details = error.code(), error.details() or ""
            if judge(code, details) is Verdict.REFUSED:
                raise refusal("Authenticate", code, details) from error
            raise NotConnected(f"no token: {details or code.name}") from error
        leader = (("hasleader", "true"),) if needs_leader else ()
        return (*leader, ("token", token)) if token else leader

    @contextlib.contextmanager
    def closing_is_no_cancellation(self) -> Iterator[None]:
        """Raise NotConnected where gRPC cancels because the client was closed meanwhile."""
        try:
            yield
        except asyncio.CancelledError as error:
            if not self._was_closed_under_us():
                raise
            raise NotConnected("the client was closed meanwhile") from error

    def _was_closed_under_us(self) -> bool:
        """Return whether a CancelledError is gRPC's, not that of whoever cancels our task."""
        task = asyncio.current_task()
        return self.closed and (task is None or task.cancelling() == 0)
