"""How fast PAGES frames travel over RDMA beside TCP, both between two processes of one host.

To be run where an RDMA device is, soft-RoCE in a booted host for example: as it is emulated there,
nothing but the ratio means anything, and of soft-RoCE not even that for a real NIC.

    python bench/rdma.py ADDRESS [--mebibytes 64] [--rounds 3]

The slabs are registered once, as a worker's are. `unregistered` is the same without it. `posting`
is how long the interpreter is held by one write of a slab, `registering` by one registration.

Talks TCP and RDMA at ADDRESS; forks one process, which ends with its parent's connection.
"""

import argparse
import multiprocessing
import select
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np

from holdfast_agent.core.frames import MEBIBYTE, FrameKind
from holdfast_agent.core.payloads import RdmaOffer
from holdfast_agent.transport.connection import FrameConnection
from holdfast_agent.transport.opening import accept, connect, listen
from holdfast_agent.transport.rdma.opening import RdmaListener
from holdfast_agent.transport.rdma.opening import connect as connect_rdma
from holdfast_agent.transport.rdma.stream import RdmaStream
from holdfast_agent.transport.stream import Stream
from holdfast_agent.transport.tcp import TcpStream
from holdfast_api.words import Role

SLAB_BYTES = 4 * MEBIBYTE
WAIT_SECONDS = 120
KINDS = ("tcp", "rdma", "unregistered")


def over(stream: Stream, role: Role) -> FrameConnection:
    """Return a connection that counts as greeted."""
    connection = FrameConnection(
        stream,
        role=role,
        generation=1,
        silence_limit_seconds=60,
        keepalive_seconds=10,
        received_frames=1,
    )
    connection._encoder.sequence = 1  # noqa: SLF001 - HELLO is of no interest here
    return connection


def backup_of(kind: str, address: str, offers: Connection) -> Stream:
    """Wait for the sender, after telling it where."""
    if kind == "tcp":
        with listen(f"{address}:0") as listener:
            offers.send(listener.getsockname()[1])
            select.select([listener], [], [], WAIT_SECONDS)
            sock = accept(listener)
        assert sock is not None
        return TcpStream(sock)
    waiting = RdmaListener(address)
    offers.send(waiting.offer.model_dump_json())
    while (stream := waiting.advance()) is None:
        select.select([waiting], [], [], WAIT_SECONDS)
    return stream


def serve(address: str, frame_count: int, rounds: int, offers: Connection) -> None:
    """Be the receiving process."""
    for number in range(rounds * len(KINDS)):
        backup = over(backup_of(KINDS[number % len(KINDS)], address, offers), Role.BACKUP)
        for _ in range(frame_count):
            assert backup.wait_frame(time.monotonic_ns() + WAIT_SECONDS * 10**9) is not None
        backup.send(FrameKind.ACKNOWLEDGE, 1)
        backup.discard_until_end(time.monotonic_ns() + WAIT_SECONDS * 10**9)
        backup.close()


def timed(kind: str, address: str, frame_count: int, offers: Connection) -> float:
    """Return megabytes per second of one transfer."""
    slabs = [np.random.default_rng(n).integers(0, 256, SLAB_BYTES, np.uint8) for n in range(4)]
    stream: Stream
    if kind == "tcp":
        stream = TcpStream(connect(f"{address}:{offers.recv()}", WAIT_SECONDS))
    else:
        offer = RdmaOffer.model_validate_json(offers.recv())
        stream = connect_rdma(address, offer, WAIT_SECONDS)
    primary = over(stream, Role.PRIMARY)
    for slab in slabs if kind == "rdma" else ():
        primary.register(slab)
    began = time.perf_counter()
    for number in range(frame_count):
        primary.send(FrameKind.PAGES, 1, [slabs[number % len(slabs)]])
    assert primary.wait_frame(time.monotonic_ns() + WAIT_SECONDS * 10**9) is not None
    seconds = time.perf_counter() - began
    if kind == "rdma":
        held(stream)
    primary.close()
    return frame_count * SLAB_BYTES / seconds / 1e6


def held(stream: Stream) -> None:
    """Say how long pyverbs holds the interpreter's lock."""
    assert isinstance(stream, RdmaStream)
    slab = np.zeros(SLAB_BYTES, dtype=np.uint8)
    registering = milliseconds(lambda: stream.register(slab))
    posting = milliseconds(lambda: stream.send([slab.data]))
    print(f"   posting {posting:.3f} ms, registering 4 MiB {registering:.3f} ms", flush=True)


def milliseconds(call: Callable[[], object]) -> float:
    """Return how long one call takes."""
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3


def main() -> None:
    """Measure the kinds in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address")
    parser.add_argument("--mebibytes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    frame_count = options.mebibytes * MEBIBYTE // SLAB_BYTES
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(
        target=serve, args=(options.address, frame_count, options.rounds, theirs)
    )
    child.start()
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(options.rounds):
        for kind in KINDS:
            found[kind].append(timed(kind, options.address, frame_count, ours))
    child.join(WAIT_SECONDS)
    for kind, rates in found.items():
        print(f"{kind:13} {statistics.median(rates):7.1f} MB/s  {[round(r) for r in rates]}")


if __name__ == "__main__":
    main()
