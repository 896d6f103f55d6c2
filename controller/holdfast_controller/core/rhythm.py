"""How often hosts are asked to beat, and for how long a heartbeat counts. Pure.

A heartbeat costs a controller and etcd about the same whoever sends it, so a fixed distance between
two of them makes their work grow with the number of hosts, until claims have to wait for it: what
matters least takes the place of what matters most. So the *rate* is limited, and the distance grows
with the number of hosts. What happens on a host is told at once, in whatever rhythm it beats; what
comes later in a large cluster is only that a host which fell silent counts as such. Failovers do
not wait for that: the two hosts of a pair watch each other.
"""

import math
from dataclasses import dataclass

from holdfast_api.words import BEAT_SECONDS_MAX

BEATS_GRANTED = 2.5
"""A heartbeat counts for so many beats: one may get lost, and the next one come late."""
BEATS_LEFT_MIN = 2.0
"""With less than this a lease is replaced by a longer one. Apart from the above, so that a growing
cluster does not replace all its leases at each new host."""
FIGURES_SECONDS = 3.0
"""Free memory, counters: at least so old before they are written again."""
FIGURES_BEATS = 3


@dataclass(frozen=True)
class Rhythm:
    """What one host is granted and asked for."""

    beat_seconds: float
    """Distance of two heartbeats. Below a host's own it means nothing."""
    lease_seconds: int
    """What a new lease is made for: the host is silent after so long."""
    lease_seconds_min: int
    """A lease that is shorter than this is replaced."""
    figures_seconds: float
    """Figures that were written longer ago are written again."""


def rhythm_of(host_count: int, beats_per_second_max: int, silence_seconds: int) -> Rhythm:
    """Return the rhythm for `host_count` living hosts.

    `silence_seconds` is the shortest lease. Beyond `BEAT_SECONDS_MAX` the distance grows no more.
    """
    beat_seconds = min(host_count / beats_per_second_max, BEAT_SECONDS_MAX)
    return Rhythm(
        beat_seconds,
        lease_seconds=max(silence_seconds, math.ceil(BEATS_GRANTED * beat_seconds)),
        lease_seconds_min=max(silence_seconds, math.ceil(BEATS_LEFT_MIN * beat_seconds)),
        figures_seconds=max(FIGURES_SECONDS, FIGURES_BEATS * beat_seconds),
    )
