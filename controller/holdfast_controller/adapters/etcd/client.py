"""The etcd client: linearizable reads, compare-and-swap, leases, watches. Talks gRPC (etcd 3.4+).

A transaction is the only write beside leases, and it is never repeated unless it is certain that
the attempt before was not applied (`calls.py` has the table). Every call ends within
`request_timeout_seconds`; `list` allows that for each page.

After `EtcdUnavailable(maybe_applied=True)` a read that does not show the write proves nothing: it
may still be in a queue. A caller that must know repeats the *same* transaction: its compares let at
most one of the two through, and when it fails, `TxnResult.current` shows whose value won. So values
that matter should say who wrote them.
"""

from collections.abc import AsyncGenerator, Sequence

from holdfast_controller.adapters.etcd import lease
from holdfast_controller.adapters.etcd.calls import Calls, Kind, Method
from holdfast_controller.adapters.etcd.endpoints import Endpoints
from holdfast_controller.adapters.etcd.errors import (
    COMPACTED,
    AnswerTooLarge,
    Compacted,
    EtcdRefused,
)
from holdfast_controller.adapters.etcd.proto import rpc_pb2
from holdfast_controller.adapters.etcd.tokens import Tokens
from holdfast_controller.adapters.etcd.values import (
    Compare,
    Delete,
    DeletePrefix,
    KeyValue,
    Put,
    StoreStatus,
    TlsFiles,
    TxnResult,
    WatchBatch,
    Write,
    encode_key,
    key_value_of,
    prefix_range,
)
from holdfast_controller.adapters.etcd.watch import Watch

_RANGE = Method("/etcdserverpb.KV/Range", rpc_pb2.RangeRequest, rpc_pb2.RangeResponse, Kind.READ)
_TXN = Method("/etcdserverpb.KV/Txn", rpc_pb2.TxnRequest, rpc_pb2.TxnResponse, Kind.WRITE)
_COMPACT = Method(
    "/etcdserverpb.KV/Compact",
    rpc_pb2.CompactionRequest,
    rpc_pb2.CompactionResponse,
    Kind.REPEATABLE_WRITE,
)
_STATUS = Method(
    "/etcdserverpb.Maintenance/Status",
    rpc_pb2.StatusRequest,
    rpc_pb2.StatusResponse,
    Kind.READ,
    needs_leader=False,
)

PAGE_KEYS = 512
"""Keys a page of `list` asks for at first; halved until the answer fits."""
LIST_ATTEMPTS = 5
"""How often `list` begins anew because the revision it read at was compacted meanwhile."""


