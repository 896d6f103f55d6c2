"""A hostile or broken peer: whole conversations as bytes, ways to spoil them, and who must listen.

Limits are small, so that a spoilt length is soon beyond them.
"""

import contextlib
import select
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import xxhash
from hypothesis import strategies as st

from holdfast_agent.core.encoding import Encoding
from holdfast_agent.core.failures import PeerLost
from holdfast_agent.core.frames import (
    CHECKSUM_OFFSET,
    CHECKSUM_SIZE_BYTES,
    HEADER,
    HEADER_SIZE_BYTES,
    KIBIBYTE,
    PROTOCOL_VERSION,
    FrameEncoder,
    FrameKind,
    FrameLimits,
    Part,
)
from holdfast_agent.core.memory_map import PageIndexes, PageRows
from holdfast_agent.core.payloads import (
    Farewell,
    Pages,
    PagesTally,
    encode_checkpoint,
)
from holdfast_agent.core.peer_messages import PagesArrived, PeerMessage
from holdfast_agent.transport.buffers import StagingLimitReached
from holdfast_agent.transport.connection import FrameConnection
from holdfast_agent.transport.opening import accept, connect, listen
from holdfast_agent.transport.page_coding import CodingCounters, PageEncoder
from holdfast_agent.transport.peer import FramePeer
from holdfast_agent.transport.tcp import TcpStream
from holdfast_api.words import Role

DEADLINE_SECONDS = 20.0
GENERATION = 7
CONNECTION_ID = 4711
MAP_PAGES = 64
LENGTH_OFFSET = 40
STAGING_LIMIT_BYTES = 96 * KIBIBYTE
LIMITS = FrameLimits(
    slab_size_bytes=16 * KIBIBYTE,
    index_size_bytes=4 * KIBIBYTE,
    hello_size_bytes=4 * KIBIBYTE,
    device_state_size_bytes=32 * KIBIBYTE,
    notice_size_bytes=KIBIBYTE,
)
LONGEST_PAYLOAD_BYTES = max(LIMITS.payload_size_bytes(kind) for kind in FrameKind)

# --- what a sound peer says -----------------------------------------------------------------------


class Conversation:
    """The frames of one direction, after the greeting."""

    def __init__(self, sender: Role) -> None:
        self.frames: list[bytes] = []
        self._encoder = FrameEncoder(sender=sender, generation=GENERATION, limits=LIMITS)
        self._encoder.sequence = 1
        self._encoder.connection = CONNECTION_ID
        self._tally = PagesTally()
        self._pages = PageEncoder(
            CodingCounters(),
            map_page_count=MAP_PAGES,
            delta_cache_bytes=MAP_PAGES * 4096,
            clock=time.monotonic_ns,
        )

    def say(self, kind: FrameKind, epoch: int = 0, parts: tuple[Part, ...] = ()) -> bytes:
        buffers, checksum = self._encoder.encode(kind, epoch, parts)
        self.frames.append(b"".join(buffers))
        return checksum

    def pages(
        self,
        epoch: int,
        first: int,
        count: int,
        zeros: int,
        encoding: Encoding = Encoding.NONE,
    ) -> None:
        indexes = np.arange(first, first + count, dtype=np.int64)
        rows = np.full((count, 4096), epoch + 1, dtype=np.uint8)
        behind = np.arange(first + count, first + count + zeros, dtype=np.int64)
        pages = Pages(indexes, rows, behind)
        self._pages.encoding = encoding
        parts = self._pages.encode(epoch, pages, base_is_there=epoch > 1)
        checksum = self.say(FrameKind.PAGES, epoch, tuple(parts))
        if epoch:
            self._tally.add(checksum, pages.page_count)

    def checkpoint(self, epoch: int) -> None:
        parts = encode_checkpoint(self._tally, b"device state " * epoch, final=False)
        self.say(FrameKind.CHECKPOINT, epoch, tuple(parts))
        self._tally = PagesTally()


def words_of_a_primary() -> list[bytes]:
    """Seeding, a checkpoint in each encoding, some with differences, a farewell."""
    primary = Conversation(Role.PRIMARY)
    primary.pages(0, 0, 3, 40)
    primary.say(FrameKind.KEEPALIVE)
    ways = (Encoding.DELTA, Encoding.DELTA, Encoding.DELTA_ZSTD, Encoding.NONE, Encoding.ZSTD)
    for epoch, encoding in enumerate(ways, start=1):
        primary.pages(epoch, epoch, 2, 1, encoding)
        primary.pages(epoch, 30, 1, epoch, encoding)
        primary.checkpoint(epoch)
    farewell = Farewell(code="released", explanation="it is over").model_dump_json().encode()
    primary.say(FrameKind.FAREWELL, 0, (farewell,))
    return primary.frames


