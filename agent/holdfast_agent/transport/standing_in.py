"""Keep-alives while a worker's only loop is busy. Owns a thread; touches the connection's socket.

A worker's turn is short, but not always: QEMU drains requests on a slow disk before it stands, a
burst makes a checkpoint of half a gigabyte, a host gives memory out slowly. That is no death, and
the other side should not take it for one. So a thread says that we live when the loop is late.

It does so for `BUSY_LIMIT_SECONDS` after the loop's last turn and no longer: a worker that hangs
holds the VM's output with it, and then silence is what has to be heard.
"""

import threading
import time
from collections.abc import Callable

from holdfast_agent.transport.connection import FrameConnection

BUSY_LIMIT_SECONDS = 2.0


class StandIn:
    """Says KEEPALIVE on a connection when nothing else was sent for one and a half intervals."""

    def __init__(
        self,
        connection: FrameConnection,
        *,
        busy_limit_seconds: float = BUSY_LIMIT_SECONDS,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """Start the thread; `stop` ends it, and must come before the connection is closed."""
        self._connection = connection
        self._busy_limit_ns = int(busy_limit_seconds * 1e9)
        self._clock = clock
        self._turned_ns = clock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keep-alives", daemon=True)
        self._thread.start()

    def turned(self, now_ns: int) -> None:
        """The loop had a turn: it is alive."""
        self._turned_ns = now_ns

    def stop(self) -> None:
        """End the thread. Idempotent."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        least_seconds = self._connection.keepalive_seconds / 2
        while True:
            late_seconds = (self._connection.keepalive_late_at_ns - self._clock()) / 1e9
            if self._stopped.wait(max(late_seconds, least_seconds)):
                return
            now_ns = self._clock()
            is_busy = now_ns - self._turned_ns <= self._busy_limit_ns
            if is_busy and now_ns >= self._connection.keepalive_late_at_ns:
                self._connection.send_keepalive()
