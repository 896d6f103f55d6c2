"""When to say that we live, and when silence is a suspicion. Pure; times are monotonic ns.

Silence counts only while we ourselves were awake to hear. A process that was stopped (SIGSTOP, a
frozen host, a debugger) finds its clock far ahead: the time it slept says nothing of the peer.

    silence = sum of the turns since the last byte
    the first turn longer than limit / 2 is our own sleep: it leaves the peer exactly limit / 2
    suspicious <=> silence >= limit

So a single sleep, however long, never makes a suspicion by itself, and sleeping again and again
cannot put it off for ever: the second long turn of one silence counts.

Source: `Policy.silence_limit_ms`.
"""


class SilenceJudge:
    """Adds up the silence of a peer, or the lack of progress of a transfer."""

    def __init__(self, limit_ns: int, now_ns: int) -> None:
        """Begin as if the peer had spoken at `now_ns`."""
        assert limit_ns > 1, limit_ns
        self._limit_ns = limit_ns
        self._silence_ns = 0
        self._turn_ns = now_ns
        self._has_slept = False

    def heard(self, now_ns: int) -> None:
        """The peer gave a sign of life."""
        self._silence_ns = 0
        self._turn_ns = now_ns
        self._has_slept = False

    def is_suspicious(self, now_ns: int) -> bool:
        """Count one turn of the caller's loop and say whether the silence is a suspicion.

        To be asked at least every half limit.
        """
        half_ns = self._limit_ns // 2
        turn_ns = now_ns - self._turn_ns
        self._turn_ns = now_ns
        if turn_ns > half_ns and not self._has_slept:
            self._has_slept = True
            self._silence_ns = self._limit_ns - half_ns
        else:
            self._silence_ns += turn_ns
        return self._silence_ns >= self._limit_ns

    @property
    def due_at_ns(self) -> int:
        """When the silence becomes a suspicion, if nothing is heard before."""
        return self._turn_ns + self._limit_ns - self._silence_ns


class KeepaliveTimer:
    """Says when the next sign of life is due; any frame sent is one."""

    def __init__(self, interval_ns: int, now_ns: int) -> None:
        """Begin as if something had been sent at `now_ns`."""
        assert interval_ns > 0, interval_ns
        self._interval_ns = interval_ns
        self._sent_ns = now_ns

    @property
    def interval_seconds(self) -> float:
        """Time between two signs of life."""
        return self._interval_ns / 1e9

    def sent(self, now_ns: int) -> None:
        """Something was sent."""
        self._sent_ns = now_ns

    @property
    def due_at_ns(self) -> int:
        """When to send a KEEPALIVE if nothing else is sent before."""
        return self._sent_ns + self._interval_ns

    @property
    def late_at_ns(self) -> int:
        """When a sign of life that was due has been missing for half an interval."""
        return self.due_at_ns + self._interval_ns // 2
