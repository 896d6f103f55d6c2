"""How fast PAGES frames travel with and without TLS, and what each side's processor does for it.

Two processes over loopback, as two workers would be. In turns, in one run: the bytes of a slab sent
with plain sendmsg and read with recv_into; the same slabs as PAGES frames that are encoded,
checksummed, sent, received, verified and decoded; and the same frames inside TLS 1.3. The ratios
are what to look at: all suffer alike from whatever else the machine does. Beside the throughput
stands what a core does: gigabytes for each second that it worked for one side.

    python bench/transport.py [--mebibytes 512] [--rounds 5]

Touches loopback TCP and a temporary folder with certificates; forks one process, which ends with
its parent's connection.
"""

import argparse
import multiprocessing
import select
import socket
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from holdfast_agent.core.frames import MEBIBYTE
from holdfast_agent.core.memory_map import NO_PAGES
from holdfast_agent.core.peer_messages import PagesArrived
from holdfast_agent.transport.connection import FrameConnection
from holdfast_agent.transport.identity import Identity
from holdfast_agent.transport.opening import accept, connect, listen
from holdfast_agent.transport.peer import FramePeer
from holdfast_agent.transport.stream import Stream
from holdfast_agent.transport.tcp import TcpStream
from holdfast_agent.transport.tls import TlsStream, shake_hands
from holdfast_api import pki
from holdfast_api.words import Role

SLAB_BYTES = 4 * MEBIBYTE
PAGES_PER_SLAB = SLAB_BYTES // 4096
DEADLINE_NS = 120 * 10**9
HANDSHAKE_SECONDS = 30.0
SOCKETS, TCP, TLS = "plain sockets", "PAGES frames", "frames in TLS"


class Figures(NamedTuple):
    """Of one transfer."""

    gigabytes_per_second: float
    sender_gigabytes_per_core_second: float
    receiver_gigabytes_per_core_second: float


def peer_over(stream: Stream, role: Role) -> FramePeer:
    """Return a peer on a connection that counts as greeted; HELLO is of no interest here."""
    connection = FrameConnection(
        stream,
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


def receive_framed(stream: Stream, size_bytes: int) -> None:
    """Receive pages, release them at once, and acknowledge the last."""
    peer = peer_over(stream, Role.BACKUP)
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


def send_framed(stream: Stream, slabs: list[np.ndarray], size_bytes: int) -> None:
    """Send slabs as PAGES frames, every page a run of its own, and wait for the answer."""
    peer = peer_over(stream, Role.PRIMARY)
    indexes = np.arange(0, 2 * PAGES_PER_SLAB, 2, dtype=np.int64)
    for number in range(size_bytes // SLAB_BYTES):
        peer.send_pages(1, indexes, slabs[number % len(slabs)], NO_PAGES)
    deadline = time.monotonic_ns() + DEADLINE_NS
    while peer.receive() is None:
        assert time.monotonic_ns() < deadline
        select.select([peer], [], [], 1)


def stream_over(sock: socket.socket, identity: Identity | None, *, is_server: bool) -> Stream:
    """Return the stream of a side; with an identity over TLS."""
    if identity is None:
        return TcpStream(sock)
    context = identity.context(is_server=is_server)
    return TlsStream(
        shake_hands(sock, context, is_server=is_server, timeout_seconds=HANDSHAKE_SECONDS)
    )


def serve(
    listener: socket.socket, turns: list[str], size_bytes: int, identity: Identity, tell: Connection
) -> None:
    """Be the receiving process; tells after each transfer what its processor did for it."""
    for kind in turns:
        select.select([listener], [], [], 60)
        sock = accept(listener)
        assert sock is not None
        if kind == SOCKETS:
            began = time.process_time()
            receive_plain(sock, size_bytes)
            sock.close()
        else:
            stream = stream_over(sock, identity if kind == TLS else None, is_server=True)
            began = time.process_time()
            receive_framed(stream, size_bytes)
            stream.close()
        tell.send(time.process_time() - began)


def transfer(
    kind: str,
    *,
    listener: socket.socket,
    slabs: list[np.ndarray],
    size_bytes: int,
    identity: Identity,
    told: Connection,
) -> Figures:
    """Send so much in one way; return the figures of both sides."""
    sock = connect("{}:{}".format(*listener.getsockname()), 10)
    stream = None
    if kind != SOCKETS:
        stream = stream_over(sock, identity if kind == TLS else None, is_server=False)
    began, processor_began = time.perf_counter(), time.process_time()
    if stream is None:
        send_plain(sock, slabs, size_bytes)
    else:
        send_framed(stream, slabs, size_bytes)
    took, processor_took = time.perf_counter() - began, time.process_time() - processor_began
    (stream or sock).close()
    assert told.poll(60)
    gigabytes = size_bytes / 1e9
    return Figures(gigabytes / took, gigabytes / processor_took, gigabytes / told.recv())


def run(size_bytes: int, rounds: int, folder: Path) -> dict[str, list[Figures]]:
    """Measure all ways in turns."""
    random = np.random.default_rng(1)
    slabs = [
        random.integers(0, 255, (PAGES_PER_SLAB, 4096), dtype=np.uint8).copy() for _ in range(4)
    ]
    pki.make_authority(folder / "pki")
    made = pki.issue(folder / "pki", "bench")
    identity = Identity("bench", made / "ca.pem", made / "host.pem", made / "host.key")
    turns = [SOCKETS, TCP, TLS] * rounds
    found: dict[str, list[Figures]] = {SOCKETS: [], TCP: [], TLS: []}
    context = multiprocessing.get_context("fork")
    told, tell = context.Pipe(duplex=False)
    with listen("127.0.0.1:0") as listener:
        server = context.Process(target=serve, args=(listener, turns, size_bytes, identity, tell))
        server.start()
        try:
            for kind in turns:
                figures = transfer(
                    kind,
                    listener=listener,
                    slabs=slabs,
                    size_bytes=size_bytes,
                    identity=identity,
                    told=told,
                )
                found[kind].append(figures)
            server.join(10)
        finally:
            server.kill()
            server.join()
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mebibytes", type=int, default=512, help="per round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    size_bytes = max(options.mebibytes * MEBIBYTE // SLAB_BYTES, 1) * SLAB_BYTES
    with tempfile.TemporaryDirectory() as folder:
        found = run(size_bytes, options.rounds, Path(folder))
    print(f"{'medians':16}{'GB/s':>8}{'sender':>12}{'receiver':>12}   (GB per core second)")
    for kind, figures in found.items():
        whole, sender, receiver = (
            statistics.median(column) for column in zip(*figures, strict=True)
        )
        print(f"{kind:16}{whole:8.2f}{sender:12.2f}{receiver:12.2f}")
    for kind, beside in ((TCP, SOCKETS), (TLS, TCP)):
        ratios = [
            statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
            for ours, theirs in zip(
                zip(*found[kind], strict=True), zip(*found[beside], strict=True), strict=True
            )
        ]
        print(f"{kind} / {beside}: " + ", ".join(f"{ratio:.2f}" for ratio in ratios))


if __name__ == "__main__":
    main()
