"""Leases kept alive over one stream to one member. Talks gRPC.

To open a stream costs etcd and us several times as much as to renew a lease over it, and a hundred
hosts a second have theirs renewed. etcd answers in the order of the questions. A stream that fails
in any way fails all who wait on it and is not used again; each of them asks anew, so nobody needs
to watch a stream that nobody uses.
"""

import asyncio
from collections import defaultdict, deque

import grpc
import grpc.aio

from holdfast_controller.adapters.etcd.proto import rpc_pb2

_KEEP_ALIVE = "/etcdserverpb.Lease/LeaseKeepAlive"


class RenewalsEnded(Exception):  # noqa: N818 - an outcome
    """The stream is over; whether etcd has taken the question is not known."""


class Renewals:
    """One stream; belongs to the event loop that made it. `close` it, or let it fail."""

    def __init__(self, channel: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...]) -> None:
        """Begin on `channel`, which stays the caller's."""
        self.metadata = metadata
        self.is_over = False
        self._writing = asyncio.Lock()  # gRPC takes one message of a stream at a time
        self._waiting: defaultdict[int, deque[asyncio.Future[int]]] = defaultdict(deque)
        method: grpc.aio.StreamStreamMultiCallable[
            rpc_pb2.LeaseKeepAliveRequest, rpc_pb2.LeaseKeepAliveResponse
        ] = channel.stream_stream(
            _KEEP_ALIVE,
            request_serializer=rpc_pb2.LeaseKeepAliveRequest.SerializeToString,
            response_deserializer=rpc_pb2.LeaseKeepAliveResponse.FromString,
        )
        self._call = method(metadata=metadata)
        self._reading = asyncio.create_task(self._read(), name="lease renewals")

    async def renew(self, lease: int, timeout_seconds: float) -> int:
        """Renew a lease; return the seconds it now has, 0 if it is lost.

        Raises RenewalsEnded (also when there is no answer in time, which ends the stream) and
        AioRpcError, when etcd has ended the stream with it.
        """
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout_seconds):
                async with self._writing:
                    # Not before: who gives up here has asked nothing, and no answer is his.
                    self._waiting[lease].append(answer)
                    await self._call.write(rpc_pb2.LeaseKeepAliveRequest(lease_id=lease))
                return await answer
        except TimeoutError as error:
            self._end(RenewalsEnded("no answer in time"))
            raise RenewalsEnded("no answer in time") from error
        except asyncio.InvalidStateError as error:
            raise RenewalsEnded("the stream has ended") from error
        finally:
            if not answer.cancel() and not answer.cancelled():
                answer.exception()  # taken note of, if the question itself failed before

    async def close(self) -> None:
        """End it, and the wait of everybody. Idempotent."""
        self._end(RenewalsEnded("the client is closed"))
        self._reading.cancel()
        await asyncio.wait([self._reading])

    async def _read(self) -> None:
        try:
            while True:
                self._answer(await self._call.read())
        except (grpc.aio.AioRpcError, RenewalsEnded) as error:
            self._end(error)
        finally:
            self._end(RenewalsEnded("the stream was given up"))

    def _answer(self, answer: object) -> None:
        if not isinstance(answer, rpc_pb2.LeaseKeepAliveResponse):
            raise RenewalsEnded("the stream ended without an answer")
        waiting = self._waiting.get(answer.lease_id)
        if not waiting:
            raise RenewalsEnded(f"etcd answered for lease {answer.lease_id:x}, unasked")
        first = waiting.popleft()
        if not waiting:
            del self._waiting[answer.lease_id]
        if not first.done():
            first.set_result(max(0, answer.ttl_seconds))

    def _end(self, error: Exception) -> None:
        if self.is_over:
            return
        self.is_over = True
        self._call.cancel()
        for waiting in self._waiting.values():
            for answer in waiting:
                if not answer.done():
                    answer.set_exception(error)
        self._waiting.clear()
