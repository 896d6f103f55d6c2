"""A stream of bytes over one RDMA queue pair: port `LendingStream`. Owns the link it is given.

Theory of operation. The peer lends us a ring of its memory, and we lend it one of ours. `send` lets
the NIC write the next bytes into the peer's ring; a word behind them says how much became readable.
`receive_into` copies out of our ring, and what was taken goes back as credits, which are words as
well (`core.ring`). Nothing but the ring is ever written into by a peer: what arrives is judged by
the frames' checksums after it was copied out, where the peer's NIC can not reach.

Memory that was registered (`register`) is written from where it lies, so it must stay as it is
until `settle`: the NIC reads it when it gets to it, and again if a packet is lost.

Waking. Completions are polled for; only when there is nothing to hand out the queue is armed, and
polled once more, so that none is missed. The descriptor of `fileno` is an epoll over three: the
queue's, RDMA CM's, and an eventfd that is readable as long as bytes are left that were taken in but
not handed out. So it stays readable until all is received, like a socket's.

The end. RDMA CM says when the peer disconnected or its process died; what had arrived by then is
still handed out. A peer whose host died says nothing: the frames' keep-alives find that out.

Providers of iWARP have no immediate data; a SEND of four bytes behind the writes carries the word.

One lock: keep-alives are sent from another thread. Nothing waits while it is held.
"""

import contextlib
import errno
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from holdfast_agent.core.ring import RingReader, RingViolated, Word, WordKind
from holdfast_agent.transport.rdma.link import Link, OwnRing, PeerRing
from holdfast_agent.transport.rdma.outbox import Outbox
from holdfast_agent.transport.rdma.verbs import STATUS_SUCCESS
from holdfast_agent.transport.stream import Readiness

LOGGER = logging.getLogger(__name__)


