"""What stands in the payloads of frames: greetings, pages, checkpoints. Pure.

HELLO, WELCOME, REFUSED, TRANSPORT and FAREWELL are JSON of the models below. KEEPALIVE and
ACKNOWLEDGE are empty (the acknowledged epoch stands in the header).

PAGES (epoch 0 while seeding, and then without DELTA):

| offset | size        | field                                                     |
|--------|-------------|-----------------------------------------------------------|
| 0      | 4           | run_count                                                 |
| 4      | 4           | zero_run_count                                            |
| 8      | 4           | page_count: pages whose content follows                   |
| 12     | 4           | zero_page_count: pages of zeros, carried without content  |
| 16     | 4           | flags of the content: 1 = DELTA, 2 = ZSTD                 |
| 20     | 4           | delta_page_count; 0 without DELTA                         |
| 24     | 8           | length of the content before compression                  |
| 32     | 16          | digest: XXH3-128 of the pages; zeros without flags        |
| 48     | 16 per run  | runs, then zero runs: (first page i64, count i64)         |
| then   | the rest    | content of the pages of the runs, in order: `page_content` |

CHECKPOINT (ends an epoch):

| offset | size | field                                                             |
|--------|------|-------------------------------------------------------------------|
| 0      | 8    | page_count of all its PAGES frames, zero pages included           |
| 8      | 4    | pages_frame_count                                                 |
| 12     | 4    | flags: 1 = FINAL, the guest was stopped for good (handover)       |
| 16     | 16   | digest: XXH3-128 of the checksums of its PAGES frames, in order   |
| 32     | 8    | device_state_length                                               |
| 40     | ...  | device state                                                      |

Formula, INV-2: a checkpoint is *whole* when the pages that arrived for its epoch are, frame for
frame, the ones its primary counted and digested. `CheckpointReceiver` says so and nothing else.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator

from holdfast_agent.core.frames import (
    DEFAULT_LIMITS,
    PROTOCOL_VERSION,
    FrameHeader,
    FrameLimits,
    FrameRejected,
    Part,
    RejectionCode,
)
from holdfast_agent.core.memory_map import (
    NO_PAGES,
    PAGE_SIZE_BYTES,
    MemoryMap,
    PageIndexes,
    PageRows,
    indexes_of,
    runs_of,
)
from holdfast_agent.core.page_content import (
    FLAG_DELTA,
    Content,
    ContentHead,
    check_head,
    plain_content,
)
from holdfast_api.records import Model
from holdfast_api.words import HostId, VmId

PAGES_HEAD = struct.Struct("<IIIIIIQ16s")
CHECKPOINT_HEAD = struct.Struct("<QII16sQ")
RUN_SIZE_BYTES = 16
FLAG_FINAL = 1
PAGES_MAX = 1 << 40
"""Of one VM: 4 PiB, as much as any processor addresses; what is computed from it fits into i64."""

NO_ROWS: PageRows = np.empty((0, PAGE_SIZE_BYTES), dtype=np.uint8)

# --- greetings and farewells ----------------------------------------------------------------------


class Hello(Model):
    """First words of a primary to the agent of its backup."""

    protocol_version: int = PROTOCOL_VERSION
    vm: VmId
    generation: int = Field(ge=1)
    primary: HostId
    backup: HostId
    keepalive_ms: int = Field(ge=1, le=10_000)
    silence_limit_ms: int = Field(ge=2, le=1_000_000)
    blocks: tuple[tuple[str, int], ...] = Field(min_length=1, max_length=256)
    """RAM blocks as (name, size in bytes), in the order that numbers the pages."""
    spec: dict[str, Any] = Field(default_factory=dict)
    """How to start the standby; not the transport's business."""
    rdma: bool = False
    """The primary would rather go on over RDMA."""

    @model_validator(mode="after")
    def _blocks_make_a_map(self) -> Self:
        if MemoryMap.of_sizes(self.blocks).page_count > PAGES_MAX:
            raise ValueError(f"more than {PAGES_MAX} pages of memory")
        return self

    @property
    def memory_map(self) -> MemoryMap:
        """The numbering of pages that this connection uses."""
        return MemoryMap.of_sizes(self.blocks)