class EtcdClient:
    """A client of one etcd cluster. Belongs to one event loop; calls may overlap."""

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        request_timeout_seconds: float = 2.0,
        user: str | None = None,
        password: str | None = None,
        tls: TlsFiles | None = None,
        watch_idle_seconds: float = 2.0,
    ) -> None:
        """Check the configuration; connects at first use.

        `request_timeout_seconds`: of every call; too short and an election (1 s by default) makes
        calls fail, too long and a hung member delays everyone. `watch_idle_seconds`: after this
        silence a watch asks for a sign of life; a dead stream is noticed within this plus a request
        timeout. Raises ValueError and OSError for configuration that can not work.
        """
        if watch_idle_seconds <= 0:
            raise ValueError(f"watch_idle_seconds must be above 0, not {watch_idle_seconds}")
        self._endpoints = Endpoints(endpoints, tls)
        self._calls = Calls(self._endpoints, Tokens(user, password), request_timeout_seconds)
        self._watch_idle_seconds = watch_idle_seconds

    async def close(self) -> None:
        """Close all connections. Calls under way raise EtcdUnavailable; watches end."""
        self._calls.closed = True
        await self._endpoints.close()

    async def get(self, key: str) -> KeyValue | None:
        """Read a key, linearizably."""
        answer = await self._calls.unary(_RANGE, rpc_pb2.RangeRequest(key=encode_key(key)))
        return key_value_of(answer.kvs[0]) if answer.kvs else None

    async def list(self, prefix: str, *, limit: int = 0) -> tuple[tuple[KeyValue, ...], int]:
        """Read all keys that begin with `prefix`, as they were at one revision, sorted by key.

        Returns them and the revision: a watch from the next one continues without a gap. `limit`:
        at most so many keys, 0 for all.
        """
        for _ in range(LIST_ATTEMPTS - 1):
            try:
                return await self._list_at_one_revision(prefix, limit)
            except Compacted:
                continue
        return await self._list_at_one_revision(prefix, limit)

    async def _list_at_one_revision(
        self, prefix: str, limit: int
    ) -> tuple[tuple[KeyValue, ...], int]:
        start, range_end = prefix_range(prefix)
        found: list[KeyValue] = []
        revision = 0
        page_keys = PAGE_KEYS
        while True:
            wanted = min(page_keys, limit - len(found)) if limit else page_keys
            request = rpc_pb2.RangeRequest(
                key=start, range_end=range_end, limit=wanted, revision=revision
            )
            try:
                page = await self._calls.unary(_RANGE, request)
            except AnswerTooLarge:
                if wanted == 1:
                    raise
                page_keys = wanted // 2
                continue
            revision = revision or page.header.revision
            found.extend(map(key_value_of, page.kvs))
            if not page.more or (limit and len(found) >= limit):
                return tuple(found), revision
            start = page.kvs[-1].key + b"\0"

    async def txn(self, compares: Sequence[Compare], writes: Sequence[Write]) -> TxnResult:
        """Apply all writes in one step if all compares hold, otherwise none.

        A result with `succeeded=False` is an answer, not an error: `current` has the compared keys.
        Raises EtcdUnavailable, with `maybe_applied` if the outcome is unknown, and EtcdRefused,
        then nothing was changed. A cancelled call may have been applied.
        """
        request = rpc_pb2.TxnRequest(
            compare=map(_compare_message, compares),
            success=map(_write_message, writes),
            failure=[
                rpc_pb2.RequestOp(request_range=rpc_pb2.RangeRequest(key=encode_key(compare.key)))
                for compare in compares
            ],
        )
        answer = await self._calls.unary(_TXN, request)
        current: tuple[KeyValue | None, ...] = ()
        if not answer.succeeded:
            ranges = [response.response_range for response in answer.responses]
            assert len(ranges) == len(compares), (len(ranges), len(compares))
            current = tuple(key_value_of(each.kvs[0]) if each.kvs else None for each in ranges)
        return TxnResult(answer.succeeded, answer.header.revision, current)

    async def lease_grant(self, ttl_seconds: int) -> int:
        """Make a lease and return its id. Etcd rounds short times up (2 s by default)."""
        return await lease.grant(self._calls, ttl_seconds)

    async def lease_keep_alive(self, lease_id: int) -> int:
        """Renew a lease; return the seconds it now has, 0 if it is lost."""
        return await lease.keep_alive(self._calls, lease_id)

    async def lease_revoke(self, lease_id: int) -> None:
        """End a lease and delete its keys; no error if it is gone already."""
        await lease.revoke(self._calls, lease_id)

    def watch(self, prefix: str, *, from_revision: int) -> AsyncGenerator[WatchBatch, None]:
        """Yield every change under `prefix` from `from_revision` on; from 0, first the whole state.

        Outages are waited out. When the history is gone, a batch with `resynchronised` brings the
        whole state. Ends when the client is closed; raises EtcdRefused. Take it with
        `contextlib.aclosing`, so that its stream ends with the block.
        """
        if from_revision < 0:
            raise ValueError(f"a watch begins at revision 0 or later, not {from_revision}")
        watch = Watch(self._calls, self.list, prefix, idle_seconds=self._watch_idle_seconds)
        return watch.batches(from_revision)

    async def compact(self, revision: int) -> None:
        """Drop history before `revision`; no error if that was done already."""
        try:
            await self._calls.unary(_COMPACT, rpc_pb2.CompactionRequest(revision=revision))
        except EtcdRefused as error:
            if error.reason != COMPACTED:
                raise

    async def status(self) -> StoreStatus:
        """Ask the member in use how it is. It answers without a leader, too."""
        answer = await self._calls.unary(_STATUS, rpc_pb2.StatusRequest())
        return StoreStatus(
            endpoint=self._endpoints.preferred.name,
            version=answer.version,
            leader=answer.leader,
            database_size_bytes=answer.database_size_bytes,
            revision=answer.header.revision,
            problems=tuple(answer.errors),
        )


def _compare_message(compare: Compare) -> rpc_pb2.Compare:
    key = encode_key(compare.key)
    if compare.mod_revision == 0:
        return rpc_pb2.Compare(key=key, target=rpc_pb2.Compare.VERSION, version=0)
    return rpc_pb2.Compare(key=key, target=rpc_pb2.Compare.MOD, mod_revision=compare.mod_revision)


def _write_message(write: Write) -> rpc_pb2.RequestOp:
    match write:
        case Put(key, value, lease_id):
            put = rpc_pb2.PutRequest(key=encode_key(key), value=value, lease=lease_id)
            return rpc_pb2.RequestOp(request_put=put)
        case Delete(key):
            delete = rpc_pb2.DeleteRangeRequest(key=encode_key(key))
            return rpc_pb2.RequestOp(request_delete_range=delete)
        case DeletePrefix(prefix):
            start, range_end = prefix_range(prefix)
            delete = rpc_pb2.DeleteRangeRequest(key=start, range_end=range_end)
            return rpc_pb2.RequestOp(request_delete_range=delete)
