"""A soft-RoCE device and pairs of streams over it, for tests inside booted hosts."""

import contextlib
import select
import subprocess
import threading
import time
from collections.abc import Iterator

from holdfast_agent.transport.rdma.opening import RdmaListener, connect
from holdfast_agent.transport.rdma.stream import RdmaStream

DEADLINE_SECONDS = 60.0
RXE_UP = (
    "modprobe -a rdma_rxe ib_uverbs rdma_ucm && "
    "{ rdma link show rxe0/1 || rdma link add rxe0 type rxe netdev eth0; } && "
    "until test -e /dev/infiniband/uverbs0; do sleep 0.1; done"
)


def bring_up() -> None:
    """Make rxe0 on eth0."""
    subprocess.run(["sh", "-c", RXE_UP], check=True, timeout=60)


def accept(listener: RdmaListener) -> RdmaStream:
    """Wait for the stream of who connects."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        if (stream := listener.advance()) is not None:
            return stream
        select.select([listener], [], [], 1.0)
    raise AssertionError("nobody connected")


@contextlib.contextmanager
def streams(address: str) -> Iterator[tuple[RdmaStream, RdmaStream]]:
    """Yield two ends of a stream within this process: (primary's, backup's)."""
    listener = RdmaListener(address)
    found: list[RdmaStream] = []
    thread = threading.Thread(
        target=lambda: found.append(connect(address, listener.offer, DEADLINE_SECONDS))
    )
    thread.start()
    backup = accept(listener)
    thread.join()
    with contextlib.closing(found[0]), contextlib.closing(backup):
        yield found[0], backup
