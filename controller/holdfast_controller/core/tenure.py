"""How long a leader may believe that it leads. Pure.

The lease on leadership lives in etcd; we only know when we asked for it, on our own clock. etcd
counts from a moment after that, and never fewer seconds than it was asked for. So

    asked_at < the moment etcd counts from,  hence  asked_at + ttl < the moment the lease ends

and a leader that stops before `asked_at + ttl` has stopped before another can be elected. The share
kept back on top (`MARGIN`) is for clocks that run at different speeds.

One lost or slow renewal must not end a tenure: the lease is renewed each `RENEW_SHARE` of its time,
and a request to etcd may use up its whole timeout, so

    RENEW_SHARE * ttl + request_timeout <= (1 - MARGIN) * ttl

Source: C. Gray, D. Cheriton, "Leases", SOSP 1989, section 3: the holder's term is shorter.
"""

from dataclasses import dataclass

MARGIN = 0.1
"""Of the time to live: 10 % is more than any two clocks of working machines differ."""
RENEW_SHARE = 0.2


@dataclass(frozen=True)
class Tenure:
    """A lease on leadership that was granted or renewed."""

    asked_at_seconds: float
    """When the request was about to be sent; not when its answer came."""
    ttl_seconds: float

    @property
    def ends_at_seconds(self) -> float:
        """From this moment on we do not lead, unless the lease was renewed."""
        return self.asked_at_seconds + (1 - MARGIN) * self.ttl_seconds

    @property
    def renew_at_seconds(self) -> float:
        """When to renew the lease."""
        return self.asked_at_seconds + RENEW_SHARE * self.ttl_seconds

    def holds(self, now_seconds: float) -> bool:
        """Whether nobody else can lead yet. A clock that went back proves nothing: then it ends."""
        return self.asked_at_seconds <= now_seconds < self.ends_at_seconds


def survives_a_failed_renewal(ttl_seconds: float, request_timeout_seconds: float) -> bool:
    """Whether a tenure outlasts one renewal that takes all its time and brings nothing."""
    return RENEW_SHARE * ttl_seconds + request_timeout_seconds <= (1 - MARGIN) * ttl_seconds
