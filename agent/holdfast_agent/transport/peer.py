"""The peer of a worker, as the checkpoint loop sees it: messages, not frames. Talks TCP.

Puts payloads into frames and takes them out, counts what makes a checkpoint whole, sends
keep-alives and judges silence. Whatever is wrong with the other side ends as PeerLost: silence,
a broken stream, or `peer-failed` for frames that must not be believed.

Rows of PAGES are views of receive buffers and stay valid until `release_buffers`.
"""

import time
from collections.abc import Callable

from holdfast_agent.core.failures import PeerLost
from holdfast_agent.core.frames import DEFAULT_LIMITS, FrameKind, FrameLimits, FrameRejected, Part
from holdfast_agent.core.memory_map import PageIndexes, PageRows
from holdfast_agent.core.payloads import (
    CheckpointReceiver,
    Farewell,
    PagesTally,
    decode_json,
    encode_checkpoint,
    encode_pages,
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
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """Speak over `connection` about a memory map of so many pages.

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
        self._receiver = CheckpointReceiver(map_page_count)
        self._kept: list[tuple[Frame, int]] = []
        self._said_farewell = False
        self._is_closed = False

    @property
    def counters(self) -> ConnectionCounters:
        """Bytes and frames of the connection."""
        return self._connection.counters

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when something arrives."""
        return self._connection.fileno()

    def send_pages(
        self, epoch: Epoch, indexes: PageIndexes, rows: PageRows, zero_indexes: PageIndexes
    ) -> None:
        """Send pages of `epoch` (0: seeding), `rows[i]` being page `indexes[i]`.

        The rows may be reused when this returns. Raises PeerLost.
        """
        for pages in split_pages(indexes, rows, zero_indexes, self._limits):
            checksum = self._send(FrameKind.PAGES, epoch, encode_pages(pages))
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
        if self._connection.has_read_ahead:
            return 0
        return min(self._connection.keepalive_due_at_ns, self._connection.silence_due_at_ns)

    def release_buffers(self) -> None:
        """All rows handed out so far are no longer looked at; their buffers may be reused."""
        for frame, indexes_bytes in self._kept:
            self._connection.give_back(frame, indexes_bytes)
        self._kept.clear()

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
                pages = self._receiver.pages(frame.header, frame.payload)
                # A run of 16 bytes can name every page of the VM, and each takes 8 bytes here.
                indexes_bytes = pages.indexes.nbytes + pages.zero_indexes.nbytes
                self._connection.keep(frame, indexes_bytes)
                self._kept.append((frame, indexes_bytes))
                return PagesArrived(frame.epoch, pages.indexes, pages.rows, pages.zero_indexes)
            case FrameKind.CHECKPOINT:
                checkpoint = self._receiver.checkpoint(frame.header, frame.payload)
                return CheckpointArrived(
                    frame.epoch, checkpoint.final, bytes(checkpoint.device_state)
                )
            case FrameKind.ACKNOWLEDGE:
                return AcknowledgementArrived(frame.epoch)
            case FrameKind.FAREWELL:
                farewell = decode_json(Farewell, frame.payload)
                return FarewellArrived(farewell.code, farewell.explanation)
            case FrameKind.HELLO | FrameKind.WELCOME | FrameKind.REFUSED | FrameKind.KEEPALIVE:
                raise AssertionError(frame.header)  # the checker and the connection let none pass


def _not_believed(error: FrameRejected) -> PeerLost:
    return PeerLost(ClaimReason.PEER_FAILED, str(error))