def words_of_a_backup() -> list[bytes]:
    """Acknowledgements, signs of life, a farewell."""
    backup = Conversation(Role.BACKUP)
    for epoch in (1, 2, 3):
        backup.say(FrameKind.ACKNOWLEDGE, epoch)
        backup.say(FrameKind.KEEPALIVE)
    farewell = Farewell(code="standby-failed").model_dump_json().encode()
    backup.say(FrameKind.FAREWELL, 0, (farewell,))
    return backup.frames


SPOKEN = {Role.PRIMARY: words_of_a_primary(), Role.BACKUP: words_of_a_backup()}

# --- ways to spoil it -----------------------------------------------------------------------------


def sealed(frame: bytes | bytearray) -> bytes:
    """Return the frame with the checksum that its bytes have: what a faulty program would send."""
    head, payload = frame[:CHECKSUM_OFFSET], frame[HEADER_SIZE_BYTES:]
    return bytes(head) + xxhash.xxh3_128(bytes(head) + bytes(payload)).digest() + bytes(payload)


def of_length(frame: bytes, length: int) -> bytes:
    """Return the frame announcing another length, sealed."""
    spoilt = bytearray(frame)
    spoilt[LENGTH_OFFSET : LENGTH_OFFSET + 4] = length.to_bytes(4, "little")
    return sealed(spoilt)


