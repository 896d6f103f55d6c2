"""What can go wrong with a VM: errors that every room of the agent may raise or catch. Pure."""


class VirtualMachineFailed(Exception):  # noqa: N818 - reads as a sentence where it is raised
    """QEMU answered with an error, or not at all: the connection broke or a deadline passed.

    `command` is the QMP command in question, `error_class` QMP's class of a refusal; both are
    empty when the failure was not an answer.
    """

    def __init__(self, message: str, *, command: str = "", error_class: str = "") -> None:
        """Keep the evidence beside the message."""
        super().__init__(message)
        self.command = command
        self.error_class = error_class


class VirtualMachineGone(VirtualMachineFailed):
    """QEMU ended or hung up: nothing more will be answered on this connection."""


class VirtualMachineNotRunning(VirtualMachineFailed):
    """The guest did not execute when it was stopped: somebody or something stopped it before us.

    `status` is QEMU's (`shutdown`, `internal-error`, ...). It must not be resumed blindly.
    """

    def __init__(self, status: str) -> None:
        """Keep QEMU's status."""
        super().__init__(f"the guest was not running when it was stopped: its status is {status}")
        self.status = status


class MonitorBusy(VirtualMachineFailed):
    """Another client holds the monitor socket; QEMU serves one at a time."""


class PeerLost(Exception):  # noqa: N818 - reads as a sentence where it is raised
    """The other worker is silent, gone or sent what cannot be; nothing more is said to it.

    `reason` is a `ClaimReason` value: `peer-silent`, `stream-broken` or `peer-failed`.
    """

    def __init__(self, reason: str, explanation: str) -> None:
        """Keep the reason apart from the words."""
        super().__init__(f"{reason}: {explanation}")
        self.reason = reason
        self.explanation = explanation


class StagingFull(Exception):  # noqa: N818 - reads as a sentence where it is raised
    """This host has no memory left to stage what its peer sends; not the peer's fault."""