class RdmaOffer(Model):
    """Where the backup waits for its primary's queue pair, this once."""

    address: str = Field(max_length=64)
    port: int = Field(ge=1, le=65_535)
    token: str = Field(pattern=r"^[0-9a-f]{32}$")
    """Known to nobody else; it goes with the request for the connection."""


class Welcome(Model):
    """The backup is ready to be filled; every later frame carries `connection`."""

    protocol_version: int = PROTOCOL_VERSION
    connection: int = Field(ge=1, lt=1 << 64)
    rdma: RdmaOffer | None = None
    """If offered, the primary's next frame is TRANSPORT."""


class TransportChoice(Model):
    """The primary's answer to an offer: this frame is the last on TCP, or all stay there."""

    transport: Literal["rdma", "tcp"]
    reason: str = Field(default="", max_length=1024)
    """Why not RDMA."""


class Refusal(Model):
    """The backup will not take this VM: a stable code and what to do about it."""

    code: str = Field(max_length=64)
    explanation: str = Field(max_length=4096)


class Farewell(Model):
    """This connection ends in order: a stable code (`guest-ended`, `released`, ...) and why."""

    code: str = Field(max_length=64)
    explanation: str = Field(default="", max_length=4096)


Greeting = TypeVar("Greeting", Hello, Welcome, Refusal, TransportChoice, Farewell)


def decode_json(model: type[Greeting], payload: bytes | memoryview) -> Greeting:
    """Return the model that `payload` spells. Raises FrameRejected."""
    try:
        return model.model_validate_json(bytes(payload))
    except ValidationError as error:
        raise _bad(f"{model.__name__} is not understood: {str(error)[:500]}") from error


# --- pages ----------------------------------------------------------------------------------------


DecodeRows = Callable[[ContentHead, memoryview, PageIndexes], PageRows]
"""Makes pages of encoded content, or raises FrameRejected; the rows are the decoder's."""


@dataclass(frozen=True)
class Pages:
    """Content of a PAGES frame: `rows: uint8[len(indexes), 4096]`, plain ones views of it."""

    indexes: PageIndexes
    rows: PageRows
    zero_indexes: PageIndexes
    is_decoded: bool = False
    """The rows are a decoder's, not views of the payload they came in."""

    @property
    def page_count(self) -> int:
        """Pages carried, zero pages included."""
        return len(self.indexes) + len(self.zero_indexes)


