"""Frames over one stream between two workers. Owns the stream it is given.

Theory of operation. The stream never blocks. `receive` takes what is there, straight into the
buffer where it will be used, hashing each piece while it is warm. `send` is a gather write of
slabs; when the stream takes no more it waits, at most the silence limit without progress.

No deadlock. Two peers that both wait to send, and read nothing meanwhile, would wait for ever. Here
only the primary sends much. While it waits it reads what the backup says (small frames, a bounded
number of them), so the backup's acknowledgements always find room, so the backup always returns to
reading. The backup, while it waits with an acknowledgement, reads nothing and need not.

One thread uses a connection. `send_keepalive` alone may be called from another one: it gives way
when a frame is just being sent, and never waits.

After PeerLost from `send`, what had arrived before can still be received: look there for a FAREWELL
before you draw conclusions.
"""

import contextlib
import errno
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from holdfast_agent.core.failures import PeerLost
from holdfast_agent.core.frames import (
    DEFAULT_LIMITS,
    HEADER_SIZE_BYTES,
    FrameChecker,
    FrameEncoder,
    FrameHeader,
    FrameKind,
    FrameLimits,
    FrameRejected,
    Part,
)
from holdfast_agent.transport.buffers import ReceiveBuffers
from holdfast_agent.transport.liveness import KeepaliveTimer, SilenceJudge
from holdfast_agent.transport.stream import LendingStream, Stream
from holdfast_api.words import ClaimReason, Role

MAX_READ_AHEAD = 64
"""Frames read while waiting to send; at the limit no more is read until they were received."""
RECEIVE_PIECE_BYTES = 512 * 1024
"""Hashed piece by piece: half of a typical level-2 cache."""
DEFAULT_STAGING_LIMIT_BYTES = 8 * 1024**3
SILENT_ERRORS = frozenset({errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH})


@dataclass(frozen=True)
class Frame:
    """A frame that was received whole and undamaged.

    `payload` is valid until the next `receive`, unless the frame is kept.
    """

    header: FrameHeader
    payload: memoryview
    buffer: NDArray[np.uint8]

    @property
    def kind(self) -> FrameKind:
        """What it is."""
        return self.header.kind

    @property
    def epoch(self) -> int:
        """The epoch it belongs to; 0 = none."""
        return self.header.epoch


@dataclass
class ConnectionCounters:
    """What went over a connection; monotonic."""

    sent_bytes: int = 0
    sent_frames: int = 0
    received_bytes: int = 0
    received_frames: int = 0
    rejected_frames: int = 0

    def values(self) -> dict[str, float]:
        """Return them by name."""
        return asdict(self)


