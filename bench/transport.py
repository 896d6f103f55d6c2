"""How fast PAGES frames travel, and what framing and checksums cost against plain sockets.

Two processes over loopback, as two workers would be. In turns, in one run: the bytes of a slab sent
with plain sendmsg and read with recv_into, and the same slabs as PAGES frames that are encoded,
checksummed, sent, received, verified and decoded. The ratio is what to look at: both suffer alike
from whatever else the machine does.

    python bench/transport.py [--mebibytes 512] [--rounds 5]

Touches loopback TCP; forks one process, which ends with its parent's connection.
"""

import argparse
import multiprocessing
import select
import socket
import statistics
import time
from collections.abc import Callable

import numpy as np

from holdfast_agent.core.frames import MEBIBYTE
from holdfast_agent.core.memory_map import NO_PAGES
from holdfast_agent.core.peer_messages import PagesArrived
from holdfast_agent.transport.connection import FrameConnection
from holdfast_agent.transport.opening import accept, connect, listen
from holdfast_agent.transport.peer import FramePeer
from holdfast_agent.transport.tcp import TcpStream
from holdfast_api.words import Role

SLAB_BYTES = 4 * MEBIBYTE
PAGES_PER_SLAB = SLAB_BYTES // 4096
DEADLINE_NS = 120 * 10**9


def peer_over(sock: socket.socket, role: Role) -> FramePeer:
    """Return a peer on a connection that counts as greeted; HELLO is of no interest here."""
    connection = FrameConnection(
        TcpStream(sock),
        role=role,
        generation=1,
        silence_limit_seconds=60,
        keepalive_seconds=10,
        received_frames=1,
    )
    connection._encoder.sequence = 1  # noqa: SLF001 - see the docstring
    return FramePeer(connection, map_page_count=1 << 20, silence_limit_seconds=60)


def receive_plain(sock: socket.socket, size_bytes: int) -> None:
    """Read so many bytes into one buffer, over and over, and answer with one byte."""
    sock.setblocking(True)  # noqa: FBT003 - the standard library's signature
    buffer = np.empty(SLAB_BYTES, dtype=np.uint8).data
    for _ in range(size_bytes // SLAB_BYTES):
        filled = 0
        while filled < SLAB_BYTES:
            filled += sock.recv_into(buffer[filled:])
    sock.sendall(b".")


def send_plain(sock: socket.socket, slabs: list[np.ndarray], size_bytes: int) -> None:
    """Write slabs and wait for the answer."""
    sock.setblocking(True)  # noqa: FBT003
    for number in range(size_bytes // SLAB_BYTES):
        view = slabs[number % len(slabs)].reshape(-1).data
        while len(view):
            view = view[sock.sendmsg([view]) :]
    assert sock.recv(1) == b"."


def receive_framed(sock: socket.socket, size_bytes: int) -> None:
    """Receive pages, release them at once, and acknowledge the last."""
    peer = peer_over(sock, Role.BACKUP)
    page_count = 0
    while page_count * 4096 < size_bytes:
        message = peer.receive()
        if message is None:
            select.select([peer], [], [], 60)
            continue
        assert isinstance(message, PagesArrived)
        page_count += len(message.indexes)
        peer.release_buffers()
    peer.send_acknowledgement(1)


def send_framed(sock: socket.socket, slabs: list[np.ndarray], size_bytes: int) -> None:
    """Send slabs as PAGES frames, every page a run of its own, and wait for the answer."""
    peer = peer_over(sock, Role.PRIMARY)
    indexes = np.arange(0, 2 * PAGES_PER_SLAB, 2, dtype=np.int64)
    for number in range(size_bytes // SLAB_BYTES):
        peer.send_pages(1, indexes, slabs[number % len(slabs)], NO_PAGES)
    deadline = time.monotonic_ns() + DEADLINE_NS
    while peer.receive() is None:
        assert time.monotonic_ns() < deadline
        select.select([peer], [], [], 1)


def serve(listener: socket.socket, size_bytes: int, rounds: int) -> None:
    """Be the receiving process."""
    for turn in range(2 * rounds):
        select.select([listener], [], [], 60)
        sock = accept(listener)
        assert sock is not None
        with sock:
            (receive_plain, receive_framed)[turn % 2](sock, size_bytes)


def timed(
    send: Callable[[socket.socket, list[np.ndarray], int], None],
    address: str,
    slabs: list[np.ndarray],
    size_bytes: int,
) -> float:
    """Return gigabytes per second of one transfer."""
    with connect(address, 10) as sock:
        began = time.perf_counter()
        send(sock, slabs, size_bytes)
        return size_bytes / (time.perf_counter() - began) / 1e9


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mebibytes", type=int, default=512, help="per round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    size_bytes = max(options.mebibytes * MEBIBYTE // SLAB_BYTES, 1) * SLAB_BYTES
    random = np.random.default_rng(1)
    slabs = [
        random.integers(0, 255, (PAGES_PER_SLAB, 4096), dtype=np.uint8).copy() for _ in range(4)
    ]
    with listen("127.0.0.1:0") as listener:
        host, port = listener.getsockname()
        context = multiprocessing.get_context("fork")
        server = context.Process(target=serve, args=(listener, size_bytes, options.rounds))
        server.start()
        try:
            plain: list[float] = []
            framed: list[float] = []
            for _ in range(options.rounds):
                plain.append(timed(send_plain, f"{host}:{port}", slabs, size_bytes))
                framed.append(timed(send_framed, f"{host}:{port}", slabs, size_bytes))
            server.join(10)
        finally:
            server.kill()
            server.join()
    ratio = statistics.median(f / p for f, p in zip(framed, plain, strict=True))
    print(f"plain sockets  {statistics.median(plain):.2f} GB/s")
    print(f"PAGES frames   {statistics.median(framed):.2f} GB/s (checksummed on both sides)")
    print(f"ratio          {ratio:.2f}  (frames / plain, median of {options.rounds} rounds)")


if __name__ == "__main__":
    main()
