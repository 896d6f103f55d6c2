"""Staging memory in which a checkpoint is assembled: slabs that are kept, grown and given up. Pure.

Pure but for setting memory aside. A slab is `uint8[pages_per_slab, 4096]`, touched when it is made
so that no page fault falls into a pause.

One checkpoint at a time lives in the pool: `reserve` outside of the pause, `take` in the pause,
`give_back` when it was acknowledged or failed.

Strikes: a pool that a busy minute has grown shrinks again, slowly. A checkpoint that needs fewer
slabs than the pool has (smaller than the one the pool grew for) is a strike; one that needs them
all clears the strikes. After `strikes_to_halve` in a row the pool is halved, but not below what the
largest of those checkpoints needed, nor below one: the head slab stays, so an idle VM sets nothing
aside.

    1 <= slabs <= limit_bytes / slab_size_bytes

Source: Micro-Checkpointing for QEMU (Hines, 2014), `mc_slab_start`: strike, reset and halving are
its rules; the floor is ours, it halves below what is in use and grows again in the next pause.
"""

from holdfast_agent.core.memory_map import PAGE_SIZE_BYTES, PageRows, empty_rows

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
        self, slab_size_bytes: int, limit_bytes: int, *, strikes_to_halve: int = STRIKES_TO_HALVE
    ) -> None:
        """Make the head slab."""
        assert slab_size_bytes > 0, slab_size_bytes
        assert slab_size_bytes % PAGE_SIZE_BYTES == 0, slab_size_bytes
        assert limit_bytes >= slab_size_bytes, (limit_bytes, slab_size_bytes)
        assert strikes_to_halve > 0, strikes_to_halve
        self.strikes = 0
        self.halvings = 0
        self._slab_size_bytes = slab_size_bytes
        self._limit_bytes = limit_bytes
        self._strikes_to_halve = strikes_to_halve
        self._largest_need = 1
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

    def reserve(self, page_count: int) -> None:
        """Make sure that a `take` of so many pages allocates nothing. Call it outside of a pause.

        Raises SlabLimitReached.
        """
        self._grow_to(self._slabs_for(page_count))

    def take(self, page_count: int) -> list[PageRows]:
        """Return rows for `page_count` pages: views of slabs, full but the last.

        They are the caller's until `give_back`. Content is left from before. Raises
        SlabLimitReached; nothing is taken then.
        """
        assert not self._is_taken, "the checkpoint before was not given back"
        needed = self._slabs_for(page_count)
        self._grow_to(needed)
        self._count_strike(needed)
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
        keep = max(len(self._slabs) // 2, self._largest_need)
        del self._slabs[keep:]
        self.halvings += 1
        self.strikes = 0
        self._largest_need = 1

    def _count_strike(self, needed: int) -> None:
        if needed < len(self._slabs):
            self.strikes += 1
            self._largest_need = max(self._largest_need, needed)
        else:
            self.strikes = 0
            self._largest_need = 1

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