class FrameConnection:
    """One side of a connection between the two workers of a protection."""

    def __init__(
        self,
        stream: Stream,
        *,
        role: Role,
        generation: int | None,
        silence_limit_seconds: float,
        keepalive_seconds: float,
        limits: FrameLimits = DEFAULT_LIMITS,
        staging_limit_bytes: int = DEFAULT_STAGING_LIMIT_BYTES,
        received_frames: int = 0,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """Take over a connected stream; `close` closes it.

        `role` is our own. `received_frames` is 1 for a backup whose agent has read the HELLO.
        `generation` None is for an agent that reads a HELLO and nothing else.
        """
        assert role is not Role.NONE
        peer = Role.BACKUP if role is Role.PRIMARY else Role.PRIMARY
        self.counters = ConnectionCounters()
        self._stream = stream
        self._lender = stream if isinstance(stream, LendingStream) else None
        self._limits = limits
        self._clock = clock
        self._limit_ns = int(silence_limit_seconds * 1e9)
        self._encoder = FrameEncoder(sender=role, generation=generation or 0, limits=limits)
        self._checker = FrameChecker(
            sender=peer, generation=generation, limits=limits, received_frames=received_frames
        )
        self._reads_ahead = role is Role.PRIMARY
        self._read_ahead: deque[Frame] = deque()
        self._sending = threading.Lock()
        self._send_failure: PeerLost | None = None
        self._receive_failure: PeerLost | FrameRejected | None = None
        now_ns = clock()
        self._last_heard_ns = now_ns
        self._judge = SilenceJudge(self._limit_ns, now_ns)
        self._keepalive = KeepaliveTimer(int(keepalive_seconds * 1e9), now_ns)
        self._buffers = ReceiveBuffers(
            limits.payload_size_bytes(FrameKind.PAGES), staging_limit_bytes
        )
        self._lent: NDArray[np.uint8] | None = None
        self._head = memoryview(bytearray(HEADER_SIZE_BYTES))
        self._header: FrameHeader | None = None
        self._payload_buffer = self._buffers.take(0)
        self._filled = 0
        self._drained = True
        stream.limit_silence(silence_limit_seconds)

    def limit_silence(self, silence_limit_seconds: float) -> None:
        """Judge the peer's silence, and sending without progress, by this limit from now on."""
        self._limit_ns = int(silence_limit_seconds * 1e9)
        self._judge = SilenceJudge(self._limit_ns, self._clock())
        self._stream.limit_silence(silence_limit_seconds)

    # --- life -------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        """Close at the end of a with statement."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def fileno(self) -> int:
        """Return the descriptor to poll: readable means `receive`. Also see `has_read_ahead`."""
        return self._stream.fileno()

    @property
    def has_read_ahead(self) -> bool:
        """Frames wait in memory, for which the descriptor will not become readable."""
        return bool(self._read_ahead)

    @property
    def is_drained(self) -> bool:
        """Nothing more was there when we last looked: what comes makes the descriptor readable.

        Before that the stream may have taken in what the descriptor does not show any more.
        """
        return self._drained

    @property
    def last_heard_ns(self) -> int:
        """When the last byte of the peer was read, by the monotonic clock."""
        return self._last_heard_ns

    @property
    def keepalive_due_at_ns(self) -> int:
        """When `send_keepalive` is due if nothing else is sent before."""
        return self._keepalive.due_at_ns

    @property
    def keepalive_late_at_ns(self) -> int:
        """When somebody else should send it: whose turn it is was late by half an interval."""
        return self._keepalive.late_at_ns

    @property
    def keepalive_seconds(self) -> float:
        """Time between two signs of life of ours."""
        return self._keepalive.interval_seconds

    @property
    def kept_bytes(self) -> int:
        """Received memory that is kept by `keep`."""
        return self._buffers.kept_bytes

    def close(self) -> None:
        """Close the stream; payloads that were kept stay valid. Idempotent."""
        self._stream.close()

    # --- sending ----------------------------------------------------------------------------------

    def send(self, kind: FrameKind, epoch: int = 0, parts: Iterable[Part] = ()) -> bytes:
        """Send a frame and return its checksum; the parts may be reused when this returns.

        Waits while the peer takes nothing, at most the silence limit without progress. Raises
        PeerLost; the direction is then broken for good. On a primary also FrameRejected, for what
        came in meanwhile.
        """
        with self._sending:
            return self._send_alone(kind, epoch, parts)

    def send_keepalive(self) -> None:
        """Show that we live, if that can be done without waiting. Safe from any thread.

        Does nothing while a frame is being sent or the kernel's buffer is full: then there is
        traffic enough. Raises nothing: a peer that is gone may have left a FAREWELL, and only
        `receive` knows.
        """
        if not self._sending.acquire(blocking=False):
            return
        try:
            # Writable means that a third of the buffer is free: 64 bytes go out whole.
            if self._stream.wait(readable=False, writable=True, timeout_ms=0).writable:
                with contextlib.suppress(PeerLost):
                    self._send_alone(FrameKind.KEEPALIVE, 0, ())
            self._keepalive.sent(self._clock())
        finally:
            self._sending.release()

    def end_sending(self) -> None:
        """Tell the kernel that nothing more will be sent: the peer reads all, then the end."""
        with self._sending:
            self._send_failure = PeerLost(ClaimReason.STREAM_BROKEN, "nothing more may be sent")
            self._stream.end_sending()

    def discard_until_end(self, deadline_ns: int) -> bool:
        """Read and forget until the peer hangs up; False if it did not until `deadline_ns`.

        Closing with unread bytes resets a connection, which can destroy what is still on its way
        to the peer.
        """
        forgotten = memoryview(bytearray(RECEIVE_PIECE_BYTES))
        try:
            while self._wait_readable(deadline_ns):
                with contextlib.suppress(BlockingIOError):
                    if not self._stream.receive_into(forgotten):
                        return True
        except OSError:
            return True
        return False

    def _send_alone(self, kind: FrameKind, epoch: int, parts: Iterable[Part]) -> bytes:
        """Do what `send` says, with the lock held."""
        if self._send_failure is not None:
            raise self._send_failure
        buffers, checksum = self._encoder.encode(kind, epoch, parts)
        try:
            self._write(buffers)
        except (PeerLost, FrameRejected) as error:
            # Half a frame may be out: nothing that follows could be understood.
            self._send_failure = PeerLost(ClaimReason.STREAM_BROKEN, f"ended before by: {error}")
            raise
        self.counters.sent_frames += 1
        self._keepalive.sent(self._clock())
        return checksum

    def _write(self, views: list[memoryview]) -> None:
        """Write all bytes of `views`, waiting as `send` says."""
        progress = SilenceJudge(self._limit_ns, self._clock())
        first = 0
        while first < len(views):
            try:
                sent = self._stream.send(views[first:])
            except BlockingIOError:
                self._wait_writable(progress)
                continue
            except OSError as error:
                raise _lost(error) from error
            self.counters.sent_bytes += sent
            progress.heard(self._clock())
            while first < len(views) and sent >= len(views[first]):
                sent -= len(views[first])
                first += 1
            if sent:
                views[first] = views[first][sent:]
        self._settle(progress)

    def _settle(self, progress: SilenceJudge) -> None:
        """Wait until the carrier has read what it was lent. Raises PeerLost without progress."""
        try:
            while self._lender is not None and not self._lender.settle(self._limit_ns / 4e6):
                if progress.is_suspicious(self._clock()):
                    raise PeerLost(
                        ClaimReason.PEER_SILENT, f"took no data for {self._limit_ns / 1e6:.0f} ms"
                    )
        except OSError as error:
            raise _lost(error) from error

    def _wait_writable(self, progress: SilenceJudge) -> None:
        """Wait a while for room, reading ahead meanwhile. Raises PeerLost without progress."""
        reads = self._reads_ahead and len(self._read_ahead) < MAX_READ_AHEAD
        ready = self._stream.wait(readable=reads, writable=True, timeout_ms=self._limit_ns / 4e6)
        if reads and ready.readable:
            frame = self._receive_next()
            if frame is not None:
                self._read_ahead.append(frame)
        if not ready.writable and progress.is_suspicious(self._clock()):
            raise PeerLost(
                ClaimReason.PEER_SILENT, f"took no data for {self._limit_ns / 1e6:.0f} ms"
            )

    # --- receiving --------------------------------------------------------------------------------

    def receive(self) -> Frame | None:
        """Return the next frame that is whole, or None when nothing more is there. Never waits.

        Keep-alives are taken in silence. Raises PeerLost at the end of the stream, FrameRejected
        for a frame that must not be believed; both for good. What came before is returned first.
        """
        if self._read_ahead:
            return self._read_ahead.popleft()
        return self._receive_next()

    def reject(self, error: FrameRejected) -> None:
        """Count a frame whose payload turned out not to be believed, and receive nothing more."""
        self.counters.rejected_frames += 1
        self._receive_failure = error

    def keep(self, frame: Frame, beside_bytes: int = 0) -> None:
        """Keep the payload of the frame just received beyond the next `receive`.

        `beside_bytes`: made from it and kept with it, so counted with it. Ends with `give_back`.
        Raises StagingLimitReached; the frame is not kept then.
        """
        assert self._lent is frame.buffer, "only the frame received last can be kept"
        self._buffers.keep(len(frame.payload) + beside_bytes)
        self._lent = None

    def give_back(self, frame: Frame, beside_bytes: int = 0) -> None:
        """End the use of a kept frame: its payload and every view of it."""
        self._buffers.give_back(frame.buffer, len(frame.payload) + beside_bytes)

    def keep_decoded(self, size_bytes: int) -> None:
        """Count memory that was made from a frame and is kept instead of it.

        Raises StagingLimitReached; nothing is counted then.
        """
        self._buffers.keep(size_bytes)

    def give_back_decoded(self, size_bytes: int) -> None:
        """End the use of memory counted by `keep_decoded`."""
        self._buffers.keep_no_more(size_bytes)

    def judge_silence(self, now_ns: int) -> bool:
        """Say whether the peer's silence is a suspicion. Ask at least every half silence limit.

        Unread bytes are no silence: receive them first. Time in which we did not run counts for at
        most half the limit (see `liveness`).
        """
        if not self._judge.is_suspicious(now_ns):
            return False
        return not self._read_ahead and not self._wait_readable(now_ns)

    @property
    def silence_due_at_ns(self) -> int:
        """When silence will be a suspicion, if nothing is heard before."""
        return self._judge.due_at_ns

    def _receive_next(self) -> Frame | None:
        if self._receive_failure is not None:
            raise self._receive_failure
        try:
            while True:
                frame = self._receive_one()
                if frame is None or frame.kind is not FrameKind.KEEPALIVE:
                    return frame
        except FrameRejected as error:
            self.reject(error)
            raise
        except PeerLost as error:
            self._receive_failure = error
            raise

    def _receive_one(self) -> Frame | None:
        """Go on with the frame that is under way; return it when it is whole."""
        if self._header is None:
            if not self._fill(self._head):
                return None
            self._begin_payload(self._checker.check_header(self._head))
        assert self._header is not None
        payload = self._payload_buffer.data[: self._header.payload_length]
        if not self._fill(payload, hashing=True):
            return None
        header = self._checker.finish()
        self._header, self._filled = None, 0
        self.counters.received_frames += 1
        self._lent = self._payload_buffer
        return Frame(header, payload.toreadonly(), self._payload_buffer)

    def _begin_payload(self, header: FrameHeader) -> None:
        if self._lent is not None:
            self._buffers.put(self._lent)
            self._lent = None
        self._payload_buffer = self._buffers.take(header.payload_length)
        self._header, self._filled = header, 0

    def _fill(self, target: memoryview, *, hashing: bool = False) -> bool:
        """Read into `target` from `_filled` on; True when it is full, never a byte beyond it."""
        while self._filled < len(target):
            end = min(len(target), self._filled + RECEIVE_PIECE_BYTES)
            try:
                count = self._stream.receive_into(target[self._filled : end])
            except BlockingIOError:
                self._drained = True
                return False
            except OSError as error:
                raise _lost(error) from error
            self._drained = False
            if count == 0:
                within = self._filled > 0 or self._header is not None
                where = "within a frame" if within else "between frames"
                raise PeerLost(ClaimReason.STREAM_BROKEN, f"the peer hung up {where}")
            if hashing:
                self._checker.update(target[self._filled : self._filled + count])
            self._filled += count
            self.counters.received_bytes += count
            self._last_heard_ns = self._clock()
            self._judge.heard(self._last_heard_ns)
        return True

    # --- opening ----------------------------------------------------------------------------------

    def move_to(self, stream: Stream) -> None:
        """Go on over another stream, from the next frame on, in both directions; close the old one.

        To be called between frames, by both sides at the same place. Numbers and ids go on.
        """
        assert self._header is None, "within a frame"
        assert self._filled == 0, "within a header"
        with self._sending:
            self._stream.close()
            self._stream = stream
            self._lender = stream if isinstance(stream, LendingStream) else None
            stream.limit_silence(self._limit_ns / 1e9)

    def register(self, array: NDArray[np.uint8]) -> None:
        """Let the carrier read this memory where it lies, if it can make use of that."""
        if self._lender is not None:
            self._lender.register(array)

    def bind(self, connection: int) -> None:
        """From here on every frame of both directions carries this connection id."""
        self._encoder.connection = connection
        self._checker.connection = connection
        self._judge.heard(self._clock())

    def wait_frame(self, deadline_ns: int) -> Frame | None:
        """Return the next frame, or None when there was none until `deadline_ns`."""
        while (frame := self.receive()) is None:
            if not self._wait_readable(deadline_ns):
                return None
        return frame

    def _wait_readable(self, deadline_ns: int) -> bool:
        remaining_ms = max(deadline_ns - self._clock(), 0) / 1e6
        return self._stream.wait(readable=True, writable=False, timeout_ms=remaining_ms).readable


def _lost(error: OSError) -> PeerLost:
    reason = ClaimReason.PEER_SILENT if error.errno in SILENT_ERRORS else ClaimReason.STREAM_BROKEN
    return PeerLost(reason, error.strerror or str(error))
