"""Measures whole protections in a lab: real QEMU, etcd, agents and a controller on one machine.

Everything is bounded in count and time, stays in the lab's network namespaces and is taken down at
the end. Figures are medians unless they say otherwise.
"""

import contextlib
import mmap
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from holdfast_agent.hypervisor.qmp import QmpConnection
from holdfast_api.client import HoldfastClient
from holdfast_api.errors import HoldfastError
from holdfast_api.records import Policy, Protection
from holdfast_api.words import EventKind, Phase
from holdfast_lab.clients import CountingClient
from holdfast_lab.lab import Lab
from holdfast_lab.namespaces import run_tool
from holdfast_lab.vm import VmOptions

WAIT_SECONDS = 60.0
MEASURE_SECONDS = 12.0
MEBIBYTE = 1 << 20


class Bench:
    """A lab, a client of its controller, and one VM called `vm`."""

    def __init__(self, lab: Lab, options: VmOptions) -> None:
        """Start the VM on h1; wait until the controller knows it and its guest does its work."""
        self.lab = lab
        self.client = HoldfastClient([lab.url], timeout_seconds=10)
        lab.run_vm("vm", "h1", options)
        self.until(lambda: self.client.vm("vm").host == "h1")
        working = b"guest: rewriting" if options.dirty_pps else b"guest: starting redis"
        self.until(lambda: working in lab.log("console vm").read_bytes())

    def until(self, probe: Callable[[], bool], seconds: float = WAIT_SECONDS) -> None:
        """Poll until `probe` says yes."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(HoldfastError):
                if probe():
                    return
            time.sleep(0.02)
        raise TimeoutError("the lab did not come to where the measurement begins")

    def protect(self, policy: Policy, *, primary: str | None = None) -> Protection:
        """Protect the VM and wait until it is."""
        self.client.protect("vm", policy=policy)
        return self.protected(primary)

    def protected(self, primary: str | None = None) -> Protection:
        """Wait until the VM is protected (on `primary`)."""

        def ready() -> bool:
            now = self.client.protection("vm")
            return now.phase is Phase.PROTECTED and primary in (None, now.primary)

        self.until(ready)
        return self.client.protection("vm")

    def workers_cpu_seconds(self, host: str) -> float:
        """Return the CPU time that the worker and the agent of a host have used."""
        ticks = 0
        for pid in run_tool(["ip", "netns", "pids", self.lab.network.namespace(host)]).split():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                if b"holdfast_agent" in command:
                    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                    ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def bench(options: VmOptions, hosts: int = 2) -> Iterator[Bench]:
    """Bring up a lab with one VM; take it down at the end."""
    with Lab.up(hosts, f"bench{os.getpid()}") as lab:
        made = Bench(lab, options)
        try:
            yield made
        finally:
            made.client.close()


def _numpy_copy_ms(memory_mb: int, page_count: int) -> float:
    """Return the time of a plain copy of as many random pages out of as much memory."""
    pages = np.ones((memory_mb * MEBIBYTE // 4096, 4096), dtype=np.uint8)
    out = np.empty((page_count, 4096), dtype=np.uint8)
    generator = np.random.default_rng(1)
    times = []
    for _ in range(100):
        chosen = np.sort(generator.choice(len(pages), page_count, replace=False))
        began = time.perf_counter()
        np.take(pages, chosen, axis=0, out=out, mode="clip")
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def _own_pause_ms(qmp_socket: Path) -> float:
    """Return the time of QEMU's own stop, device-state save and cont, sent in one write."""
    qmp = QmpConnection.connect(str(qmp_socket))
    times = []
    try:
        for _ in range(100):
            began = time.perf_counter()
            tickets = [
                qmp.queue("stop"),
                qmp.queue("xen-save-devices-state", {"filename": "/dev/null", "live": False}),
                qmp.queue("cont"),
            ]
            for ticket in tickets:
                qmp.wait(ticket)
            times.append((time.perf_counter() - began) * 1e3)
            time.sleep(0.02)
    finally:
        qmp.close()
    return statistics.median(times)


def _pause_of(name: str, options: VmOptions, interval_ms: int) -> None:
    with bench(options) as made:
        own_ms = _own_pause_ms(made.lab.folder.run("h1") / "vms" / "vm.qmp")
        made.protect(Policy(interval_ms=interval_ms, min_interval_ms=5, output_triggered=False))
        time.sleep(MEASURE_SECONDS)
        report = made.client.protection("vm").primary_report
        assert report is not None
        counters = report.counters
        checkpoints = counters["checkpoints"]
        pages = int(counters["pages"] / checkpoints)
        copy_ms = _numpy_copy_ms(options.memory_mb, pages)
        parts = ", ".join(
            f"{part} {counters[f'{part}_seconds'] / checkpoints * 1e3:.2f}"
            for part in ("stop", "harvest", "copy", "resume", "transmit")
        )
        print(
            f"{name}: {int(checkpoints)} checkpoints of {pages} pages every {interval_ms} ms: "
            f"pause median {report.pause_ms.p50:.2f} ms, p99 {report.pause_ms.p99:.2f}, "
            f"max {report.pause_ms.max:.2f}\n"
            f"  means in ms: {parts}\n"
            f"  QEMU's own stop+save+cont {own_ms:.2f} ms, numpy copy of as many pages "
            f"{copy_ms:.2f} ms: (pause - own) / copy = "
            f"{(report.pause_ms.p50 - own_ms) / copy_ms:.2f}\n"
            f"  acknowledged {report.acknowledgement_ms.p50:.2f} ms after the pause (median)"
        )


