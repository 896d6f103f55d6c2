"""Measures what encoding makes of a Redis guest's checkpoints, and what it costs.

A lab of two hosts; the guest's Redis holds documents and counters, and clients rewrite them all the
time: documents of some 600 bytes (a third of it random, the rest words that repeat) at keys of
which few are popular, and counters. The policy is changed while the guest runs.
Then the same over slower links, where `auto` has something to choose.

The bytes before encoding are those of pages that are not zero. CPU is that of the workers and
agents of each host, from /proc; the time spent encoding and decoding is measured in the workers.
"""

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from bench.protection import Bench, bench
from holdfast_api.messages import PolicyPatch
from holdfast_api.records import EncodingPolicy, Policy, WorkerReport
from holdfast_lab.clients import RedisConnection
from holdfast_lab.namespaces import run_tool
from holdfast_lab.vm import VmOptions

KEYS = 40_000
COUNTERS = 2_000
COMMANDS_AT_ONCE = 32
WRITERS = 2
SETTLE_SECONDS = 3.0
MEASURE_SECONDS = 10.0
CHOOSE_SECONDS = 30.0
RATES = ("1gbit", "100mbit")
WORDS = ("red", "green", "blue", "north", "south", "order", "basket", "customer", "invoice", "paid")


class Writers:
    """Clients that rewrite the guest's data, from threads of their own, until `stop`."""

    def __init__(self, made: Bench) -> None:
        """Fill Redis, then begin to write."""
        self._stopping = threading.Event()
        self.commands = 0
        self.fault = ""
        with made.lab.redis("vm", timeout_seconds=60) as connection:
            source = random.Random(1)
            for first in range(0, KEYS, COMMANDS_AT_ONCE):
                keys = range(first, min(first + COMMANDS_AT_ONCE, KEYS))
                connection.commands([_set(source, key) for key in keys])
        self._threads = [
            threading.Thread(
                target=self._write,
                args=(made.lab.redis("vm", timeout_seconds=60), random.Random(number)),
            )
            for number in range(WRITERS)
        ]
        for thread in self._threads:
            thread.start()

    def _write(self, connection: RedisConnection, source: random.Random) -> None:
        with connection:
            try:
                while not self._stopping.is_set():
                    connection.commands([_command(source) for _ in range(COMMANDS_AT_ONCE)])
                    self.commands += COMMANDS_AT_ONCE
            except OSError as error:
                self.fault = str(error)

    def stop(self) -> None:
        """End the threads."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(60)
        assert not self.fault, self.fault


def _command(source: random.Random) -> tuple[str | int, ...]:
    """Return a write: seven of ten set a document, the others count."""
    if source.random() < 0.7:
        return _set(source, min(int(source.paretovariate(0.5)), KEYS) - 1)
    return ("INCR", f"counter:{source.randrange(COUNTERS)}")


def _set(source: random.Random, key: int) -> tuple[str | int, ...]:
    words = " ".join(source.choices(WORDS, k=50))
    token = f"{source.getrandbits(800):0200x}"
    seen = source.randrange(1 << 32)
    return ("SET", f"document:{key}", f'{{"id":{key},"seen":{seen},"token":"{token}","{words}"}}')


@dataclass(frozen=True)
class Moment:
    """What was reported, and the CPU time that was used, at one moment."""

    primary: WorkerReport
    backup: WorkerReport
    cpu_seconds: tuple[float, float]
    at_seconds: float
    commands: int


def _moment(made: Bench, writers: Writers) -> Moment:
    """Wait for a new report and take the moment in which it was there."""
    reported = 0
    found: list[tuple[WorkerReport, WorkerReport]] = []

    def is_new() -> bool:
        now = made.client.protection("vm")
        report, backup = now.primary_report, now.backup_report
        if report is None or backup is None:
            return False
        assert report.generation == generation, "a failover: the machine is too busy to measure"
        nonlocal reported
        if reported in (0, report.checkpoints):
            reported = report.checkpoints
            return False
        found.append((report, backup))
        return True

    generation = made.client.protection("vm").generation
    made.until(is_new)
    cpu_seconds = (made.workers_cpu_seconds("h1"), made.workers_cpu_seconds("h2"))
    return Moment(*found[0], cpu_seconds, time.monotonic(), writers.commands)


def _measure(made: Bench, writers: Writers, wanted: EncodingPolicy, settle_seconds: float) -> None:
    made.client.change("vm", PolicyPatch(encoding=wanted))
    time.sleep(settle_seconds)
    first = _moment(made, writers)
    time.sleep(MEASURE_SECONDS)
    last = _moment(made, writers)

    def count(name: str) -> float:
        return last.primary.counters[name] - first.primary.counters[name]

    checkpoints = count("checkpoints")
    decode = last.backup.counters["decode_seconds"] - first.backup.counters["decode_seconds"]
    applied = last.backup.counters["checkpoints"] - first.backup.counters["checkpoints"]
    before, after = count("content_bytes"), count("encoded_bytes")
    cpu = [
        (last.cpu_seconds[side] - first.cpu_seconds[side]) / checkpoints * 1e3 for side in (0, 1)
    ]
    elapsed = last.at_seconds - first.at_seconds
    chosen = f" ({last.primary.encoding}: {last.primary.encoding_reason})"
    print(
        f"  {wanted + (chosen if wanted == 'auto' else ''):<11}"
        f"{before / checkpoints / 1e3:8.0f} kB -> {after / checkpoints / 1e3:6.0f} kB"
        f"  {before / max(after, 1):5.2f}x"
        f"  zero {count('zero_pages') / checkpoints:5.1f} pages"
        f"  delta {count('delta_pages') * 4096 / max(before, 1) * 100:3.0f} %"
        f"  encode {count('encode_seconds') / checkpoints * 1e3:5.2f} ms"
        f"  decode {decode / applied * 1e3:5.2f} ms"
        f"  CPU {cpu[0]:5.2f} + {cpu[1]:5.2f} ms"
        f"  pause {count('pause_seconds') / checkpoints * 1e3:5.2f} ms"
        f"  ack {count('acknowledgement_seconds') / checkpoints * 1e3:6.2f} ms"
        f"  {checkpoints / elapsed:4.1f} checkpoints/s"
        f"  {(last.commands - first.commands) / elapsed:6.0f} commands/s",
        flush=True,
    )


@contextlib.contextmanager
def _writing(made: Bench) -> Iterator[Writers]:
    writers = Writers(made)
    try:
        yield writers
    finally:
        writers.stop()


def encoding() -> None:
    """Each encoding in turn, at the speed of this machine, then over slower links."""
    with bench(VmOptions(memory_mb=384, shared_memory=True)) as made, _writing(made) as writers:
        made.protect(
            Policy(interval_ms=50, output_triggered=False, encoding="none", keepalive_misses=60)
        )
        ways: tuple[EncodingPolicy, ...] = ("none", "zstd", "delta", "delta-zstd")
        print("between two network namespaces, means for each checkpoint:")
        for wanted in ways:
            _measure(made, writers, wanted, SETTLE_SECONDS)
        _measure(made, writers, "auto", CHOOSE_SECONDS)
        for rate in RATES:
            for host in ("h1", "h2"):
                shaping = ["tc", "qdisc", "replace", "dev", "uplink", "root", "tbf"]
                limits = ["rate", rate, "burst", "512k", "latency", "200ms"]
                space = made.lab.network.namespace(host)
                run_tool(["ip", "netns", "exec", space, *shaping, *limits])
            print(f"over {rate}/s:")
            for wanted in ways:
                _measure(made, writers, wanted, SETTLE_SECONDS)
            _measure(made, writers, "auto", CHOOSE_SECONDS)
