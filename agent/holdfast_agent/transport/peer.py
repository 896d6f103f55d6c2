"""The peer of a worker, as the checkpoint loop sees it: messages, not frames. Talks TCP.

Puts payloads into frames and takes them out, counts what makes a checkpoint whole, sends
keep-alives and judges silence. Whatever is wrong with the other side ends as PeerLost: silence,
a broken stream, or `peer-failed` for frames that must not be believed.

Rows of PAGES are views of receive buffers, or were decoded, and stay valid until
`release_buffers`. A delta is taken against what the backup applied last: whoever receives one has
released everything of the checkpoint before.
"""

import time
from collections.abc import Callable

from holdfast_agent.core.encoding import Encoding
from holdfast_agent.core.failures import PeerLost
from holdfast_agent.core.frames import (
    DEFAULT_LIMITS,
    FrameKind,
    FrameLimits,
    FrameRejected,
    Part,
    RejectionCode,
)
from holdfast_agent.core.memory_map import PageIndexes, PageRows
from holdfast_agent.core.page_content import FLAG_DELTA, ContentHead, ReadBase
from holdfast_agent.core.payloads import (
    CheckpointReceiver,
    Farewell,
    PagesTally,
    decode_json,
    encode_checkpoint,
    split_pages,
)
from holdfast_agent.core.peer_messages import (
    AcknowledgementArrived,
    CheckpointArrived,
    FarewellArrived,
    PagesArrived,
    PeerMessage,
)
from holdfast_agent.transport.connection import ConnectionCounters, Frame, FrameConnection
from holdfast_agent.transport.page_coding import CodingCounters, PageDecoder, PageEncoder
from holdfast_agent.transport.standing_in import BUSY_LIMIT_SECONDS, StandIn
from holdfast_api.words import ClaimReason, Epoch

LINGER_SECONDS = 0.5
"""After a FAREWELL `close` waits so long for the peer to hang up, so that it can be read."""


