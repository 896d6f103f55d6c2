"""The ports between the checkpoint loop and the world: what the loop needs, whoever provides it.

Pure declarations. The real adapters live in `hypervisor/`, `memory/`, `network/` and `transport/`;
they match these Protocols by shape and import nothing from here.

A capture uses them in this order, and the order is the safety:

    vm.begin_capture(final=...)   the guest is being stopped
    vm.wait_standing()            it stands, and QEMU saves its devices
    tracker.harvest()             which clears the dirty set: from here on the pages are owed
    memory.copy_out(...)
    plug.close_epoch()            the epoch's output is closed off; only now may the guest run
    vm.finish_capture()           it runs, unless the capture was final

If anything of it fails: vm.abandon_capture(), plug.reopen_epoch(), and the pages stay owed.
"""

from collections.abc import Sequence
from typing import Protocol

from holdfast_agent.checkpoint.worker_messages import ToAgent, ToWorker
from holdfast_agent.core.encoding import Encoding
from holdfast_agent.core.failures import VirtualMachineFailed
from holdfast_agent.core.memory_map import MemoryMap, PageIndexes, PageRows
from holdfast_agent.core.peer_messages import PeerMessage
from holdfast_api.words import Epoch

__all__ = [
    "DirtyTracker",
    "MachineEvent",
    "MemoryCopier",
    "OutputPlug",
    "OutputSignal",
    "Standby",
    "VirtualMachine",
    "VirtualMachineFailed",
]


class VirtualMachine(Protocol):
    """The QEMU of a VM that runs: the primary's side. One user at a time; not thread-safe."""

    def prepare(self) -> None:
        """Do beforehand what can be done of the next capture; costs the guest nothing."""

    def begin_capture(self, *, final: bool) -> None:
        """Let QEMU stop the guest and save its devices; returns at once.

        After a `final` capture the guest goes on standing.
        """

    def wait_standing(self) -> None:
        """Return when the guest stands still and what its devices had begun is done.

        Raises VirtualMachineNotRunning when it stood already, else VirtualMachineFailed; the guest
        is then left as it was.
        """

    def finish_capture(self) -> bytes:
        """Return the device state; when it returns, the guest runs unless the capture was final.

        Raises VirtualMachineFailed: there is no checkpoint; the guest runs if QEMU lets it.
        """

    def abandon_capture(self) -> None:
        """End a capture that will be no checkpoint: the guest runs again if it did. Idempotent."""

    def resume(self) -> None:
        """Let the guest run; returns when QEMU has said so."""

    def stop(self) -> bool:
        """Stop the guest outside of a capture; its requests are drained then.

        Returns whether it ran: one that somebody else stopped is not ours to resume.
        """

    def poll_events(self) -> Sequence["MachineEvent"]:
        """Return the events QEMU sent meanwhile, without waiting."""

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when events (or the end) arrive."""

    def kill(self) -> None:
        """End QEMU by SIGKILL; returns when the process is gone. Idempotent.

        Never by `quit`: an orderly exit flushes QEMU's filters, and held output would leave.
        """

    def close(self) -> None:
        """Let go of QEMU and leave it running as it is."""


class MachineEvent(Protocol):
    """Something QEMU said by itself."""

    @property
    def name(self) -> str:
        """QMP's name: SHUTDOWN, RESET, STOP, ..., or `GONE` when QEMU ended or hung up."""

    @property
    def reason(self) -> str:
        """For SHUTDOWN QMP's cause (guest-shutdown, host-signal, ...); else empty."""


class MemoryCopier(Protocol):
    """The memory of one QEMU, ours or the standby's, addressed by page index."""

    @property
    def memory_map(self) -> MemoryMap:
        """How pages are numbered."""

    def copy_out(self, indexes: PageIndexes, out: PageRows) -> None:
        """Copy the pages `indexes` (sorted) into the first `len(indexes)` rows of `out`."""

    def copy_in(self, indexes: PageIndexes, rows: PageRows) -> None:
        """Write `rows[i]` to page `indexes[i]` (sorted)."""

    def populated(self) -> PageIndexes:
        """Return all pages that may differ from zero; allocates nothing in the guest."""

    def close(self) -> None:
        """Unmap and close; the guest is untouched."""


class DirtyTracker(Protocol):
    """Knows which pages were written since the last harvest. It was started while the guest stood.

    Harvests happen while the guest stands: a device of QEMU that pinned a page before a harvest
    and writes to it after is drained by `stop`, and by nothing else.
    """

    @property
    def name(self) -> str:
        """`pagemap-scan`, `soft-dirty` or `compare`."""

    @property
    def can_harvest_running(self) -> bool:
        """Whether no write is lost by a harvest while the guest runs (see above for devices)."""

    def harvest(self) -> PageIndexes:
        """Return the pages written since the last harvest (or the start), and clear them.

        Whoever calls owes these pages to the backup until they are acknowledged (INV-8). Raises
        VirtualMachineFailed when the set is unknown, for good.
        """

    def copied(self, indexes: PageIndexes, rows: PageRows) -> None:
        """Learn what was copied of the harvested pages; a tracker by comparison needs it."""

    def close(self) -> None:
        """Stop tracking; the guest runs on untouched. Idempotent."""


