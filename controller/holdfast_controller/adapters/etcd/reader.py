"""A watch's answers, read in a thread of its own. Talks gRPC.

An event loop gives every ready task one step a turn, and takes several turns for one answer of a
stream. With some hundred requests ready a turn lasts a tenth of a second, and who follows the store
in that way sees ten changes a second, falls ever further behind, and does not recover. A thread
reads on meanwhile, whatever the loop does, and all it has read is taken at once. It also tells a
silent member from a busy loop.

Memory: reads at most `ANSWERS_MAX` ahead; then gRPC's flow control makes etcd wait.
"""

import asyncio
import contextlib
import queue
import threading
from collections import deque

import grpc

from holdfast_controller.adapters.etcd.proto import rpc_pb2

ANSWERS_MAX = 256
JOIN_SECONDS = 2.0
_WATCH = "/etcdserverpb.Watch/Watch"


class StreamEnded(Exception):  # noqa: N818 - an outcome
    """The stream is over and everything of it was taken; `__cause__` is gRPC's error, if any."""


class StreamReader:
    """One stream on a channel of its own. Belongs to the event loop that made it; `close` it."""

    def __init__(self, channel: grpc.Channel, metadata: tuple[tuple[str, str], ...]) -> None:
        """Begin; closes `channel` in the end."""
        self._loop = asyncio.get_running_loop()
        self._channel = channel
        self._requests: queue.SimpleQueue[rpc_pb2.WatchRequest | None] = queue.SimpleQueue()
        self._answers: deque[rpc_pb2.WatchResponse] = deque()
        self._room = threading.Semaphore(ANSWERS_MAX)
        self._news = asyncio.Event()
        self._has_told = False
        self._is_over = False
        self._error: Exception | None = None
        method = channel.stream_stream(
            _WATCH,
            request_serializer=rpc_pb2.WatchRequest.SerializeToString,
            response_deserializer=rpc_pb2.WatchResponse.FromString,
        )
        self._call = method(iter(self._requests.get, None), metadata=metadata)
        self._thread = threading.Thread(target=self._run, name="etcd watch", daemon=True)
        self._thread.start()

    def write(self, request: rpc_pb2.WatchRequest) -> None:
        """Send a request, sooner or later; nobody hears of it when the stream is over."""
        self._requests.put(request)

    async def read(self, timeout_seconds: float) -> list[rpc_pb2.WatchResponse]:
        """Return all answers that wait, after the first one has come; none within the timeout: [].

        Raises StreamEnded.
        """
        if not self._answers and not self._is_over:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, timeout_seconds)):
                    await self._news.wait()
        # In this order: what comes while we take tells anew.
        self._news.clear()
        self._has_told = False
        is_over = self._is_over
        taken = []
        while self._answers:
            taken.append(self._answers.popleft())
            self._room.release()
        if is_over and not taken:
            raise StreamEnded from self._error
        return taken

    async def close(self) -> None:
        """End it; returns when the thread has. Idempotent."""
        self._is_over = True
        self._call.cancel()
        self._requests.put(None)
        self._room.release()
        self._channel.close()
        await asyncio.to_thread(self._thread.join, JOIN_SECONDS)

    def _run(self) -> None:
        try:
            for answer in self._call:
                self._room.acquire()
                if self._is_over:
                    return
                self._answers.append(answer)
                self._tell()
        except grpc.RpcError as error:
            self._error = error
        finally:
            self._is_over = True
            self._has_told = False
            self._tell()

    def _tell(self) -> None:
        if not self._has_told:
            self._has_told = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                self._loop.call_soon_threadsafe(self._news.set)
