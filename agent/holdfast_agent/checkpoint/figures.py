"""What a worker measures and reports: percentiles of the last checkpoints, sums. Pure.

Names of counters end in their unit; the agent exports them as they are.
"""

from collections.abc import Iterable

from holdfast_agent.checkpoint.capture import Checkpoint
from holdfast_agent.checkpoint.seeding import SeedingFigures
from holdfast_agent.checkpoint.worker_messages import Reported
from holdfast_agent.core.encoding import Encoding
from holdfast_agent.core.memory_map import PAGE_SIZE_BYTES
from holdfast_agent.core.statistics import Counters, Window
from holdfast_api.records import SeedingProgress, WorkerReport
from holdfast_api.words import Epoch, Generation, Role, VmId, WorkerPhase

REPORT_INTERVAL_NS = 500_000_000
NS_PER_MS = 1e6

PRIMARY_COUNTERS = (
    "checkpoints",
    "pages",
    "checkpoint_bytes",
    "pause_seconds",
    "stop_seconds",
    "harvest_seconds",
    "copy_seconds",
    "resume_seconds",
    "transmit_seconds",
    "acknowledgement_seconds",
    "seeding_seconds",
    "seeding_bytes",
    "seeding_pause_seconds_max",
    "seeding_brakes",
    "dropped_packets",
)
BACKUP_COUNTERS = ("checkpoints", "pages", "checkpoint_bytes", "apply_seconds", "seeding_bytes")


def progress_of(figures: SeedingFigures, now_ns: int) -> SeedingProgress:
    """Return how far seeding is, with its mean rate so far."""
    elapsed_ns = max(1, (figures.ended_ns or now_ns) - figures.began_ns)
    return SeedingProgress(
        round=figures.round,
        sent_bytes=figures.sent_bytes,
        total_bytes=figures.total_bytes,
        rate_bytes_per_second=figures.sent_bytes * 1e9 / elapsed_ns,
    )


class Figures:
    """What the figures of both sides have in common."""

    def __init__(self, vm: VmId, generation: Generation, counter_names: Iterable[str]) -> None:
        """Nothing measured yet; the first report is due at once."""
        self._vm = vm
        self._generation = generation
        self._counters = Counters(counter_names)
        self._connection: dict[str, float] = {}
        self.next_report_ns = 0

    def connection(self, counters: dict[str, float]) -> None:
        """Take over the connection's own counts of bytes and frames, rejected ones among them."""
        self._connection = counters

    def report_due(self, now_ns: int) -> bool:
        """Return whether a report is due, and set the time of the next one."""
        if now_ns < self.next_report_ns:
            return False
        self.next_report_ns = now_ns + REPORT_INTERVAL_NS
        return True

    def _all_counters(self) -> dict[str, float]:
        """Return our own counters and the connection's."""
        return self._counters.values() | self._connection


