"""How the pages of checkpoints are encoded, and which way is taken. Pure.

An encoding trades the processor's time for the network's. What that is worth nobody can say
beforehand: it depends on the link, on both processors, on what else they do, and on what the guest
writes. So `auto` measures what counts, and nothing else: the time from the end of a pause until the
acknowledgement, for each byte of pages. Encoding, sending, decoding and waiting are all in it.

Theory of operation. One encoding is *settled*. Now and then another one is on *trial* for a few
checkpoints, the first of which do not count: a delta needs to know what the backup has. It has won
if its median is better by a margin and so are nearly all of its checkpoints, or if it is no worse
and cheaper for the processors. It is settled when it has won three times in a row, with the settled
one measured anew in between: on a busy machine times wander, and one trial may just have been
lucky. A trial that goes badly ends after two checkpoints, so it costs little. While nothing
changes, trials become rare (2 s, then longer and longer, at most 5 min); when the settled encoding
becomes much slower than it was, they become frequent again.

Checkpoints of a few pages take as long as the network's round trip whatever is done to them. They
are not measured.

    a change of what is settled  =>  median of the trial <= median before  (with the margin)
"""

from collections import deque
from enum import StrEnum
from statistics import median

AUTO = "auto"
MEASURED_BYTES_MIN = 64 * 1024
WINDOW = 31
"""Checkpoints of which the median is taken."""
MEASUREMENTS_MIN = 15
"""Below this many, a median says little."""
WARMING_CHECKPOINTS = 4
"""A delta knows nothing of its first pages."""
TRIAL_CHECKPOINTS = WARMING_CHECKPOINTS + 15
BETTER_MIN = 12
"""Of a trial's 15: by chance alone, so many are better in 2 % of all trials."""
WINS_TO_SETTLE = 3
TRIAL_NS_MAX = 5_000_000_000
"""A trial in which the guest falls silent ends then."""
BAD_IN_A_ROW_MAX = 2
BAD = 2.0
MARGIN = 0.8
"""A costlier encoding must take less than this share of the time. Near 1: it changes for nothing.
Near 0: the processors are spared and the clients wait."""
TRIAL_INTERVAL_NS_MIN = 2_000_000_000
TRIAL_INTERVAL_NS_MAX = 300_000_000_000


class Encoding(StrEnum):
    """What is done to the content of pages; in order of what it costs the processors."""

    NONE = "none"
    DELTA = "delta"
    """Only the 8-byte words that changed, where the backup's page is known."""
    ZSTD = "zstd"
    DELTA_ZSTD = "delta-zstd"

    @property
    def is_delta(self) -> bool:
        """It needs to know what the backup has."""
        return self in (Encoding.DELTA, Encoding.DELTA_ZSTD)

    @property
    def is_compressed(self) -> bool:
        """The result is compressed."""
        return self in (Encoding.ZSTD, Encoding.DELTA_ZSTD)


EFFORT = {encoding: effort for effort, encoding in enumerate(Encoding)}
CANDIDATES = (Encoding.DELTA_ZSTD, Encoding.DELTA, Encoding.ZSTD, Encoding.NONE)
"""On trial in this order: what saves most first."""


