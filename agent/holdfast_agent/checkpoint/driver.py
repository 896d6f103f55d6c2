"""What the drivers of both sides have in common: their ports, and the tie to the peer. Ports only.

What a turn is and what is done in it differs, and stands in `primary` and `backup`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

from holdfast_agent.checkpoint.ports import AgentPort, Peer
from holdfast_agent.checkpoint.waiting import WaitReadable
from holdfast_agent.checkpoint.wants import Wants
from holdfast_agent.core.failures import PeerLost
from holdfast_api.words import HostId


class Driver(ABC):
    """Closes nothing but the peer's connection; `peer` is None where there is none, or no more."""

    def __init__(
        self,
        *,
        host: HostId,
        peer: Peer | None,
        agent: AgentPort,
        wants: Wants,
        now_ns: Callable[[], int],
        wait: WaitReadable,
        hurry: Callable[[], None],
    ) -> None:
        """Use these parts until the driver has run; `hurry` is called when seeding is over."""
        self._host = host
        self._peer = peer
        self._agent = agent
        self._wants = wants
        self._now_ns = now_ns
        self._wait = wait
        self._hurry = hurry
        self._finished = False

    def _tend_peer(self) -> None:
        try:
            if self._peer is not None:
                self._peer.tend(self._now_ns())
        except PeerLost as lost:
            self._lose_peer(lost)

    @abstractmethod
    def _lose_peer(self, lost: PeerLost) -> None:
        """Hang up, then do what the core decides about a peer that is lost."""

    def _hang_up(self) -> None:
        if self._peer is not None:
            self._peer.close()
            self._peer = None
