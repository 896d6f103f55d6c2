"""The signal that a guest's output waits, so that a checkpoint is taken at once. Polls descriptors.

A plug that takes packets into our process is its own signal: its socket is readable when the guest
sent something. Where nothing is held, nothing can wait: the signal never comes.
"""

import os
from collections.abc import Callable


class HeldOutputSignal:
    """Port `OutputSignal` of a plug that receives the guest's packets."""

    def __init__(self, fileno: Callable[[], int], drain: Callable[[], int]) -> None:
        """Speak for a plug; owns nothing."""
        self._fileno = fileno
        self._drain = drain

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when the guest sent something."""
        return self._fileno()

    def drain(self) -> int:
        """Read all that is there without waiting; returns the bytes of output seen.

        May be 0 although the descriptor was readable: it also says that the plug wants to go on.
        """
        return self._drain()


class SilentSignal:
    """Port `OutputSignal` that never comes; owns a descriptor."""

    def __init__(self) -> None:
        """Open a descriptor that is never readable."""
        self._descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        """Return the descriptor that is never readable."""
        return self._descriptor

    def drain(self) -> int:
        """Return 0."""
        return 0

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
