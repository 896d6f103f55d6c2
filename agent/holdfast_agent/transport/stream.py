"""What carries the frames of a connection: a reliable, ordered run of bytes to one peer and back.

Pure declarations. `tcp.TcpStream` is one; `connection.FrameConnection` uses nothing else of it.

A stream never waits but in `wait`, and there no longer than it is told. One thread receives; `send`
may be called by another one meanwhile (keep-alives), though never by two at once.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


class Readiness(NamedTuple):
    """What a stream is ready for; one that has failed is ready for both, to say so there."""

    readable: bool
    writable: bool


class Stream(Protocol):
    """One end of a stream of bytes. Errors of the carrier are OSError."""

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when something arrives.

        After it has, receive until BlockingIOError: what a stream took in but did not hand out
        does not make the descriptor readable again.
        """

    def send(self, views: Sequence[memoryview]) -> int:
        """Send the first bytes of `views`, as many as there is room for; returns how many.

        Raises BlockingIOError when there is no room at all. The same bytes must then be offered
        first the next time.
        """

    def receive_into(self, target: memoryview) -> int:
        """Receive at most `len(target)` bytes; returns how many, 0 at the end of the stream.

        Raises BlockingIOError when nothing is there.
        """

    def wait(self, *, readable: bool, writable: bool, timeout_ms: float) -> Readiness:
        """Wait until one of what is asked for is the case, at most `timeout_ms`."""

    def limit_silence(self, silence_limit_seconds: float) -> None:
        """Let the carrier itself give up on a peer that confirms nothing for so long."""

    def end_sending(self) -> None:
        """Say that nothing more will be sent: the peer reads all, then the end."""

    def close(self) -> None:
        """Close it. Idempotent."""


@runtime_checkable
class LendingStream(Stream, Protocol):
    """A stream whose carrier reads some memory of the caller after `send` has returned."""

    def register(self, array: NDArray[np.uint8]) -> None:
        """Let the carrier read this memory where it lies, as long as the array lives.

        What can not be registered is copied instead.
        """

    def settle(self, timeout_ms: float) -> bool:
        """Wait until the memory offered to `send` may be changed; False if it may not yet.

        Raises OSError.
        """
