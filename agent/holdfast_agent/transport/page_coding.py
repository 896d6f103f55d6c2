"""Encodes pages before they are sent, decodes what arrived. Touches nothing but memory.

Puts the pure parts together with zstd: what a delta is taken against (`core/delta_cache`), what the
content of a frame looks like (`core/page_content`), and the time that all of it takes. Which
encoding is used is the driver's to say (`core/encoding`).

Decoded pages lie in memory of their own until `release`; the frame they came from need not be kept.
It is accounted for before it is set aside, with what the connection keeps.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

from holdfast_agent.core.delta_cache import DeltaCache
from holdfast_agent.core.encoding import Encoding
from holdfast_agent.core.frames import FrameLimits, Part
from holdfast_agent.core.memory_map import PAGE_SIZE_BYTES, PageIndexes, PageRows, empty_rows
from holdfast_agent.core.page_content import (
    FLAG_DELTA,
    Content,
    ContentHead,
    ReadBase,
    decode_content,
    encoded_content,
    plain_content,
)
from holdfast_agent.core.payloads import Pages, encode_pages
from holdfast_agent.transport.zstd_blocks import ZstdBlocks
from holdfast_api.words import Epoch

MAX_FREE_SLABS = 8
SMALL_PAGES = 16
"""Fewer pages get memory of their own; a slab would be set aside for little."""
PLAIN_FRAMES_TO_CLEAR = 512
"""After so many frames without a delta the cache gives its memory back: no trial takes longer."""


@dataclass
class CodingCounters:
    """What was done to the pages of checkpoints; monotonic. Seeding is not in it."""

    zero_pages: int = 0
    delta_pages: int = 0
    content_bytes: int = 0
    """Of pages that are not zero, as they are in memory."""
    encoded_bytes: int = 0
    """The same as they were sent."""
    encode_seconds: float = 0.0
    decode_seconds: float = 0.0

    def values(self) -> dict[str, float]:
        """Return them by name."""
        return asdict(self)


class PageEncoder:
    """The primary's side: pages in, payloads out."""

    def __init__(
        self,
        counters: CodingCounters,
        *,
        map_page_count: int,
        delta_cache_bytes: int,
        clock: Callable[[], int],
    ) -> None:
        """Send pages as they are until `encoding` is set."""
        self.encoding = Encoding.NONE
        self._counters = counters
        self._cache = DeltaCache(map_page_count, delta_cache_bytes)
        self._plain_frames = 0
        self._zstd = ZstdBlocks()
        self._clock = clock

    def encode(self, epoch: Epoch, pages: Pages, *, base_is_there: bool) -> list[Part]:
        """Return the parts of a PAGES payload; views of the rows, until it is sent.

        `base_is_there`: the backup has all that was sent before, so a delta can be taken.
        """
        began_ns = self._clock()
        content = self._content(pages, with_delta=self.encoding.is_delta and base_is_there)
        parts = encode_pages(pages, content)
        if epoch:
            counters = self._counters
            counters.zero_pages += len(pages.zero_indexes)
            counters.delta_pages += content.head.delta_page_count
            counters.content_bytes += pages.rows.nbytes
            counters.encoded_bytes += content.size_bytes
            counters.encode_seconds += (self._clock() - began_ns) / 1e9
        return parts

    def _content(self, pages: Pages, *, with_delta: bool) -> Content:
        self._cache.forget(pages.zero_indexes)
        compress = self._zstd.compress if self.encoding.is_compressed else None
        if with_delta:
            self._plain_frames = 0
            base = self._cache.exchange(pages.indexes, pages.rows)
            return encoded_content(pages.rows, base, compress)
        self._cache.forget(pages.indexes)
        self._plain_frames += 1
        if self._plain_frames == PLAIN_FRAMES_TO_CLEAR:
            self._cache.clear()
        if compress is None:
            return plain_content(pages.rows)
        return encoded_content(pages.rows, None, compress)


class PageDecoder:
    """The backup's side: content of frames in, pages out."""

    def __init__(
        self,
        counters: CodingCounters,
        *,
        limits: FrameLimits,
        read_base: ReadBase | None,
        keep: Callable[[int], None],
        give_back: Callable[[int], None],
        clock: Callable[[], int],
    ) -> None:
        """Take bases from `read_base`; without it a delta is refused.

        `keep` accounts for bytes (and raises what says that there is no room), `give_back` ends it.
        """
        self._counters = counters
        self._slab_pages = limits.slab_size_bytes // PAGE_SIZE_BYTES
        self._read_base = read_base
        self._keep = keep
        self._give_back = give_back
        self._clock = clock
        self._zstd = ZstdBlocks()
        self._free: list[PageRows] = []
        self._kept: list[tuple[PageRows, int]] = []

    def decode(self, head: ContentHead, payload: memoryview, indexes: PageIndexes) -> PageRows:
        """Return the pages of encoded content; they are kept until `release`.

        With DELTA, what `read_base` reads must be what was acknowledged last. Raises FrameRejected,
        or what `keep` raises.
        """
        began_ns = self._clock()
        size_bytes = len(indexes) * PAGE_SIZE_BYTES
        self._keep(size_bytes)
        slab = self._take(len(indexes))
        self._kept.append((slab, size_bytes))
        rows = slab[: len(indexes)]
        decode_content(
            head,
            payload,
            indexes,
            decompress=self._zstd.decompress,
            read_base=self._read_base,
            rows=rows,
        )
        if head.flags & FLAG_DELTA:
            self._counters.delta_pages += head.delta_page_count
        self._counters.decode_seconds += (self._clock() - began_ns) / 1e9
        return rows

    def release(self) -> None:
        """Nobody looks at the pages handed out so far any more."""
        for slab, size_bytes in self._kept:
            self._give_back(size_bytes)
            if len(slab) == self._slab_pages and len(self._free) < MAX_FREE_SLABS:
                self._free.append(slab)
        self._kept.clear()

    def _take(self, page_count: int) -> PageRows:
        if page_count <= SMALL_PAGES:
            return empty_rows(page_count)
        return self._free.pop() if self._free else empty_rows(self._slab_pages)