class PrimaryFigures(Figures):
    """Figures of a primary."""

    def __init__(
        self, *, vm: VmId, generation: Generation, tracker: str, plug: str, transport: str = ""
    ) -> None:
        """Nothing measured yet; the first report is due at once."""
        super().__init__(vm, generation, PRIMARY_COUNTERS)
        self._tracker = tracker
        self._plug = plug
        self._transport = transport
        self._pause_ms = Window()
        self._acknowledgement_ms = Window()
        self._checkpoint_bytes = Window()
        self._last_seeding: SeedingProgress | None = None
        self._encoding = ""
        self._encoding_reason = ""

    def captured(self, checkpoint: Checkpoint) -> None:
        """Count a captured checkpoint."""
        size_bytes = checkpoint.page_count * PAGE_SIZE_BYTES + len(checkpoint.device_state)
        self._pause_ms.add(checkpoint.pause_ns / NS_PER_MS)
        self._checkpoint_bytes.add(size_bytes)
        add = self._counters.add
        add("checkpoints")
        add("pages", checkpoint.page_count)
        add("checkpoint_bytes", size_bytes)
        add("pause_seconds", checkpoint.pause_ns / 1e9)
        add("stop_seconds", checkpoint.stop_ns / 1e9)
        add("harvest_seconds", checkpoint.harvest_ns / 1e9)
        add("copy_seconds", checkpoint.copy_ns / 1e9)
        add("resume_seconds", checkpoint.resume_ns / 1e9)

    def sent(self, transmit_ns: int) -> None:
        """Count the time a checkpoint took to leave."""
        self._counters.add("transmit_seconds", transmit_ns / 1e9)

    def acknowledged(self, since_capture_ns: int) -> None:
        """Count the time from the end of the pause to the acknowledgement."""
        self._acknowledgement_ms.add(since_capture_ns / NS_PER_MS)
        self._counters.add("acknowledgement_seconds", since_capture_ns / 1e9)

    def encoding(self, settled: Encoding, reason: str) -> None:
        """Remember how pages are encoded, and why."""
        self._encoding = settled.value
        self._encoding_reason = reason

    def dropped(self, packet_count: int) -> None:
        """Take over how many packets of the guest were dropped so far."""
        already = int(self._counters.values()["dropped_packets"])
        self._counters.add("dropped_packets", max(0, packet_count - already))

    def seeded(self, figures: SeedingFigures) -> None:
        """Count a finished seeding."""
        self._last_seeding = progress_of(figures, figures.ended_ns)
        self._counters.add("seeding_seconds", (figures.ended_ns - figures.began_ns) / 1e9)
        self._counters.add("seeding_bytes", figures.sent_bytes)
        self._counters.add("seeding_pause_seconds_max", figures.pause_ns_max / 1e9)
        self._counters.add("seeding_brakes", figures.brakes)

    def report(
        self,
        now_ns: int,
        *,
        phase: WorkerPhase,
        epoch: Epoch,
        acknowledged: Epoch,
        held_bytes: int,
        seeding: SeedingFigures | None,
        detail: str,
    ) -> Reported:
        """Return the report as of now."""
        counters = self._all_counters()
        return Reported(
            report=WorkerReport(
                vm=self._vm,
                generation=self._generation,
                role=Role.PRIMARY,
                phase=phase,
                detail=detail,
                epoch=epoch,
                acknowledged_epoch=acknowledged,
                pause_ms=self._pause_ms.percentiles(),
                acknowledgement_ms=self._acknowledgement_ms.percentiles(),
                checkpoint_bytes=self._checkpoint_bytes.percentiles(),
                held_bytes=held_bytes,
                checkpoints=int(counters["checkpoints"]),
                tracker=self._tracker,
                plug=self._plug,
                transport=self._transport,
                encoding=self._encoding,
                encoding_reason=self._encoding_reason,
                seeding=self._last_seeding if seeding is None else progress_of(seeding, now_ns),
                counters=counters,
            )
        )


class BackupFigures(Figures):
    """Figures of a backup."""

    def __init__(self, *, vm: VmId, generation: Generation) -> None:
        """Nothing measured yet; the first report is due at once."""
        super().__init__(vm, generation, BACKUP_COUNTERS)

    def pages(self, epoch: Epoch, page_count: int) -> None:
        """Count pages that arrived."""
        if epoch == 0:
            self._counters.add("seeding_bytes", page_count * PAGE_SIZE_BYTES)
        else:
            self._counters.add("pages", page_count)
            self._counters.add("checkpoint_bytes", page_count * PAGE_SIZE_BYTES)

    def applied(self, apply_ns: int) -> None:
        """Count a checkpoint that was applied."""
        self._counters.add("checkpoints")
        self._counters.add("apply_seconds", apply_ns / 1e9)

    def report(self, *, phase: WorkerPhase, acknowledged: Epoch, detail: str) -> Reported:
        """Return the report as of now."""
        counters = self._all_counters()
        return Reported(
            report=WorkerReport(
                vm=self._vm,
                generation=self._generation,
                role=Role.BACKUP,
                phase=phase,
                detail=detail,
                epoch=acknowledged,
                acknowledged_epoch=acknowledged,
                checkpoints=int(counters["checkpoints"]),
                counters=counters,
            )
        )