class FramePeer:
    """The other worker, over a connection that was greeted and welcomed. Owns the connection."""

    def __init__(
        self,
        connection: FrameConnection,
        *,
        map_page_count: int,
        silence_limit_seconds: float,
        limits: FrameLimits = DEFAULT_LIMITS,
        busy_limit_seconds: float = BUSY_LIMIT_SECONDS,
        delta_cache_bytes: int = 0,
        read_base: ReadBase | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """Speak over `connection` about a memory map of so many pages.

        A primary remembers up to `delta_cache_bytes` of what the backup has; a backup reads with
        `read_base` what it has. Without them nothing is sent, or believed, as a delta.

        Until `be_strict` the connection's own silence limit holds, from then on this one; and from
        then on a turn may take `busy_limit_seconds` before the peer hears nothing.
        """
        self._busy_limit_seconds = busy_limit_seconds
        self._stand_in: StandIn | None = None
        self._silence_limit_seconds = silence_limit_seconds
        self._connection = connection
        self._limits = limits
        self._clock = clock
        self._tally = PagesTally()
        self.coding = CodingCounters()
        self._encoder = PageEncoder(
            self.coding,
            map_page_count=map_page_count,
            delta_cache_bytes=delta_cache_bytes,
            clock=clock,
        )
        self._decoder = PageDecoder(
            self.coding,
            limits=limits,
            read_base=read_base,
            keep=connection.keep_decoded,
            give_back=connection.give_back_decoded,
            clock=clock,
        )
        self._receiver = CheckpointReceiver(map_page_count, self._decode_rows, limits)
        self._acknowledged: Epoch = 0
        self._kept_epoch: Epoch | None = None
        self._kept: list[tuple[Frame, int]] = []
        self._decoded_numbers_bytes = 0
        self._said_farewell = False
        self._is_closed = False

    @property
    def counters(self) -> ConnectionCounters:
        """Bytes and frames of the connection."""
        return self._connection.counters

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when something arrives."""
        return self._connection.fileno()

    def use_encoding(self, encoding: Encoding) -> None:
        """Encode pages like this from the next `send_pages` on."""
        self._encoder.encoding = encoding

    def register(self, rows: PageRows) -> None:
        """Let the carrier read these rows where they lie when pages of them are sent."""
        self._connection.register(rows)

    def send_pages(
        self, epoch: Epoch, indexes: PageIndexes, rows: PageRows, zero_indexes: PageIndexes
    ) -> None:
        """Send pages of `epoch` (0: seeding), `rows[i]` being page `indexes[i]`.

        The rows may be reused when this returns. Raises PeerLost.
        """
        # A delta's base is what was sent before; the backup has it if it said so.
        base_is_there = epoch > 0 and epoch == self._acknowledged + 1
        for pages in split_pages(indexes, rows, zero_indexes, self._limits):
            parts = self._encoder.encode(epoch, pages, base_is_there=base_is_there)
            checksum = self._send(FrameKind.PAGES, epoch, parts)
            if epoch:
                self._tally.add(checksum, pages.page_count)

    def send_checkpoint(self, epoch: Epoch, device_state: bytes, *, final: bool) -> None:
        """End `epoch`: all pages sent for it are the checkpoint. Raises PeerLost."""
        parts = encode_checkpoint(self._tally, device_state, final=final)
        self._send(FrameKind.CHECKPOINT, epoch, parts)
        self._tally = PagesTally()

    def send_acknowledgement(self, epoch: Epoch) -> None:
        """Say that `epoch` is whole, verified and staged. Raises PeerLost."""
        self._send(FrameKind.ACKNOWLEDGE, epoch, ())

    def send_farewell(self, code: str, explanation: str) -> None:
        """Say why this connection ends; nothing can be sent after it. The peer may not hear it."""
        farewell = Farewell(code=code, explanation=explanation[:4096])
        try:
            self._send(FrameKind.FAREWELL, 0, [farewell.model_dump_json().encode()])
        except PeerLost:
            return
        self._connection.end_sending()
        self._said_farewell = True

    def receive(self) -> PeerMessage | None:
        """Return the next message that is there, or None. Raises PeerLost.

        Also StagingLimitReached, which is this host's own shortage and not the peer's fault.
        """
        try:
            frame = self._connection.receive()
        except FrameRejected as error:
            raise _not_believed(error) from error
        try:
            return None if frame is None else self._decode(frame)
        except FrameRejected as error:
            self._connection.reject(error)
            raise _not_believed(error) from error

    def be_strict(self) -> None:
        """Seeding is over: from now on silence counts by the policy's limit."""
        self._connection.limit_silence(self._silence_limit_seconds)
        if self._stand_in is None:
            self._stand_in = StandIn(
                self._connection, busy_limit_seconds=self._busy_limit_seconds, clock=self._clock
            )

    def tend(self, now_ns: int) -> None:
        """Send a keep-alive if one is due. Raises PeerLost when the peer was silent too long.

        Receive first: unread bytes are no silence.
        """
        if self._stand_in is not None:
            self._stand_in.turned(now_ns)
        if now_ns >= self._connection.keepalive_due_at_ns:
            self._connection.send_keepalive()
        if self._connection.judge_silence(now_ns):
            silent_ms = (now_ns - self._connection.last_heard_ns) / 1e6
            raise PeerLost(ClaimReason.PEER_SILENT, f"nothing heard for {silent_ms:.0f} ms")

    def next_due_ns(self) -> int:
        """Return when to receive and `tend` at the latest."""
        if self._connection.has_read_ahead or not self._connection.is_drained:
            return 0
        return min(self._connection.keepalive_due_at_ns, self._connection.silence_due_at_ns)

    def release_buffers(self) -> None:
        """All rows handed out so far are no longer looked at; their buffers may be reused."""
        for frame, numbers_bytes in self._kept:
            self._connection.give_back(frame, numbers_bytes)
        self._kept.clear()
        self._decoder.release()
        self._connection.give_back_decoded(self._decoded_numbers_bytes)
        self._decoded_numbers_bytes = 0
        self._kept_epoch = None

    def close(self) -> None:
        """Close the connection, after a FAREWELL once the peer has read it. Idempotent."""
        if self._stand_in is not None:
            self._stand_in.stop()
        if self._said_farewell and not self._is_closed:
            self._connection.discard_until_end(self._clock() + int(LINGER_SECONDS * 1e9))
        self._is_closed = True
        self._connection.close()

    def _send(self, kind: FrameKind, epoch: Epoch, parts: "list[Part] | tuple[()]") -> bytes:
        try:
            return self._connection.send(kind, epoch, parts)
        except FrameRejected as error:
            raise _not_believed(error) from error

    def _decode(self, frame: Frame) -> PeerMessage:
        match frame.kind:
            case FrameKind.PAGES:
                return self._pages(frame)
            case FrameKind.CHECKPOINT:
                checkpoint = self._receiver.checkpoint(frame.header, frame.payload)
                return CheckpointArrived(
                    frame.epoch, checkpoint.final, bytes(checkpoint.device_state)
                )
            case FrameKind.ACKNOWLEDGE:
                self._acknowledged = frame.epoch
                return AcknowledgementArrived(frame.epoch)
            case FrameKind.FAREWELL:
                farewell = decode_json(Farewell, frame.payload)
                return FarewellArrived(farewell.code, farewell.explanation)
            case FrameKind.TRANSPORT:
                raise FrameRejected(
                    RejectionCode.UNEXPECTED_KIND, "TRANSPORT on a connection that was opened"
                )
            case FrameKind.HELLO | FrameKind.WELCOME | FrameKind.REFUSED | FrameKind.KEEPALIVE:
                raise AssertionError(frame.header)  # the checker and the connection let none pass

    def _pages(self, frame: Frame) -> PagesArrived:
        """Keep the pages of a frame: as they came, or as they were decoded."""
        pages = self._receiver.pages(frame.header, frame.payload)
        # A run of 16 bytes can name every page of the VM, and each takes 8 bytes here.
        numbers_bytes = pages.indexes.nbytes + pages.zero_indexes.nbytes
        if pages.is_decoded:
            self._connection.keep_decoded(numbers_bytes)
            self._decoded_numbers_bytes += numbers_bytes
        else:
            self._connection.keep(frame, numbers_bytes)
            self._kept.append((frame, numbers_bytes))
        self._kept_epoch = frame.epoch
        return PagesArrived(frame.epoch, pages.indexes, pages.rows, pages.zero_indexes)

    def _decode_rows(
        self, head: ContentHead, payload: memoryview, indexes: PageIndexes
    ) -> PageRows:
        """Decode the pages of a frame. Raises FrameRejected, StagingLimitReached."""
        if head.flags & FLAG_DELTA:
            epoch = self._receiver.completed_epoch + 1
            assert self._kept_epoch in (None, epoch), "the checkpoint before was not applied"
        return self._decoder.decode(head, payload, indexes)


def _not_believed(error: FrameRejected) -> PeerLost:
    return PeerLost(ClaimReason.PEER_FAILED, str(error))