def pause() -> None:
    """Guest A: 256 MiB, 20,000 pages a second at 20 ms. Guest B: 2 GiB, some 4,000 in each."""
    small = VmOptions(memory_mb=256, shared_memory=True, dirty_mb=64, dirty_pps=20_000)
    _pause_of("A", small, 20)
    large = VmOptions(memory_mb=2048, shared_memory=True, dirty_mb=1024, dirty_pps=27_000)
    _pause_of("B", large, 150)


def latency() -> None:
    """One connection, PING after PING, first unprotected, then by policy."""
    with bench(VmOptions(memory_mb=256)) as made:
        print(f"unprotected: {_ping_ms(made):.2f} ms")
        made.protect(Policy())
        print(f"output-triggered (default policy): {_ping_ms(made):.2f} ms")
        made.protect(Policy(interval_ms=20, output_triggered=False))
        print(f"fixed interval of 20 ms: {_ping_ms(made):.2f} ms")


def _ping_ms(made: Bench) -> float:
    connection = made.lab.redis("vm")
    times = []
    try:
        for _ in range(300):
            began = time.perf_counter()
            connection.command("PING")
            times.append((time.perf_counter() - began) * 1e3)
    finally:
        connection.close()
    return statistics.median(times)


def idle() -> None:
    """CPU of worker and agent on each side at 50 ms, for a guest that does nothing."""
    with bench(VmOptions(memory_mb=256)) as made:
        made.protect(Policy(interval_ms=50))
        time.sleep(2)
        before = {host: made.workers_cpu_seconds(host) for host in ("h1", "h2")}
        began = time.monotonic()
        time.sleep(MEASURE_SECONDS)
        elapsed = time.monotonic() - began
        for host, role in (("h1", "primary"), ("h2", "backup")):
            used = made.workers_cpu_seconds(host) - before[host]
            print(f"{role}: {used / elapsed * 100:.1f} % of one core")


def seeding() -> None:
    """Fill a backup with a guest whose memory is in use, over loopback: private, then shared."""
    for shared in (False, True):
        _seeding_of(VmOptions(memory_mb=2048, shared_memory=shared, dirty_mb=1024, dirty_pps=200))


def _touch_and_free(size_bytes: int) -> float:
    """Use so much memory for the first time; return at how many MB/s.

    A virtual machine's host often backs memory only when it is used, and takes it back soon after:
    the backup's memory would then be paid for at this rate, which has nothing to do with seeding.
    """
    began = time.perf_counter()
    with mmap.mmap(-1, size_bytes) as memory:
        np.frombuffer(memory, dtype=np.uint8).fill(1)
    return size_bytes / (time.perf_counter() - began) / 1e6


def _seeding_of(options: VmOptions) -> None:
    with bench(options) as made:
        touching = _touch_and_free(3 << 30)
        made.protect(Policy())

        def counted() -> bool:
            seen = made.client.protection("vm").primary_report
            return seen is not None and seen.counters["seeding_seconds"] > 0

        made.until(counted)
        report = made.client.protection("vm").primary_report
        assert report is not None
        assert report.seeding is not None
        done = report.seeding
        time.sleep(3)
        after = made.client.protection("vm").primary_report
        assert after is not None
        kind = "shared" if options.shared_memory else "private"
        print(
            f"{kind} memory, on a machine that gives it out at {touching:.0f} MB/s: "
            f"{done.sent_bytes / MEBIBYTE:.0f} MiB in {done.round} rounds: "
            f"{done.rate_bytes_per_second / 1e6:.0f} MB/s; longest stand of the guest for a "
            f"round {report.counters['seeding_pause_seconds_max'] * 1e3:.2f} ms, then checkpoints "
            f"with a pause of {after.pause_ms.p50:.2f} ms (median)"
        )


def counting() -> None:
    """Count to 10,000 through three deaths of the host; every reply is checked."""
    with bench(VmOptions(memory_mb=256), hosts=3) as made:
        protection = made.protect(Policy())
        client = CountingClient(made.lab.redis("vm", timeout_seconds=WAIT_SECONDS))
        client.start()
        for death in range(1, 4):
            assert client.wait_for_count(death * 2000, WAIT_SECONDS), client.seen()
            _kill_and_report(made, client, protection)
            made.lab.revive(protection.primary)
            assert protection.backup is not None
            protection = made.protected(protection.backup)
        assert client.wait_for_count(10_000, 3 * WAIT_SECONDS), client.seen()
        seen = client.stop()
        print(
            f"{seen.replies} replies, {len(seen.wrong)} out of order, lost or repeated; "
            f"connection: {seen.fault or 'never reset'}"
        )


def _kill_and_report(made: Bench, client: CountingClient, protection: Protection) -> None:
    after = max((event.position for event in made.client.events(0)), default=0)
    killed_ns = time.monotonic_ns()
    killed_at = made.lab.kill(protection.primary)
    replied_at = client.wait_for_reply(after=killed_at + 0.02, deadline_seconds=WAIT_SECONDS)
    assert replied_at is not None, client.seen()
    made.until(
        lambda: any(e.kind is EventKind.PROMOTED for e in made.client.events(after)), WAIT_SECONDS
    )
    (event,) = [e for e in made.client.events(after) if e.kind is EventKind.PROMOTED]
    evidence = event.evidence
    suspected, running = (
        evidence.get("suspected_at_monotonic_ns"),
        evidence.get("running_at_monotonic_ns"),
    )
    assert isinstance(suspected, int)
    assert isinstance(running, int)
    print(
        f"kill of {protection.primary}: suspected after {(suspected - killed_ns) / 1e6:.0f} ms, "
        f"claim {float(evidence['claim_ms'] or 0):.1f} ms, "
        f"promotion {float(evidence['promotion_ms'] or 0):.1f} ms, "
        f"running {(running - killed_ns) / 1e6:.0f} ms after the kill, "
        f"next reply {(replied_at - killed_at) * 1e3:.0f} ms after it"
    )
