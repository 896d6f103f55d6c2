"""A watch on a prefix that neither misses a change nor dies with a connection. Talks gRPC.

A watch is a loop over streams. Each stream begins where the last whole revision ended
(`assembler.py`). It ends, and the next one begins at another member, when

- it breaks, or the member loses its leader (metadata `hasleader`);
- it is silent for `idle_seconds`, is asked for progress, and is silent for another request timeout.
  Progress is a sign of life and nothing more: until 3.4.25 it could name a revision whose changes
  were still on their way, so it never moves the position.

When the history the watch needs is gone (compaction), or may be another one (the cluster's id
changed, or its revision or term fell: a restored backup), the prefix is listed anew, and the batch
says `resynchronised`.

Memory: little is read ahead (`reader.py`). While the consumer is busy, etcd waits.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import grpc

from holdfast_controller.adapters.etcd.assembler import Assembler, Change
from holdfast_controller.adapters.etcd.calls import Calls, Metadata
from holdfast_controller.adapters.etcd.endpoints import Endpoint, NotConnected
from holdfast_controller.adapters.etcd.errors import (
    EtcdRefused,
    EtcdUnavailable,
    Verdict,
    judge,
    refusal,
)
from holdfast_controller.adapters.etcd.proto import kv_pb2, rpc_pb2
from holdfast_controller.adapters.etcd.reader import StreamEnded, StreamReader
from holdfast_controller.adapters.etcd.values import (
    KeyValue,
    WatchBatch,
    key_value_of,
    prefix_range,
)

log = logging.getLogger(__name__)

_PERMISSION_DENIED = "etcdserver: permission denied"
_PAUSE_SECONDS_MIN = 0.05
_PAUSE_SECONDS_MAX = 1.0
"""An outage may last; a watch that came back a second late has lost nothing."""

ListPrefix = Callable[[str], Awaitable[tuple[tuple[KeyValue, ...], int]]]
_Answers = list[rpc_pb2.WatchResponse]


class _Broken(Exception):  # noqa: N818 - an outcome of a stream, not an error of the watch
    """The stream is over; go on from the same position."""


class _HistoryLost(Exception):  # noqa: N818
    """What comes after our position can not be had; list anew."""


class _TokenRefused(Exception):  # noqa: N818
    """The stream was refused with a token that may be out of date."""

    def __init__(self, token: str, error: EtcdRefused) -> None:
        super().__init__(str(error))
        self.token = token
        self.error = error


@dataclass
class _History:
    """Which history we follow: what was seen of the store, never falling within one history."""

    cluster_id: int = 0
    raft_term: int = 0

    def check(self, header: rpc_pb2.ResponseHeader, known_revision: int) -> None:
        """Compare with what a new stream says of itself. Raises _HistoryLost."""
        before = (self.cluster_id, self.raft_term)
        self.cluster_id, self.raft_term = header.cluster_id, header.raft_term
        if before[0] not in {0, header.cluster_id}:
            raise _HistoryLost("this is another cluster")
        if header.raft_term < before[1] or header.revision < known_revision:
            raise _HistoryLost(
                f"the store is at revision {header.revision}, term {header.raft_term}; "
                f"known were revision {known_revision}, term {before[1]}"
            )


class _Stream:
    """One stream from one member; `open` it, `next` from it, always `close` it."""

    def __init__(self, calls: Calls, idle_seconds: float) -> None:
        self._calls = calls
        self._idle_seconds = idle_seconds
        self.endpoint = calls.endpoints.preferred
        self._reader: StreamReader | None = None
        self._metadata: Metadata = ()
        self._waiting: _Answers = []

    async def open(self, prefix: str, start_revision: int) -> rpc_pb2.ResponseHeader:
        """Begin at the preferred member; returns the header of etcd's confirmation.

        Raises _Broken, _HistoryLost, _TokenRefused, NotConnected and EtcdRefused.
        """
        self.endpoint = self._calls.endpoints.preferred
        until = time.monotonic() + self._calls.timeout_seconds
        self._metadata = await self._calls.prepare(self.endpoint, until, needs_leader=True)
        self._reader = self.endpoint.open_stream(self._metadata)
        key, range_end = prefix_range(prefix)
        create = rpc_pb2.WatchCreateRequest(
            key=key, range_end=range_end, start_revision=start_revision, fragment=True
        )
        self._reader.write(rpc_pb2.WatchRequest(create_request=create))
        answers = await self._read(until - time.monotonic())
        if not answers:
            raise _Broken("it did not confirm the watch in time")
        answer, *self._waiting = answers
        if answer.canceled:
            self._raise_for_cancel(answer)
        if not answer.created:
            raise _Broken("its first answer was no confirmation")
        self._metadata = ()  # the token was good; what is refused from now on is something else
        return answer.header

    async def next(self) -> _Answers:
        """Return the next answers that are about changes, at least one.

        Raises _Broken when the member shows no sign of life in time, and _HistoryLost.
        """
        while True:
            answers, self._waiting = self._waiting or await self._read(self._idle_seconds), []
            if not answers:
                assert self._reader is not None
                progress = rpc_pb2.WatchProgressRequest()
                self._reader.write(rpc_pb2.WatchRequest(progress_request=progress))
                answers = await self._read(self._calls.timeout_seconds)
            if not answers:
                raise _Broken("it shows no sign of life")
            if answers[0].canceled:
                self._raise_for_cancel(answers[0])
            before = list(takewhile(lambda answer: not answer.canceled, answers))
            self._waiting = answers[len(before) :]
            about_changes = [answer for answer in before if answer.events]
            if about_changes:
                return about_changes

    async def close(self) -> None:
        """End the stream; returns when nothing of it is left."""
        if self._reader is not None:
            await self._reader.close()

    async def _read(self, timeout_seconds: float) -> _Answers:
        """Return the next answers; none if there are none in time."""
        assert self._reader is not None
        try:
            return await self._reader.read(timeout_seconds)
        except StreamEnded as ended:
            if isinstance(ended.__cause__, grpc.RpcError):
                raise self._failure(ended.__cause__) from ended
            raise _Broken("it ended") from ended

    def _failure(self, error: Any) -> Exception:
        code, details = error.code(), error.details() or ""
        verdict = judge(code, details)
        if verdict is Verdict.NOT_AUTHENTICATED:
            return _TokenRefused(_token(self._metadata), refusal("Watch", code, details))
        if verdict is Verdict.REFUSED:
            return refusal("Watch", code, details)
        return _Broken(details or code.name)

    def _raise_for_cancel(self, answer: rpc_pb2.WatchResponse) -> None:
        """Etcd ended the watch but not the stream; say why."""
        # Etcd puts gRPC's rendering of an error here: "rpc error: code = ... desc = REASON".
        reason = answer.cancel_reason.rpartition(" desc = ")[2]
        if answer.compact_revision:
            raise _HistoryLost(f"everything before {answer.compact_revision} is compacted")
        if judge(grpc.StatusCode.UNKNOWN, reason) is Verdict.NOT_AUTHENTICATED or (
            reason == _PERMISSION_DENIED
        ):
            # Etcd 3.4 says "permission denied" for a token it does not know, too.
            raise _TokenRefused(
                _token(self._metadata),
                EtcdRefused("Watch", code="PERMISSION_DENIED", reason=reason),
            )
        raise _Broken(f"etcd ended the watch: {reason}")


def _token(metadata: Metadata) -> str:
    return dict(metadata).get("token", "")


def _change_of(event: kv_pb2.Event) -> Change:
    deleted = event.kind == kv_pb2.Event.DELETE
    return ("delete" if deleted else "put", key_value_of(event.kv))


class Watch:
    """The loop over streams. One user at a time."""

    def __init__(
        self, calls: Calls, list_prefix: ListPrefix, prefix: str, *, idle_seconds: float
    ) -> None:
        """Watch `prefix`; `calls` and `list_prefix` are the client's."""
        self._calls = calls
        self._list_prefix = list_prefix
        self._prefix = prefix
        self._idle_seconds = idle_seconds
        self._history = _History()
        self._failures = 0
        self._renewed_token = False
        self._opened_at = 0.0

    async def batches(self, from_revision: int) -> AsyncGenerator[WatchBatch, None]:
        """Yield every change from `from_revision` on; with 0, first the whole state.

        Ends when the client is closed. Raises EtcdRefused; an outage is waited out.
        """
        next_revision = from_revision
        while not self._calls.closed:
            stream = _Stream(self._calls, self._idle_seconds)
            try:
                if next_revision == 0:
                    snapshot, revision = await self._list_prefix(self._prefix)
                    next_revision = revision + 1
                    yield WatchBatch(revision, resynchronised=True, snapshot=snapshot)
                known_revision = next_revision - 1
                header = await stream.open(self._prefix, max(1, known_revision))
                self._history.check(header, known_revision)
                self._opened()
                assembler = Assembler(next_revision)
                while True:
                    for answer in await stream.next():
                        changes = map(_change_of, answer.events)
                        batch = assembler.add(changes, more_fragments=answer.fragment)
                        if batch is not None:
                            next_revision = assembler.next_revision
                            yield batch
            except _HistoryLost as reason:
                log.warning("watch on %s lists anew: %s", self._prefix, reason)
                next_revision = 0
                await self._pause()
            except (_Broken, _TokenRefused, NotConnected, EtcdUnavailable) as failure:
                self._after_failure(stream.endpoint, failure)
                await self._pause()
            finally:
                await stream.close()

    def _opened(self) -> None:
        if self._failures:
            log.info("watch on %s goes on", self._prefix)
        self._opened_at = time.monotonic()
        self._renewed_token = False

    def _after_failure(self, endpoint: Endpoint, failure: Exception) -> None:
        """Prepare the next attempt. Raises EtcdRefused when there is none to make."""
        if isinstance(failure, _TokenRefused):
            if self._renewed_token or not self._calls.tokens.can_renew:
                raise failure.error from failure
            self._renewed_token = True
            self._calls.tokens.discard(failure.token)
            return
        log.info("watch on %s at %s: %s", self._prefix, endpoint.name, failure)
        self._calls.endpoints.pass_over(endpoint)

    async def _pause(self) -> None:
        """Wait before the next stream: after the first failure of every member, ever longer."""
        if time.monotonic() - self._opened_at > _PAUSE_SECONDS_MAX and self._opened_at:
            # It had worked for a while: this is a new trouble, not the old one going on.
            self._failures = 0
        self._opened_at = 0.0
        rounds = self._failures // len(self._calls.endpoints)
        self._failures += 1
        if rounds:
            await asyncio.sleep(min(_PAUSE_SECONDS_MAX, _PAUSE_SECONDS_MIN * 2 ** min(rounds, 8)))
