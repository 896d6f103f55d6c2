"""Staging memory in which a checkpoint is assembled: slabs that are kept, grown and given up. Pure.

Pure but for setting memory aside. A slab is `uint8[pages_per_slab, 4096]`, touched when it is made
so that no page fault falls into a pause.

One checkpoint at a time lives in the pool: `take` in the pause, `give_back` when it was
acknowledged or failed. `grow_by_one` makes room ahead of the checkpoints, one slab at a time
between everything else: touching 4 MiB for the first time can take 20 ms, and a worker that
swallows much at once is as good as dead for so long.

A checkpoint wants room for twice its pages, though not for more than `headroom_bytes_max` beyond
them, so that a larger one after it does not grow the pool in its pause.

Strikes: a pool that a busy minute has grown shrinks again, slowly. A checkpoint that wants fewer
slabs than the pool has (smaller than the one the pool grew for) is a strike; one that wants them
all clears the strikes. After `strikes_to_halve` in a row the pool is halved, but not below what the
largest of those checkpoints wanted, nor below one: the head slab stays, so an idle VM sets nothing
aside.

    1 <= slabs <= limit_bytes / slab_size_bytes

Source: Micro-Checkpointing for QEMU (Hines, 2014), `mc_slab_start`: strike, reset and halving are
its rules; floor and headroom are ours, it halves below what is in use and grows in the next pause.
"""

from collections.abc import Callable

from holdfast_agent.core.memory_map import PAGE_SIZE_BYTES, PageRows, empty_rows

HEADROOM_BYTES_MAX = 64 << 20
"""More than this is not kept ready beyond what the checkpoint before needed."""
STRIKES_TO_HALVE = 200
"""MC counts ten seconds' worth of checkpoints; this is ten seconds at 50 ms."""


class SlabLimitReached(Exception):  # noqa: N818 - reads as a sentence where it is raised
    """A checkpoint is larger than the staging memory may become; nothing was taken."""

    def __init__(self, *, needed_bytes: int, limit_bytes: int) -> None:
        """Remember both sizes."""
        super().__init__(
            f"the checkpoint needs {needed_bytes} bytes of staging memory, the limit is "
            f"{limit_bytes}: raise the limit or shorten the interval"
        )
        self.needed_bytes = needed_bytes
        self.limit_bytes = limit_bytes


class SlabPool:
    """Slabs of equal size for one checkpoint at a time."""

    def __init__(
        self,
        slab_size_bytes: int,
        limit_bytes: int,
        *,
        headroom_bytes_max: int = HEADROOM_BYTES_MAX,
        strikes_to_halve: int = STRIKES_TO_HALVE,
        made: Callable[[PageRows], None] = lambda _: None,
    ) -> None:
        """Make the head slab; `made` is told of every slab when it is made."""
        assert slab_size_bytes > 0, slab_size_bytes
        assert slab_size_bytes % PAGE_SIZE_BYTES == 0, slab_size_bytes
        assert limit_bytes >= slab_size_bytes, (limit_bytes, slab_size_bytes)
        assert strikes_to_halve > 0, strikes_to_halve
        self.strikes = 0
        self.halvings = 0
        self._slab_size_bytes = slab_size_bytes
        self._limit_bytes = limit_bytes
        self._headroom_pages_max = headroom_bytes_max // PAGE_SIZE_BYTES
        self._strikes_to_halve = strikes_to_halve
        self._made = made
        self._wanted = 1
        self._largest_wanted = 1
        self._is_taken = False
        self._slabs: list[PageRows] = []
        self._grow_to(1)

    @property
    def pages_per_slab(self) -> int:
        """Pages that one slab holds."""
        return self._slab_size_bytes // PAGE_SIZE_BYTES

    @property
    def slab_count(self) -> int:
        """Slabs that are set aside."""
        return len(self._slabs)

    @property
    def allocated_bytes(self) -> int:
        """Memory that is set aside."""
        return len(self._slabs) * self._slab_size_bytes

    @property
    def is_short(self) -> bool:
        """The pool has less than the checkpoint taken last wants."""
        return len(self._slabs) < self._wanted

    def grow_by_one(self) -> None:
        """Set one more slab aside, if the pool is short of one."""
        if self.is_short:
            self._grow_to(len(self._slabs) + 1)

    def take(self, page_count: int) -> list[PageRows]:
        """Return rows for `page_count` pages: views of slabs, full but the last.

        They are the caller's until `give_back`. Content is left from before. Raises
        SlabLimitReached; nothing is taken then.
        """
        assert not self._is_taken, "the checkpoint before was not given back"
        needed = self._slabs_for(page_count)
        self._grow_to(needed)
        headroom = min(page_count, self._headroom_pages_max)
        limit = self._limit_bytes // self._slab_size_bytes
        self._wanted = max(1, min(self._slabs_for(page_count + headroom), limit))
        self._count_strike()
        self._is_taken = True
        views: list[PageRows] = []
        for slab in self._slabs[:needed]:
            views.append(slab[: min(page_count, self.pages_per_slab)])
            page_count -= len(views[-1])
        return views

    def give_back(self) -> None:
        """End the use of what was taken; a pool with too many strikes is halved now."""
        assert self._is_taken, "nothing was taken"
        self._is_taken = False
        if self.strikes < self._strikes_to_halve:
            return
        keep = max(len(self._slabs) // 2, self._largest_wanted)
        del self._slabs[keep:]
        self.halvings += 1
        self.strikes = 0
        self._largest_wanted = 1

    def _count_strike(self) -> None:
        if self._wanted < len(self._slabs):
            self.strikes += 1
            self._largest_wanted = max(self._largest_wanted, self._wanted)
        else:
            self.strikes = 0
            self._largest_wanted = 1

    def _slabs_for(self, page_count: int) -> int:
        assert page_count >= 0, page_count
        return -(-page_count // self.pages_per_slab)

    def _grow_to(self, slab_count: int) -> None:
        if slab_count * self._slab_size_bytes > self._limit_bytes:
            raise SlabLimitReached(
                needed_bytes=slab_count * self._slab_size_bytes, limit_bytes=self._limit_bytes
            )
        while len(self._slabs) < slab_count:
            slab = empty_rows(self.pages_per_slab)
            slab.fill(0)  # np.zeros would leave the page faults to the pause
            self._slabs.append(slab)
            self._made(slab)
