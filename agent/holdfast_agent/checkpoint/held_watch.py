"""Watches how much output is held, so that none is lost in silence. Over ports only.

From half of the limit on a checkpoint is asked for at once; when packets were dropped all the same
it becomes an event, at most one in `EVENT_DISTANCE_NS`, with their number.
"""

import logging

from holdfast_agent.checkpoint.ports import AgentPort, OutputPlug
from holdfast_agent.checkpoint.wants import Wants
from holdfast_agent.checkpoint.worker_messages import Happened
from holdfast_api.words import EventKind

LOGGER = logging.getLogger(__name__)
EVENT_DISTANCE_NS = 10_000_000_000


class HeldWatch:
    """The watch over one VM's plug."""

    def __init__(self, plug: OutputPlug, agent: AgentPort, wants: Wants, limit_bytes: int) -> None:
        """Watch `plug` under this limit of each NIC."""
        self._plug = plug
        self._agent = agent
        self._wants = wants
        self._limit_bytes = limit_bytes
        self._told_packets = 0
        self._tell_from_ns = 0

    def change_limit(self, limit_bytes: int) -> None:
        """Follow the policy."""
        if limit_bytes != self._limit_bytes:
            self._limit_bytes = limit_bytes
            self._plug.change_limit(limit_bytes)

    def is_pressed(self) -> bool:
        """Return whether so much is held that a checkpoint should be taken at once."""
        return self._plug.held_bytes() * 2 >= self._limit_bytes

    def tell(self, now_ns: int) -> int:
        """Report drops that were not told yet, if it is time; return all drops so far."""
        dropped = self._plug.dropped_packets()
        new = dropped - self._told_packets
        if new > 0 and now_ns >= self._tell_from_ns:
            self._told_packets = dropped
            self._tell_from_ns = now_ns + EVENT_DISTANCE_NS
            text = (
                f"{new} packets of the guest were dropped: more than {self._limit_bytes} bytes "
                "waited for a checkpoint's acknowledgement; raise held_limit_bytes, or find out "
                "why checkpoints take so long"
            )
            LOGGER.warning("%s", text)
            event = self._wants.event(
                EventKind.OUTPUT_DROPPED,
                text,
                {"dropped_packets": new, "held_limit_bytes": self._limit_bytes},
            )
            self._agent.send(Happened(event=event))
        return dropped
