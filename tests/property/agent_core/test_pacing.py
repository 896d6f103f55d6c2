"""Pacing as a state machine: the distances hold under every order of events."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from holdfast_agent.core.pacing import Pacing

MS = 1_000_000


class PacingMachine(RuleBasedStateMachine):
    """Captures exactly when one is due, and checks what that means for the guest."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000 * MS
        self.policy = (50, 5, True)
        self.pacing = Pacing(interval_ms=50, min_interval_ms=5, output_triggered=True)
        self.captured_at: int | None = None
        self.acknowledged_at = 0
        self.unacknowledged = False
        self.output_at: int | None = None

    def is_due(self) -> bool:
        due = self.pacing.due_at_ns()
        return due is not None and due <= self.now

    @rule(elapsed=st.integers(0, 30 * MS) | st.sampled_from([5 * MS, 50 * MS]))
    def time_passes(self, elapsed: int) -> None:
        self.now += elapsed

    @rule()
    def output_comes(self) -> None:
        self.pacing.output_waits(self.now)
        if self.output_at is None:
            self.output_at = self.now

    @precondition(lambda self: self.is_due())
    @rule()
    def capture(self) -> None:
        if self.captured_at is not None:
            interval, minimum, heeds = self.policy
            distance = self.now - self.captured_at
            assert distance >= minimum * MS
            assert distance >= interval * MS or (heeds and self.output_at is not None)
        assert not self.unacknowledged
        self.pacing.captured(self.now)
        self.captured_at, self.output_at, self.unacknowledged = self.now, None, True

    @precondition(lambda self: self.unacknowledged)
    @rule()
    def acknowledge(self) -> None:
        self.pacing.acknowledged(self.now)
        self.unacknowledged = False
        self.acknowledged_at = self.now

    @rule(interval=st.integers(1, 60), minimum=st.integers(1, 60), heeds=st.booleans())
    def change_policy(self, interval: int, minimum: int, *, heeds: bool) -> None:
        self.policy = (max(interval, minimum), minimum, heeds)
        self.pacing.change_policy(
            interval_ms=self.policy[0], min_interval_ms=minimum, output_triggered=heeds
        )

    @invariant()
    def is_due_when_it_must_be(self) -> None:
        """Liveness: past every reason to wait, a checkpoint is due."""
        due = self.pacing.due_at_ns()
        assert (due is None) == self.unacknowledged
        if due is None or self.captured_at is None:
            return
        interval, minimum, heeds = self.policy
        assert due >= self.acknowledged_at
        assert due <= max(self.captured_at + interval * MS, self.acknowledged_at)
        if heeds and self.output_at is not None:
            soonest = max(self.captured_at + minimum * MS, self.output_at, self.acknowledged_at)
            assert due <= soonest


TestPacing = PacingMachine.TestCase