class OutputPlug(Protocol):
    """Holds the guest's output by epoch.

    At most two epochs are held: the one just closed and the one that runs. The filters or qdiscs
    exist from `install` to `remove`.
    """

    @property
    def name(self) -> str:
        """`qdisc` or `filter`; `unbuffered` when nothing is held (unsafe)."""

    def install(self) -> None:
        """Set up, letting output flow. Also cleans up what an earlier holder of this VM left."""

    def hold(self) -> None:
        """From now on nothing leaves (INV-7): the first epoch begins."""

    def close_epoch(self) -> None:
        """The current epoch is closed and the next one open when this returns.

        Only called while the guest stands still.
        """

    def reopen_epoch(self) -> None:
        """Make the epoch closed last, if it was not released, part of the one that runs."""

    def release_one(self) -> None:
        """Let the closed epoch's output go; the open epoch's stays. Does not wait for QEMU."""

    def release_all(self) -> None:
        """Let everything go and hold nothing more."""

    def held_bytes(self) -> int:
        """Bytes of output that wait, as far as known."""

    def dropped_packets(self) -> int:
        """Packets dropped since `install` because more than the limit was held, as far as known."""

    def change_limit(self, limit_bytes: int) -> None:
        """Hold at most so much of each NIC from now on; what comes beyond it is dropped."""

    def remove(self) -> None:
        """Take everything out, after `release_all`. Idempotent."""

    def discard(self) -> None:
        """The VM is gone: what is held never leaves; take everything out. Idempotent."""


class OutputSignal(Protocol):
    """Says that output waits. Readable means: drain it."""

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when the guest sent something."""

    def drain(self) -> int:
        """Read all that is there without waiting; returns the bytes of output seen."""


class Standby(Protocol):
    """The backup's QEMU: memory kept current, not running."""

    @property
    def memory(self) -> MemoryCopier:
        """Its memory, in the primary's numbering."""

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when the standby's QEMU says something."""

    def has_ended(self) -> bool:
        """Return whether the standby's QEMU is gone; reads what it said meanwhile."""

    def promote(self, device_state: bytes) -> None:
        """Load the device state and run; returns when the guest runs and has announced itself.

        Raises VirtualMachineFailed; the standby is then good for nothing.
        """

    def destroy(self) -> None:
        """End the QEMU and remove its taps and files. Idempotent."""


class PeerCounters(Protocol):
    """What went over a connection, or was done to it."""

    def values(self) -> dict[str, float]:
        """Return them by name."""


class Peer(Protocol):
    """The connection to the other worker: checked frames in, checked frames out."""

    @property
    def counters(self) -> PeerCounters:
        """What went over the connection so far."""

    @property
    def coding(self) -> PeerCounters:
        """What encoding and decoding did to the pages of checkpoints so far."""

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when something arrives."""

    def use_encoding(self, encoding: Encoding) -> None:
        """Encode pages like this from the next `send_pages` on."""

    def send_pages(
        self, epoch: Epoch, indexes: PageIndexes, rows: PageRows, zero_indexes: PageIndexes
    ) -> None:
        """Send pages of `epoch`, 0 for seeding. Raises PeerLost."""

    def send_checkpoint(self, epoch: Epoch, device_state: bytes, *, final: bool) -> None:
        """End `epoch`; the backup can now verify it as a whole. Raises PeerLost."""

    def send_acknowledgement(self, epoch: Epoch) -> None:
        """Say that `epoch` is whole, verified and staged. Raises PeerLost."""

    def send_farewell(self, code: str, explanation: str) -> None:
        """Say why this connection ends; the peer may not hear it."""

    def receive(self) -> PeerMessage | None:
        """Return the next message that is there, or None. Raises PeerLost, FrameRejected."""

    def be_strict(self) -> None:
        """Seeding is over: from now on silence counts by the policy's limit.

        While a backup is filled a false suspicion costs a whole seeding and a late one nothing but
        time: nobody relies on it yet.
        """

    def tend(self, now_ns: int) -> None:
        """Send a keep-alive if one is due. Raises PeerLost when the peer was silent too long."""

    def next_due_ns(self) -> int:
        """Return when `tend` must be called at the latest."""

    def release_buffers(self) -> None:
        """All rows handed out so far are no longer looked at; their buffers may be reused."""

    def close(self) -> None:
        """Close the connection. Idempotent."""


class AgentPort(Protocol):
    """The agent as its worker sees it; see `checkpoint.worker_messages`."""

    @property
    def is_drained(self) -> bool:
        """Nothing waits to be sent."""

    def filenos(self) -> list[int]:
        """Return the descriptors whose readability means: call `receive`."""

    def send(self, message: ToAgent) -> None:
        """Send without waiting."""

    def flush(self) -> None:
        """Send what is queued, as far as it fits."""

    def receive(self) -> list[tuple[ToWorker, int | None]]:
        """Return all messages that are there, each with the descriptor it carried."""