@st.composite
def spoilt_streams(draw: st.DrawFn, role: Role) -> bytes:
    """A conversation of `role` with bits flipped, pieces cut, repeated, swapped or put in."""
    frames = list(SPOKEN[role])
    for _ in range(draw(st.integers(0, 2))):
        first, second = draw(st.tuples(*[st.integers(0, len(frames) - 1)] * 2))
        what = draw(st.sampled_from(("swap", "repeat", "lose", "length")))
        if what == "swap":
            frames[first], frames[second] = frames[second], frames[first]
        elif what == "repeat":
            frames.insert(second, frames[first])
        elif what == "lose" and len(frames) > 1:
            del frames[first]
        else:
            frames[first] = of_length(frames[first], draw(st.integers(0, 2**32 - 1)))
    stream = bytearray(b"".join(frames))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, max(len(stream) - 1, 0)))
        length = draw(st.integers(0, 200))
        what = draw(st.sampled_from(("flip", "cut", "repeat", "put in", "end")))
        if what == "flip" and stream:
            stream[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "cut":
            del stream[at : at + length]
        elif what == "repeat":
            stream[at:at] = stream[at : at + length]
        elif what == "put in":
            stream[at:at] = draw(st.binary(max_size=64))
        else:
            del stream[at:]
    return bytes(stream)


@st.composite
def resealed_streams(draw: st.DrawFn, role: Role) -> bytes:
    """A conversation whose payloads, epochs and counts are spoilt behind a good checksum."""
    frames = list(SPOKEN[role])
    for _ in range(draw(st.integers(1, 3))):
        number = draw(st.integers(0, len(frames) - 1))
        frame = bytearray(frames[number])
        numbers = st.sampled_from((0, 1, 2, MAP_PAGES, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
        if len(frame) > HEADER_SIZE_BYTES and draw(st.booleans()):
            at = draw(st.integers(HEADER_SIZE_BYTES, min(len(frame) - 1, HEADER_SIZE_BYTES + 80)))
            if draw(st.booleans()):
                frame[at] ^= 1 << draw(st.integers(0, 7))
            else:
                width = min(draw(st.sampled_from((1, 4, 8))), len(frame) - at)
                frame[at : at + width] = draw(numbers).to_bytes(8, "little")[:width]
        else:
            frame[32:40] = draw(numbers).to_bytes(8, "little")
        frames[number] = sealed(frame)
    return b"".join(frames)


@st.composite
def frames_of_one_kind(draw: st.DrawFn, role: Role, kind: FrameKind) -> bytes:
    """One frame with any payload behind a header that is right."""
    payload = draw(st.binary(max_size=400))
    sender = {Role.PRIMARY: 1, Role.BACKUP: 2}[role]
    head = HEADER.pack(
        *(b"HFFR", PROTOCOL_VERSION, kind, GENERATION, CONNECTION_ID, 2, draw(st.integers(0, 3))),
        *(len(payload), sender, bytes(CHECKSUM_SIZE_BYTES)),
    )
    return sealed(head + payload)


# --- who listens ----------------------------------------------------------------------------------


@contextlib.contextmanager
def loopback() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connected pair: the peer's end, our end."""
    with contextlib.closing(listen("127.0.0.1:0")) as listener:
        host, port = listener.getsockname()
        with connect(f"{host}:{port}", DEADLINE_SECONDS) as theirs:
            assert select.select([listener], [], [], DEADLINE_SECONDS)[0]
            ours = accept(listener)
            assert ours is not None
            with ours:
                theirs.setblocking(False)
                yield theirs, ours


@dataclass
class Heard:
    """What was taken in, and how it ended."""

    messages: list[PeerMessage]
    end: PeerLost | StagingLimitReached


def listening(
    ours: socket.socket, role: Role, standby: PageRows | None = None
) -> tuple[FrameConnection, FramePeer]:
    """Return our end as `role`, greeted and welcomed; `standby` is its memory."""

    def read_base(indexes: PageIndexes, rows: PageRows) -> None:
        assert standby is not None, "a difference in a test without a standby"
        rows[:] = standby[indexes]

    connection = FrameConnection(
        TcpStream(ours),
        role=role,
        generation=GENERATION,
        silence_limit_seconds=DEADLINE_SECONDS,
        keepalive_seconds=DEADLINE_SECONDS,
        limits=LIMITS,
        received_frames=1,
        staging_limit_bytes=STAGING_LIMIT_BYTES,
    )
    connection._encoder.sequence = 1
    connection.bind(CONNECTION_ID)
    peer = FramePeer(
        connection,
        map_page_count=MAP_PAGES,
        silence_limit_seconds=DEADLINE_SECONDS,
        limits=LIMITS,
        read_base=read_base,
    )
    return connection, peer


def hear(stream: bytes, role: Role) -> Heard:
    """Let `role` listen to `stream` and the hanging up behind it; holds what must always hold.

    Only PeerLost and StagingLimitReached come out; after the first nothing is accepted any more;
    what is kept stays under the limit; and it ends before the deadline.
    """
    messages: list[PeerMessage] = []
    standby = np.zeros((MAP_PAGES, 4096), dtype=np.uint8)
    staged: list[PagesArrived] = []
    with loopback() as (theirs, ours):
        connection, peer = listening(ours, role, standby)
        deadline = time.monotonic() + DEADLINE_SECONDS
        rest, hung_up = memoryview(stream), False
        while True:
            if rest:
                rest = _feed(theirs, rest)
            if not rest and not hung_up:
                theirs.shutdown(socket.SHUT_WR)
                hung_up = True
            try:
                message = peer.receive()
            except (PeerLost, StagingLimitReached) as error:
                _nothing_more_is_accepted(peer, error)
                return Heard(messages, error)
            finally:
                assert connection.kept_bytes <= STAGING_LIMIT_BYTES
            if message is None:
                assert time.monotonic() < deadline, "neither a message nor an end"
                select.select([ours], [], [], 0.01 if rest else DEADLINE_SECONDS)
                continue
            messages.append(_copied(message))
            if isinstance(message, PagesArrived):
                staged.append(message)
                if message.epoch:
                    continue
            for pages in staged:
                standby[pages.indexes] = pages.rows
                standby[pages.zero_indexes] = 0
            staged.clear()
            peer.release_buffers()


def _copied(message: PeerMessage) -> PeerMessage:
    """Return a message that stays as it is when its buffers are used again."""
    if isinstance(message, PagesArrived):
        return replace(message, rows=message.rows.copy())
    return message


def _feed(theirs: socket.socket, rest: memoryview) -> memoryview:
    """Send what the kernel takes."""
    try:
        return rest[theirs.send(rest) :]
    except BlockingIOError:
        return rest


def _nothing_more_is_accepted(peer: FramePeer, error: Exception) -> None:
    if isinstance(error, StagingLimitReached):
        return  # this host's own shortage: its worker ends the connection
    for _ in range(3):
        with pytest.raises(PeerLost) as again:
            peer.receive()
        assert str(again.value) == str(error)
