"""The typed clients of the REST API: `HoldfastClient` for people, `AgentClient` for agents.

Talks HTTP to one controller after the other; keeps connections open; ignores proxy settings of the
environment. What an answer means is decided in `exchange`; `AgentClient` is written in
`agent_client`.

Every call has one deadline for all controllers together, except two that only their caller ends:
following events, and `AgentClient.claim`, which must not end undecided.

A call that is not answered may have been carried out. All calls may be repeated: the API's changes
are idempotent, only a repeated `AgentClient.event` shows twice.
"""

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import httpx
from pydantic import BaseModel, ValidationError

from holdfast_api.agent_client import AgentClient
from holdfast_api.errors import Unavailable
from holdfast_api.exchange import (
    Answer,
    Controllers,
    EventLines,
    Search,
    expect_success,
    name_segment,
    query_of,
    read_answer,
)
from holdfast_api.messages import (
    EventList,
    HostList,
    HostPatch,
    PolicyList,
    PolicyPatch,
    Preflight,
    ProtectRequest,
    SwitchoverRequest,
    VmList,
)
from holdfast_api.records import (
    Event,
    Host,
    Policy,
    Protection,
    StoredPolicy,
    Vm,
)
from holdfast_api.wire import (
    PAUSE_SECONDS_MAX,
    PAUSE_SECONDS_MIN,
    STALE,
    Verify,
    headers_of,
    json_of,
    positive,
    read_whole,
    timeout_of,
    url_of,
)
from holdfast_api.words import HostId, PolicyName, VmId

EVENTS_SILENCE_SECONDS = 45.0
"""A followed stream that says nothing for so long, not even a comment, is opened again."""

__all__ = ["AgentClient", "HoldfastClient"]

logger = logging.getLogger(__name__)