def split_pages(
    indexes: PageIndexes,
    rows: PageRows,
    zero_indexes: PageIndexes = NO_PAGES,
    limits: FrameLimits = DEFAULT_LIMITS,
) -> Iterator[Pages]:
    """Cut page sets into what fits one PAGES frame each; views, nothing is copied."""
    assert len(indexes) == len(rows), (len(indexes), len(rows))
    # At worst every page is a run of its own, and half of the index belongs to each kind.
    index_room = limits.index_size_bytes // 2 // RUN_SIZE_BYTES - 1
    step = min(limits.slab_size_bytes // PAGE_SIZE_BYTES, index_room)
    assert step > 0, limits
    for start in range(0, len(indexes), step):
        end = start + step
        yield Pages(indexes[start:end], rows[start:end], NO_PAGES)
    runs = runs_of(zero_indexes)
    for start in range(0, len(runs), index_room):
        yield Pages(NO_PAGES, NO_ROWS, indexes_of(runs[start : start + index_room]))


def encode_pages(pages: Pages, content: Content | None = None) -> list[Part]:
    """Return the parts of a PAGES payload; `content` is what `pages.rows` were encoded to.

    Without it the pages travel as they are, as a view of `pages.rows`.
    """
    runs, zero_runs = runs_of(pages.indexes), runs_of(pages.zero_indexes)
    if content is None:
        content = plain_content(pages.rows)
    head = PAGES_HEAD.pack(
        len(runs),
        len(zero_runs),
        len(pages.indexes),
        len(pages.zero_indexes),
        content.head.flags,
        content.head.delta_page_count,
        content.head.length,
        content.head.digest,
    )
    return [head, runs.reshape(-1), zero_runs.reshape(-1), *content.parts]


def no_decoding(head: ContentHead, payload: memoryview, indexes: PageIndexes) -> PageRows:
    """Refuse encoded content: what a side does that can not decode."""
    del payload, indexes
    raise _bad(f"content with flags {head.flags:#x}, and nothing here decodes it")


def decode_pages(
    payload: memoryview,
    map_page_count: int,
    decode_rows: DecodeRows = no_decoding,
    limits: FrameLimits = DEFAULT_LIMITS,
) -> Pages:
    """Return the pages of a payload for a map of `map_page_count` pages.

    Plain ones are views of it, others what `decode_rows` makes of them. Raises FrameRejected if the
    runs are not ascending, overlap, leave the map, or the content does not fit what is said of it.
    """
    if len(payload) < PAGES_HEAD.size:
        raise _bad(f"PAGES of {len(payload)} bytes")
    fields = PAGES_HEAD.unpack_from(payload)
    run_count, zero_run_count, page_count, zero_page_count = fields[:4]
    head = ContentHead(*fields[4:])
    zero_runs_at = PAGES_HEAD.size + run_count * RUN_SIZE_BYTES
    rows_at = zero_runs_at + zero_run_count * RUN_SIZE_BYTES
    if rows_at > len(payload):
        raise _bad(f"PAGES says {run_count + zero_run_count} runs and has {len(payload)} bytes")
    check_head(head, page_count, limits.slab_size_bytes)
    if not head.flags and rows_at + head.length != len(payload):
        raise _bad(f"PAGES says {page_count} pages and has {len(payload)} bytes")
    runs = _runs_at(payload, PAGES_HEAD.size, run_count)
    zero_runs = _runs_at(payload, zero_runs_at, zero_run_count)
    _check_runs(runs, page_count, map_page_count)
    _check_runs(zero_runs, zero_page_count, map_page_count)
    indexes = indexes_of(runs)
    _check_disjoint(indexes, zero_runs)
    if head.flags:
        rows = decode_rows(head, payload[rows_at:], indexes)
    elif page_count:
        rows = np.frombuffer(payload, dtype=np.uint8, offset=rows_at).reshape(-1, PAGE_SIZE_BYTES)
    else:
        rows = NO_ROWS
    return Pages(indexes, rows, indexes_of(zero_runs), is_decoded=head.flags != 0)


def _runs_at(payload: memoryview, offset: int, count: int) -> NDArray[np.int64]:
    if count == 0:
        return np.empty((0, 2), dtype=np.int64)
    return np.frombuffer(payload, dtype="<i8", count=count * 2, offset=offset).reshape(-1, 2)


def _check_runs(runs: NDArray[np.int64], page_count: int, map_page_count: int) -> None:
    """Raise FrameRejected unless the runs ascend without overlap inside the map."""
    if len(runs) == 0:
        if page_count:
            raise _bad(f"{page_count} pages in no run")
        return
    first, count = runs[:, 0], runs[:, 1]
    if first.min() < 0 or count.min() < 1:
        raise _bad("a run is empty or negative")
    # This way round nothing overflows, and a run longer than the map ends behind it as well.
    if (first > map_page_count - count).any():
        raise _bad(f"a run ends behind page {map_page_count}, the end of the memory map")
    if (first[1:] < first[:-1] + count[:-1]).any():
        raise _bad("runs overlap or do not ascend")
    if int(count.sum()) != page_count:
        raise _bad(f"runs of {int(count.sum())} pages, {page_count} announced")


def _check_disjoint(indexes: PageIndexes, zero_runs: NDArray[np.int64]) -> None:
    """Raise FrameRejected if a page is said to be zero and has content as well."""
    if len(indexes) == 0 or len(zero_runs) == 0:
        return
    ends = zero_runs[:, 0] + zero_runs[:, 1]
    after = np.searchsorted(ends, indexes, side="right")
    inside = after < len(zero_runs)
    if (zero_runs[after[inside], 0] <= indexes[inside]).any():
        raise _bad("a page is zero and has content")


# --- checkpoints ----------------------------------------------------------------------------------


@dataclass
class PagesTally:
    """What both sides count of an epoch's PAGES frames, in order."""

    page_count: int = 0
    frame_count: int = 0
    _running: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)

    def add(self, checksum: bytes, page_count: int) -> None:
        """Count one PAGES frame."""
        self.page_count += page_count
        self.frame_count += 1
        self._running.update(checksum)

    def digest(self) -> bytes:
        """Return the 16 bytes that stand for all frames counted so far."""
        return self._running.digest()