class RdmaStream:
    """One end of a stream over RDMA."""

    def __init__(self, link: Link, own: OwnRing, peer: PeerRing) -> None:
        """Take over a connected link, all of whose receive requests are posted."""
        self._link = link
        self._own = own
        self._reader = RingReader(own.shape)
        self._outbox = Outbox(link, own, peer)
        self._failure: OSError | None = None
        self._peer_ended = False
        self._end_wanted = False
        self._is_closed = False
        self._lock = threading.Lock()
        self._level = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._level_is_set = False
        self._poller = select.poll()
        self._epoll = select.epoll()
        for descriptor in (link.receives.fileno(), link.hang_up_fileno()):
            self._epoll.register(descriptor, select.EPOLLIN)
            self._poller.register(descriptor, select.POLLIN)
        self._poller.register(link.sends.fileno(), select.POLLIN)
        self._epoll.register(self._level, select.EPOLLIN)
        with self._lock:
            self._progress()

    def fileno(self) -> int:
        """Return the epoll descriptor."""
        return self._epoll.fileno()

    def register(self, array: NDArray[np.uint8]) -> None:
        """Let the NIC read this memory where it lies, until the array goes.

        What can not be registered goes through the bounce buffer, and a line into the log.
        """
        with self._lock:
            if self._is_closed:
                return
            try:
                self._outbox.regions.add(array)
            except OSError as error:
                LOGGER.warning("%s; it is copied instead", error)

    def send(self, views: Sequence[memoryview]) -> int:
        """Post one piece; registered memory in it is lent until `settle`."""
        with self._lock:
            self._progress()
            if self._failure is not None:
                raise self._failure
            try:
                length = self._outbox.post(views)
            except OSError as error:
                self._fail(error)
                raise
        if length == 0:
            raise BlockingIOError(errno.EAGAIN, "no credit")
        return length

    def settle(self, timeout_ms: float) -> bool:
        """Wait until the NIC needs nothing any more of what was lent; False if it still does."""

        def is_settled() -> bool:
            return self._outbox.lent_bytes == 0

        self._wait_until(
            lambda: is_settled() or self._failure is not None, timeout_ms, for_sends=True
        )
        if not is_settled() and self._failure is not None:
            raise self._failure
        return is_settled()

    def receive_into(self, target: memoryview) -> int:
        """Copy out what is there."""
        with self._lock:
            if self._reader.readable_bytes == 0:
                self._progress()
            taken = self._take(target)
            self._say_words()
            self._show_level()
        if taken or self._peer_ended:
            return taken
        if self._failure is not None:
            raise self._failure
        raise BlockingIOError(errno.EAGAIN, "nothing is there")

    def wait(self, *, readable: bool, writable: bool, timeout_ms: float) -> Readiness:
        """Wait for words and completions."""
        self._wait_until(
            lambda: (readable and self._is_readable) or (writable and self._is_writable),
            timeout_ms,
            for_sends=writable,
        )
        return Readiness(readable and self._is_readable, writable and self._is_writable)

    def limit_silence(self, silence_limit_seconds: float) -> None:
        """Leave it to keep-alives: a queue pair's own retries are fixed when it is connected."""

    def end_sending(self) -> None:
        """Say END behind everything that was sent, as soon as there is credit for it."""
        with self._lock:
            self._end_wanted = True
            self._progress()

    def close(self) -> None:
        """Hang up; the memory that was lent to the peer is out of its reach. Idempotent."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._failure = OSError(errno.EBADF, "RDMA: closed")
            self._epoll.close()
            self._link.close()
            self._outbox.regions.close()
            self._own.close()
            os.close(self._level)

    # --- waiting ----------------------------------------------------------------------------------

    @property
    def _is_readable(self) -> bool:
        return self._reader.readable_bytes > 0 or self._peer_ended or self._failure is not None

    @property
    def _is_writable(self) -> bool:
        return self._outbox.has_room or self._failure is not None

    def _wait_until(
        self, is_reached: Callable[[], bool], timeout_ms: float, *, for_sends: bool
    ) -> None:
        """Take in what happens until `is_reached`, at most so long."""
        deadline = time.monotonic() + timeout_ms / 1000
        poller = select.poll()
        poller.register(self._link.receives.fileno(), select.POLLIN)
        poller.register(self._link.hang_up_fileno(), select.POLLIN)
        if for_sends:
            poller.register(self._link.sends.fileno(), select.POLLIN)
        while True:
            remaining_ms = (deadline - time.monotonic()) * 1000
            with self._lock:
                self._progress(will_wait=remaining_ms > 0, for_sends=for_sends)
                if remaining_ms <= 0 or is_reached():
                    return
            poller.poll(remaining_ms)

    # --- what happened ----------------------------------------------------------------------------

    def _progress(self, *, will_wait: bool = False, for_sends: bool = False) -> None:
        """Take in what happened. Afterwards our descriptor is readable or the queue is armed.

        Whoever `will_wait` on the queues' own descriptors wants them armed in any case.
        """
        if self._failure is None:
            try:
                self._take_events()
                self._poll()
                if will_wait or not self._is_readable:
                    self._link.receives.arm()
                    if for_sends:
                        self._link.sends.arm()
                    self._poll()
            except RingViolated as error:
                self._fail(OSError(errno.EPROTO, f"RDMA: {error}"))
            except OSError as error:
                self._fail(error)
            self._say_words()
        self._show_level()

    def _take_events(self) -> None:
        link = self._link
        events = dict(self._poller.poll(0))
        if link.sends.fileno() in events:
            link.sends.disarm()
        if link.receives.fileno() in events:
            link.receives.disarm()
        if link.hang_up_fileno() in events and (how := link.hang_up()) is not None:
            self._poll_receives()  # what came before the end comes before it here as well
            self._fail(how)

    def _poll(self) -> None:
        self._poll_receives()
        self._outbox.poll()

    def _poll_receives(self) -> None:
        while found := self._link.receives.poll():
            for completion in found:
                if completion.status != STATUS_SUCCESS:
                    raise completion.failure()
                slot = completion.request
                value = self._own.word(slot) if completion.word is None else completion.word
                self._own.post_receive(self._link, slot)
                self._hear(Word.decode(value))

    def _hear(self, word: Word) -> None:
        if word.kind is WordKind.CREDIT:
            self._outbox.credited(word)
            return
        if self._peer_ended:
            raise RingViolated(f"{word.kind.name} after END")
        self._reader.arrived(word)
        self._peer_ended = word.kind is WordKind.END

    def _fail(self, error: OSError) -> None:
        """Remember the first failure; what follows from it tells nothing."""
        if self._failure is None:
            self._failure = error

    def _say_words(self) -> None:
        """Return credits that are due, and say END if that is wanted; as far as there is room."""
        if self._failure is not None:
            return
        outbox = self._outbox
        try:
            while outbox.may_post_word and (credit := self._reader.credit_due()) is not None:
                outbox.post_credit(credit)
            if self._end_wanted:
                outbox.post_end()
        except OSError as error:
            self._fail(error)

    def _take(self, target: memoryview) -> int:
        """Copy what is readable into `target`; returns how many bytes."""
        out = np.frombuffer(target, dtype=np.uint8)
        filled = 0
        while filled < len(out) and self._reader.readable_bytes:
            offset, length = self._reader.span(len(out) - filled)
            out[filled : filled + length] = self._own.memory[offset : offset + length]
            self._reader.taken(length)
            filled += length
        return filled

    def _show_level(self) -> None:
        if self._is_closed or self._is_readable == self._level_is_set:
            return
        self._level_is_set = not self._level_is_set
        if self._level_is_set:
            os.eventfd_write(self._level, 1)
        else:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._level)