class EncodingChooser:
    """Says how the next checkpoint is encoded. For one connection: what is measured is its link."""

    def __init__(self, wanted: str, now_ns: int) -> None:
        """Follow the policy's word: the name of an encoding, or `auto`."""
        self.settled = Encoding.NONE
        self.reason = ""
        self._wanted = ""
        self._trial: Encoding | None = None
        self._trial_began_ns = 0
        self._trial_checkpoints = 0
        self._bad_in_a_row = 0
        self._wins = 0
        self._trials_refused = 0
        self._next_candidate = 0
        self._interval_ns = TRIAL_INTERVAL_NS_MIN
        self._next_trial_ns = 0
        self._settled_cost = 0.0
        self._costs: deque[float] = deque(maxlen=WINDOW)
        self._trial_costs: deque[float] = deque(maxlen=WINDOW)
        self.change(wanted, now_ns)

    @property
    def encoding(self) -> Encoding:
        """What the next checkpoint is sent with."""
        return self.settled if self._trial is None else self._trial

    def change(self, wanted: str, now_ns: int) -> None:
        """Follow another policy from the next checkpoint on; the same one changes nothing."""
        if wanted == self._wanted:
            return
        self._wanted = wanted
        if wanted == AUTO:
            self._settle(Encoding.NONE, "nothing was measured yet", now_ns)
        else:
            self._settle(Encoding(wanted), "the policy says so", now_ns)

    def acknowledged(self, page_bytes: int, elapsed_ns: int, now_ns: int) -> None:
        """Learn that a checkpoint sent with `encoding` was acknowledged.

        `page_bytes` of its pages that are not zero, `elapsed_ns` after the end of its pause.
        """
        if self._wanted != AUTO:
            return
        if page_bytes >= MEASURED_BYTES_MIN:
            cost = elapsed_ns / page_bytes
            if self._trial is None:
                self._measured(cost, now_ns)
            else:
                self._tried(cost, now_ns)
        elif self._trial is not None and now_ns - self._trial_began_ns > TRIAL_NS_MAX:
            self._refuse(now_ns)

    def _measured(self, cost: float, now_ns: int) -> None:
        """Count a checkpoint of the settled encoding; begin a trial if one is due."""
        self._costs.append(cost)
        if len(self._costs) < MEASUREMENTS_MIN:
            return
        now_cost = median(self._costs)
        if not self._settled_cost:
            self._settled_cost = now_cost
        if now_cost > BAD * self._settled_cost:
            self._settled_cost = now_cost
            self._interval_ns = TRIAL_INTERVAL_NS_MIN
            self._next_trial_ns = min(self._next_trial_ns, now_ns + self._interval_ns)
        if now_ns >= self._next_trial_ns:
            self._begin_trial(now_ns)

    def _begin_trial(self, now_ns: int) -> None:
        if CANDIDATES[self._next_candidate] is self.settled:
            self._go_to_next_candidate()
        self._trial = CANDIDATES[self._next_candidate]
        self._trial_began_ns = now_ns
        self._trial_checkpoints = 0
        self._bad_in_a_row = 0
        self._trial_costs.clear()

    def _tried(self, cost: float, now_ns: int) -> None:
        """Count a checkpoint of the encoding on trial; judge it when it had its chance."""
        assert self._trial is not None
        self._trial_checkpoints += 1
        before = median(self._costs)
        self._bad_in_a_row = self._bad_in_a_row + 1 if cost > BAD * before else 0
        if self._bad_in_a_row >= BAD_IN_A_ROW_MAX:
            self._refuse(now_ns)
            return
        if self._trial_checkpoints > WARMING_CHECKPOINTS:
            self._trial_costs.append(cost)
        if self._trial_checkpoints < TRIAL_CHECKPOINTS:
            return
        after = median(self._trial_costs)
        if EFFORT[self._trial] < EFFORT[self.settled]:
            has_won = after <= before
        else:
            better = sum(cost < before for cost in self._trial_costs)
            has_won = after <= MARGIN * before and better >= BETTER_MIN
        if not has_won:
            self._refuse(now_ns)
            return
        self._wins += 1
        if self._wins < WINS_TO_SETTLE:
            self._trial = None
            self._costs.clear()
            self._next_trial_ns = now_ns
            return
        self._settle(
            self._trial,
            f"{_rate(after)} until acknowledged, {self.settled.value} {_rate(before)}",
            now_ns,
        )

    def _go_to_next_candidate(self) -> None:
        self._next_candidate = (self._next_candidate + 1) % len(CANDIDATES)
        self._wins = 0

    def _refuse(self, now_ns: int) -> None:
        """End the trial with nothing changed."""
        self._trial = None
        self._go_to_next_candidate()
        self._trials_refused += 1
        if self._trials_refused % (len(CANDIDATES) - 1) == 0:
            self._interval_ns = min(2 * self._interval_ns, TRIAL_INTERVAL_NS_MAX)
            self.reason = f"{_rate(median(self._costs))} until acknowledged, no other was better"
        self._next_trial_ns = now_ns + self._interval_ns

    def _settle(self, encoding: Encoding, reason: str, now_ns: int) -> None:
        self.settled = encoding
        self.reason = reason
        self._trial = None
        self._wins = 0
        self._trials_refused = 0
        self._interval_ns = TRIAL_INTERVAL_NS_MIN
        self._next_trial_ns = now_ns + self._interval_ns
        self._settled_cost = 0.0
        self._costs.clear()


def _rate(nanoseconds_per_byte: float) -> str:
    """Return a cost as people read it."""
    return f"{1e3 / max(nanoseconds_per_byte, 1e-6):.0f} MB/s"