@dataclass(frozen=True)
class Checkpoint:
    """Content of a CHECKPOINT frame. `device_state` is a view of the payload."""

    page_count: int
    pages_frame_count: int
    digest: bytes
    final: bool
    device_state: memoryview


def encode_checkpoint(tally: PagesTally, device_state: bytes, *, final: bool) -> list[Part]:
    """Return the parts of the CHECKPOINT payload that ends the epoch counted by `tally`."""
    head = CHECKPOINT_HEAD.pack(
        tally.page_count,
        tally.frame_count,
        FLAG_FINAL if final else 0,
        tally.digest(),
        len(device_state),
    )
    return [head, device_state]


def decode_checkpoint(payload: memoryview) -> Checkpoint:
    """Return the content of a CHECKPOINT payload. Raises FrameRejected."""
    if len(payload) < CHECKPOINT_HEAD.size:
        raise _bad(f"CHECKPOINT of {len(payload)} bytes")
    page_count, frame_count, flags, digest, length = CHECKPOINT_HEAD.unpack_from(payload)
    if flags & ~FLAG_FINAL:
        raise _bad(f"CHECKPOINT with unknown flags {flags:#x}")
    device_state = payload[CHECKPOINT_HEAD.size :]
    if length != len(device_state):
        raise _bad(f"device state of {len(device_state)} bytes, {length} announced")
    return Checkpoint(page_count, frame_count, digest, bool(flags & FLAG_FINAL), device_state)


class CheckpointReceiver:
    """Knows whether the checkpoint that arrives is whole. For one connection, on the backup."""

    def __init__(
        self,
        map_page_count: int,
        decode_rows: DecodeRows = no_decoding,
        limits: FrameLimits = DEFAULT_LIMITS,
    ) -> None:
        """Expect seeding pages (epoch 0) or the first epoch, over a map of so many pages."""
        self.completed_epoch = 0
        self._decode_rows = decode_rows
        self._limits = limits
        self._map_page_count = map_page_count
        self._tally = PagesTally()

    def pages(self, header: FrameHeader, payload: memoryview) -> Pages:
        """Return the pages of a PAGES frame that belongs here. Raises FrameRejected."""
        is_seeding = self.completed_epoch == 0 and self._tally.frame_count == 0
        if header.epoch != self.completed_epoch + 1 and not (header.epoch == 0 and is_seeding):
            raise self._wrong_epoch(header)
        decode_rows = self._decode_rows if header.epoch else self._decode_seeding
        pages = decode_pages(payload, self._map_page_count, decode_rows, self._limits)
        if header.epoch:
            self._tally.add(header.checksum, pages.page_count)
        return pages

    def checkpoint(self, header: FrameHeader, payload: memoryview) -> Checkpoint:
        """Return the checkpoint if every page of its epoch has arrived. Raises FrameRejected."""
        if header.epoch != self.completed_epoch + 1:
            raise self._wrong_epoch(header)
        checkpoint = decode_checkpoint(payload)
        tally = self._tally
        announced = (checkpoint.page_count, checkpoint.pages_frame_count, checkpoint.digest)
        if announced != (tally.page_count, tally.frame_count, tally.digest()):  # INV-2
            raise _bad(
                f"checkpoint {header.epoch} is not whole: {tally.page_count} pages in "
                f"{tally.frame_count} frames came, {checkpoint.page_count} in "
                f"{checkpoint.pages_frame_count} were sent"
            )
        self.completed_epoch = header.epoch
        self._tally = PagesTally()
        return checkpoint

    def _decode_seeding(
        self, head: ContentHead, payload: memoryview, indexes: PageIndexes
    ) -> PageRows:
        """Decode, but no difference: a page may come twice while seeding, so its base is not known.

        Raises FrameRejected.
        """
        if head.flags & FLAG_DELTA:
            raise _bad("a difference while seeding")
        return self._decode_rows(head, payload, indexes)

    def _wrong_epoch(self, header: FrameHeader) -> FrameRejected:
        return FrameRejected(
            RejectionCode.WRONG_EPOCH,
            f"{header.kind.name} of epoch {header.epoch} after checkpoint {self.completed_epoch}",
        )


def _bad(explanation: str) -> FrameRejected:
    return FrameRejected(RejectionCode.BAD_PAYLOAD, explanation)