class HoldfastClient:
    """Blocking client for people, scripts and tests. Not for use from several threads at once.

    Owns its connections: use it as a context manager, or call `close`.
    Every method raises `Refused` or `Unavailable`.
    """

    def __init__(
        self, urls: Sequence[str], *, timeout_seconds: float = 10.0, verify: Verify = True
    ) -> None:
        """Take the controllers' base URLs and the deadline of each call.

        Raises:
            ValueError: An URL is none, or the timeout is not positive.
        """
        self._controllers = Controllers(urls)
        self._timeout_seconds = positive(timeout_seconds)
        self._http = httpx.Client(verify=verify, trust_env=False)

    def __enter__(self) -> Self:
        """Return the client itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close all connections."""
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    # --- hosts and VMs ---

    def hosts(self) -> HostList:
        """Return all hosts that ever spoke or were given settings."""
        return read_answer(self._call("GET", "/hosts"), HostList)

    def host(self, host: HostId) -> Host:
        """Return one host."""
        return read_answer(self._call("GET", f"/hosts/{name_segment(host)}"), Host)

    def change_host(self, host: HostId, patch: HostPatch) -> Host:
        """Change labels or maintenance of a host; return it as it is then."""
        return read_answer(self._call("PATCH", f"/hosts/{name_segment(host)}", patch), Host)

    def vms(self) -> VmList:
        """Return all VMs that are running or protected."""
        return read_answer(self._call("GET", "/vms"), VmList)

    def vm(self, vm: VmId) -> Vm:
        """Return one VM."""
        return read_answer(self._call("GET", f"/vms/{name_segment(vm)}"), Vm)

    def preflight(self, vm: VmId) -> Preflight:
        """Return what speaks against protecting a VM; touches nothing."""
        return read_answer(self._call("GET", f"/vms/{name_segment(vm)}/preflight"), Preflight)

    # --- protections ---

    def protect(
        self, vm: VmId, *, policy_name: PolicyName | None = None, policy: Policy | None = None
    ) -> Protection:
        """Ask for protection by a stored or an inline policy (neither: the default). Idempotent.

        Returns at once; the VM is protected when `protection(vm).phase` says so.
        """
        assert policy_name is None or policy is None, "a name or a policy, not both"
        if policy_name is not None:
            name_segment(policy_name)
        request = ProtectRequest(policy_name=policy_name, policy=policy)
        return read_answer(self._call("PUT", _protection_path(vm), request), Protection)

    def protection(self, vm: VmId) -> Protection:
        """Return how a VM's protection stands."""
        return read_answer(self._call("GET", _protection_path(vm)), Protection)

    def change(self, vm: VmId, patch: PolicyPatch) -> Protection:
        """Change what may change of a policy while the VM is protected."""
        return read_answer(self._call("PATCH", _protection_path(vm), patch), Protection)

    def unprotect(self, vm: VmId) -> Protection | None:
        """Ask to end the protection; the VM runs on. None if there is nothing left to show."""
        answer = self._call("DELETE", _protection_path(vm))
        expect_success(answer)
        return read_answer(answer, Protection) if answer.body.strip() else None

    def switchover(self, vm: VmId, *, to: HostId | None = None) -> Protection:
        """Ask the primary to hand over to its backup (`to`, when given, must be it). Idempotent."""
        if to is not None:
            name_segment(to)
        request = SwitchoverRequest(to=to)
        path = f"/vms/{name_segment(vm)}/switchover"
        return read_answer(self._call("POST", path, request), Protection)

    # --- policies ---

    def policies(self) -> PolicyList:
        """Return all stored policies."""
        return read_answer(self._call("GET", "/policies"), PolicyList)

    def policy(self, name: PolicyName) -> StoredPolicy:
        """Return one stored policy."""
        return read_answer(self._call("GET", f"/policies/{name_segment(name)}"), StoredPolicy)

    def store_policy(self, name: PolicyName, policy: Policy) -> StoredPolicy:
        """Store a policy under a name, replacing an older one."""
        path = f"/policies/{name_segment(name)}"
        return read_answer(self._call("PUT", path, policy), StoredPolicy)

    def remove_policy(self, name: PolicyName) -> None:
        """Remove a stored policy; refused while a protection uses it."""
        expect_success(self._call("DELETE", f"/policies/{name_segment(name)}"))

    # --- events ---

    def events(self, after: int = 0, *, follow: bool = False) -> Iterator[Event]:
        """Yield the events whose position is above `after`, in order.

        With `follow`, goes on with what happens until the caller closes the generator; a broken
        stream is taken up after the last event, at any controller.

        Raises:
            Unavailable: Following, no controller answered for the client's timeout.
        """
        return self._followed(after) if follow else self._listed(after)

    def _listed(self, after: int) -> Iterator[Event]:
        """Ask for what comes after the last one until nothing does: a listing may be cut."""
        while True:
            answer = self._call("GET", "/events", parameters=query_of(after=after))
            fresh = [e for e in read_answer(answer, EventList).events if e.position > after]
            yield from fresh
            if not fresh:
                return
            after = fresh[-1].position

    def _followed(self, after: int) -> Iterator[Event]:
        give_up_seconds = time.monotonic()  # who was never reached is not waited for
        pause_seconds = PAUSE_SECONDS_MIN
        while True:
            try:
                with self._open_stream(after) as response:
                    give_up_seconds = math.inf
                    for event in _events_of(response):
                        if event.position > after:
                            after = event.position
                            yield event
                        pause_seconds = PAUSE_SECONDS_MIN
            except httpx.RequestError as error:
                logger.debug("the event stream broke after %d: %s", after, error)
            except Unavailable as error:
                if error.code == "internal" or time.monotonic() >= give_up_seconds:
                    raise
            give_up_seconds = min(give_up_seconds, time.monotonic() + self._timeout_seconds)
            time.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, PAUSE_SECONDS_MAX)

    @contextmanager
    def _open_stream(self, after: int) -> Iterator[httpx.Response]:
        search = Search(self._controllers, time.monotonic() + self._timeout_seconds)
        while (attempt := search.next(time.monotonic())) is not None:
            request = self._http.build_request(
                "GET",
                url_of(attempt, "/events"),
                params=query_of(after=after, follow="true"),
                headers={"accept": "text/event-stream"},
                timeout=timeout_of(attempt.seconds, silence_seconds=EVENTS_SILENCE_SECONDS),
            )
            try:
                response = self._http.send(request, stream=True)
            except httpx.RequestError as error:
                search.failed(attempt, error, stale=isinstance(error, STALE))
                continue
            try:
                if response.status_code == httpx.codes.OK:
                    _expect_event_stream(response)
                    self._controllers.remember(attempt.url)
                    yield response
                    return
                answer = read_whole(response, time.monotonic() + attempt.seconds)
                if search.settled(attempt, answer):
                    expect_success(answer)
            finally:
                response.close()
        raise search.unavailable() from search.cause

    # --- HTTP ---

    def _call(
        self,
        method: str,
        path: str,
        body: BaseModel | None = None,
        parameters: Mapping[str, str] | None = None,
    ) -> Answer:
        search = Search(self._controllers, time.monotonic() + self._timeout_seconds)
        while (attempt := search.next(time.monotonic())) is not None:
            try:
                with self._http.stream(
                    method,
                    url_of(attempt, path),
                    params=parameters,
                    content=json_of(body),
                    headers=headers_of(body),
                    timeout=timeout_of(attempt.seconds),
                ) as response:
                    answer = read_whole(response, time.monotonic() + attempt.seconds)
            except httpx.RequestError as error:
                search.failed(attempt, error, stale=isinstance(error, STALE))
                continue
            if search.settled(attempt, answer):
                return answer
        raise search.unavailable() from search.cause


def _protection_path(vm: VmId) -> str:
    return f"/vms/{name_segment(vm)}/protection"


def _expect_event_stream(response: httpx.Response) -> None:
    found = response.headers.get("content-type", "nothing")
    if not found.startswith("text/event-stream"):
        raise Unavailable("internal", f"{response.url} answers with {found} instead of events")


def _events_of(response: httpx.Response) -> Iterator[Event]:
    lines = EventLines()
    for part in response.iter_bytes():
        for data in lines.feed(part):
            try:
                yield Event.model_validate_json(data)
            except ValidationError as error:
                raise Unavailable(
                    "internal", f"the stream holds what is no event: {data[:200]!r}"
                ) from error
