"""What can go wrong with guest memory: three errors, one per decision of a caller. Pure.

| error | means | the caller |
|---|---|---|
| `InjectionFailed` | the process could not be made to call the kernel | takes a lesser tracker |
| `TrackingFailed` | writes may have been missed, or cannot be seen | ends protection, seeds anew |
| `MemoryAccessFailed` | pages could not be read or written | takes QEMU for dead |
"""

from holdfast_agent.core.failures import VirtualMachineFailed


class InjectionFailed(Exception):  # noqa: N818 - reads as a sentence where it is raised
    """Process `pid` was not brought to make our system call; it runs on as before."""

    def __init__(self, pid: int, reason: str) -> None:
        """Say it about process `pid`."""
        super().__init__(f"process {pid}: {reason}")
        self.pid = pid
        self.reason = reason


class TrackingFailed(VirtualMachineFailed):
    """The dirty set of process `pid` is not known (any more)."""

    def __init__(self, pid: int, reason: str) -> None:
        """Say it about process `pid`."""
        super().__init__(f"process {pid}: {reason}")
        self.pid = pid
        self.reason = reason


class MemoryAccessFailed(VirtualMachineFailed):
    """Memory of process `pid` could not be reached; `page` counts within `block`."""

    def __init__(self, pid: int, block: str, page: int, reason: str) -> None:
        """Say it about page `page` of `block` in process `pid`."""
        super().__init__(f"process {pid}, block {block}, page {page}: {reason}")
        self.pid = pid
        self.block = block
        self.page = page
        self.reason = reason
