"""One checkpoint on the primary: stop, harvest, copy, save, plug, resume. Over ports only.

This is the flow of the pause, in the order that makes it safe:

1. QEMU stops the guest, and saves its devices while we go on;
2. the dirty set is harvested, which clears it: from here on its pages are owed (INV-8);
3. what is owed is copied into slabs;
4. the epoch's output is closed off behind the plug, and only then
5. QEMU ends its save and the guest runs again.

If anything fails, the pages go back to what is owed, the closed output to the epoch that runs, the
guest runs again if it still can, and the output stays held; the next checkpoint takes everything
along. A harvest that failed left the dirty set unknown: from then on no checkpoint is taken.
"""

from collections.abc import Callable
from dataclasses import dataclass

from holdfast_agent.checkpoint.ports import DirtyTracker, MemoryCopier, OutputPlug, VirtualMachine
from holdfast_agent.core.failures import VirtualMachineFailed
from holdfast_agent.core.memory_map import PageIndexes, PageRows
from holdfast_agent.core.pages import OwedPages
from holdfast_agent.core.slabs import SlabPool
from holdfast_api.words import Epoch


@dataclass(frozen=True)
class Checkpoint:
    """A captured checkpoint, its pages still in slabs."""

    epoch: Epoch
    final: bool
    batches: tuple[tuple[PageIndexes, PageRows], ...]
    device_state: bytes
    page_count: int
    pause_ns: int
    """From before the guest was told to stop until QEMU said that it runs (or all was saved)."""
    stop_ns: int
    harvest_ns: int
    copy_ns: int
    resume_ns: int
    """From the end of the copy: the rest of the save, and until QEMU let the guest run."""


class Capturer:
    """Takes checkpoints of one VM. Owns nothing; whoever made the parts closes them."""

    def __init__(
        self,
        *,
        vm: VirtualMachine,
        plug: OutputPlug,
        tracker: DirtyTracker,
        memory: MemoryCopier,
        slabs: SlabPool,
        owed: OwedPages,
        now_ns: Callable[[], int],
    ) -> None:
        """Use these parts until the worker ends."""
        self._vm = vm
        self._plug = plug
        self._tracker = tracker
        self._memory = memory
        self._slabs = slabs
        self._owed = owed
        self._now_ns = now_ns
        self._is_staged = False
        self._is_blind = False

    def owe(self, indexes: PageIndexes) -> None:
        """Take over pages that were harvested but not sent (the rest of seeding)."""
        self._owed.owe(indexes)

    def take(self, epoch: Epoch, *, final: bool) -> Checkpoint:
        """Capture `epoch`; the guest runs again afterwards unless `final`.

        Raises VirtualMachineFailed: the pages are owed again, the guest runs if it can.
        """
        if self._is_blind:
            raise VirtualMachineFailed("the dirty set is unknown since an earlier harvest failed")
        began = self._now_ns()
        self._vm.begin_capture(final=final)
        self._vm.wait_standing()
        stopped = self._now_ns()
        try:
            self._is_blind = True
            self._owed.owe(self._tracker.harvest())
            self._is_blind = False
            harvested = self._now_ns()
            indexes = self._owed.take()
            batches = self._copy(indexes)
            self._plug.close_epoch()
            copied = self._now_ns()
            device_state = self._vm.finish_capture()
        except VirtualMachineFailed:
            self.failed()
            self._plug.reopen_epoch()
            self._vm.abandon_capture()
            raise
        ended = self._now_ns()
        return Checkpoint(
            epoch=epoch,
            final=final,
            batches=batches,
            device_state=device_state,
            page_count=len(indexes),
            pause_ns=ended - began,
            stop_ns=stopped - began,
            harvest_ns=harvested - stopped,
            copy_ns=copied - harvested,
            resume_ns=ended - copied,
        )

    def acknowledged(self) -> None:
        """The checkpoint taken last is the backup's now: its pages are no longer owed."""
        self._owed.acknowledged()
        self._slabs.give_back()
        self._is_staged = False
        self._vm.prepare()

    @property
    def is_short(self) -> bool:
        """`make_room` has something to do."""
        return self._slabs.is_short

    def make_room(self) -> None:
        """Grow the staging memory a little, ahead of the next checkpoint. Call it between turns."""
        self._slabs.grow_by_one()

    def failed(self) -> None:
        """The checkpoint taken last came to nothing: its pages are owed again (INV-8)."""
        self._owed.failed()
        if self._is_staged:
            self._slabs.give_back()
            self._is_staged = False

    def _copy(self, indexes: PageIndexes) -> tuple[tuple[PageIndexes, PageRows], ...]:
        batches: list[tuple[PageIndexes, PageRows]] = []
        position = 0
        slabs = self._slabs.take(len(indexes))
        self._is_staged = True
        for slab in slabs:
            part = indexes[position : position + len(slab)]
            rows = slab[: len(part)]
            self._memory.copy_out(part, rows)
            self._tracker.copied(part, rows)
            batches.append((part, rows))
            position += len(part)
        assert position == len(indexes), (position, len(indexes))
        return tuple(batches)
