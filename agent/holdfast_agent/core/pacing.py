"""When the next checkpoint is due. Pure; times are nanoseconds of one monotonic clock.

    due = never                                        while a checkpoint is unacknowledged
        = at once                                      when so much waits that some will be lost
        = max(last capture + min_interval, output)     when output waits and policy heeds it
        = last capture + interval                      otherwise

and never before the last acknowledgement. Distances are between the starts of captures: that is
what the guest feels.

Source: policy fields of `holdfast_api.records.Policy`.
"""

NANOSECONDS_PER_MILLISECOND = 1_000_000


class Pacing:
    """The rhythm of one protection's checkpoints."""

    def __init__(self, *, interval_ms: int, min_interval_ms: int, output_triggered: bool) -> None:
        """Start with the first checkpoint due at once."""
        self._last_capture_ns: int | None = None
        self._acknowledged_ns = 0
        self._output_since_ns: int | None = None
        self._pressed_since_ns: int | None = None
        self._is_unacknowledged = False
        self.change_policy(
            interval_ms=interval_ms,
            min_interval_ms=min_interval_ms,
            output_triggered=output_triggered,
        )

    def change_policy(
        self, *, interval_ms: int, min_interval_ms: int, output_triggered: bool
    ) -> None:
        """Follow another policy from now on."""
        assert 0 < min_interval_ms <= interval_ms, (min_interval_ms, interval_ms)
        self._interval_ns = interval_ms * NANOSECONDS_PER_MILLISECOND
        self._min_interval_ns = min_interval_ms * NANOSECONDS_PER_MILLISECOND
        self._output_triggered = output_triggered

    def captured(self, at_ns: int) -> None:
        """A capture began: the output seen so far belongs to it."""
        assert not self._is_unacknowledged, "one checkpoint unacknowledged at a time"
        self._last_capture_ns = at_ns
        self._output_since_ns = self._pressed_since_ns = None
        self._is_unacknowledged = True

    def output_waits(self, at_ns: int) -> None:
        """The guest sent something that is held."""
        if self._output_since_ns is None:
            self._output_since_ns = at_ns

    def output_presses(self, at_ns: int) -> None:
        """So much is held that more may not fit: whatever the policy says, do not wait."""
        if self._pressed_since_ns is None:
            self._pressed_since_ns = at_ns

    def acknowledged(self, at_ns: int) -> None:
        """The backup holds the last checkpoint."""
        assert self._is_unacknowledged, "nothing was captured"
        self._is_unacknowledged = False
        self._acknowledged_ns = at_ns

    def due_at_ns(self) -> int | None:
        """Return when to capture next (it may have passed); None: not before an event."""
        if self._is_unacknowledged:
            return None
        if self._last_capture_ns is None:
            return 0
        due_ns = self._last_capture_ns + self._interval_ns
        if self._output_triggered and self._output_since_ns is not None:
            soonest_ns = self._last_capture_ns + self._min_interval_ns
            due_ns = min(due_ns, max(soonest_ns, self._output_since_ns))
        if self._pressed_since_ns is not None:
            due_ns = min(due_ns, self._pressed_since_ns)
        return max(due_ns, self._acknowledged_ns)
