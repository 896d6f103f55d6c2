"""The choice of an encoding, against links and processors whose speed is known."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from holdfast_agent.core.encoding import (
    AUTO,
    CANDIDATES,
    MEASUREMENTS_MIN,
    TRIAL_INTERVAL_NS_MAX,
    TRIAL_NS_MAX,
    Encoding,
    EncodingChooser,
)

MEBIBYTE = 1 << 20
SECOND = 1_000_000_000
EPOCH_NS = SECOND // 20


@dataclass
class Speed:
    """Of both processors together, and how much is left of a page."""

    bytes_per_second: float
    ratio: float


SPEEDS = {
    Encoding.NONE: Speed(20e9, 1.0),
    Encoding.DELTA: Speed(0.8e9, 0.12),
    Encoding.ZSTD: Speed(0.25e9, 0.35),
    Encoding.DELTA_ZSTD: Speed(0.6e9, 0.05),
}


@dataclass
class Link:
    """A protection whose checkpoints take as long as its link and its processors need."""

    bytes_per_second: float
    page_bytes: int = 8 * MEBIBYTE
    latency_ns: int = 200_000
    epoch_ns: int = EPOCH_NS
    speeds: dict[Encoding, Speed] = field(default_factory=lambda: dict(SPEEDS))
    now_ns: int = 0
    wanted: str = AUTO
    noise: Callable[[int], float] = lambda _: 1.0
    used: Counter[Encoding] = field(default_factory=Counter)
    checkpoints: int = 0

    def __post_init__(self) -> None:
        self.chooser = EncodingChooser(self.wanted, self.now_ns)

    def elapsed_ns(self, encoding: Encoding) -> int:
        speed = self.speeds[encoding]
        seconds = self.page_bytes * (
            1 / speed.bytes_per_second + speed.ratio / self.bytes_per_second
        )
        return self.latency_ns + int(seconds * 1e9 * self.noise(self.checkpoints))

    def is_on_trial(self) -> bool:
        return self.chooser.encoding is not self.chooser.settled

    def run(self, seconds: float) -> Encoding:
        """Checkpoint for so long; return what is settled then."""
        until_ns = self.now_ns + int(seconds * SECOND)
        self.used.clear()
        while self.now_ns < until_ns:
            encoding = self.chooser.encoding
            elapsed_ns = self.elapsed_ns(encoding)
            self.now_ns += max(self.epoch_ns, elapsed_ns)
            self.chooser.acknowledged(self.page_bytes, elapsed_ns, self.now_ns)
            self.used[encoding] += 1
            self.checkpoints += 1
        return self.chooser.settled


@pytest.mark.parametrize("encoding", list(Encoding))
def test_an_encoding_that_the_policy_names_is_used_from_the_first_checkpoint_on(
    encoding: Encoding,
) -> None:
    link = Link(1e8, wanted=encoding.value)
    assert link.run(30) is encoding
    assert set(link.used) == {encoding}
    assert "policy" in link.chooser.reason


def test_on_loopback_pages_are_sent_as_they_are() -> None:
    link = Link(2e9)
    assert link.run(120) is Encoding.NONE
    assert link.used[Encoding.NONE] > 0.95 * link.used.total()
    assert "no other was better" in link.chooser.reason


def test_on_a_gigabit_differences_are_compressed() -> None:
    link = Link(118e6)
    assert link.run(10) is Encoding.DELTA_ZSTD
    assert "none" in link.chooser.reason
    link.run(600)
    assert link.used[Encoding.DELTA_ZSTD] > 0.9 * link.used.total()


def test_where_compressing_costs_more_than_it_saves_differences_are_sent_plain() -> None:
    speeds = SPEEDS | {Encoding.DELTA_ZSTD: Speed(0.3e9, 0.11), Encoding.DELTA: Speed(2e9, 0.12)}
    assert Link(600e6, speeds=speeds).run(60) is Encoding.DELTA


def test_a_guest_that_rewrites_everything_is_compressed_without_differences() -> None:
    speeds = SPEEDS | {
        Encoding.DELTA: Speed(0.4e9, 1.0),
        Encoding.DELTA_ZSTD: Speed(0.15e9, 0.4),
        Encoding.ZSTD: Speed(0.4e9, 0.4),
    }
    assert Link(50e6, speeds=speeds).run(60) is Encoding.ZSTD


def test_a_link_that_becomes_slow_is_noticed_within_seconds() -> None:
    link = Link(2e9)
    link.run(3600)
    link.bytes_per_second = 50e6
    assert link.run(30) is Encoding.DELTA_ZSTD


def test_a_link_that_becomes_fast_is_noticed_within_the_longest_interval() -> None:
    link = Link(50e6, epoch_ns=SECOND)
    assert link.run(50_000) is Encoding.DELTA_ZSTD
    link.bytes_per_second = 5e9
    rounds, trials_seconds = len(CANDIDATES) - 1, 300
    assert link.run(rounds * TRIAL_INTERVAL_NS_MAX / SECOND + trials_seconds) is Encoding.NONE


def test_trials_become_rare_while_nothing_changes() -> None:
    link = Link(2e9)
    link.run(1200)
    link.run(1200)
    assert link.used.total() - link.used[Encoding.NONE] < 60


def test_a_trial_that_goes_badly_ends_after_two_checkpoints() -> None:
    link = Link(2e9)
    link.speeds[Encoding.ZSTD] = Speed(0.01e9, 0.5)
    link.run(60)
    trials = -(-link.used[Encoding.ZSTD] // 2)
    assert 1 <= trials <= 3
    assert link.used[Encoding.ZSTD] == 2 * trials


def test_one_stall_ends_no_trial_and_settles_nothing() -> None:
    link = Link(118e6, noise=lambda number: 30.0 if number % 9 == 0 else 1.0)
    assert link.run(60) is Encoding.DELTA_ZSTD
    assert Link(2e9, noise=lambda number: 30.0 if number % 9 == 0 else 1.0).run(60) is Encoding.NONE


@pytest.mark.parametrize("seed", range(20))
def test_on_a_busy_machine_luck_settles_nothing(seed: int) -> None:
    """Times that wander by a factor of three say nothing about encodings that are alike."""
    source = random.Random(seed)
    speeds = {encoding: Speed(1e9, 1.0) for encoding in Encoding}
    link = Link(1e9, speeds=speeds, noise=lambda _: source.lognormvariate(0, 1))
    assert link.run(300) is Encoding.NONE


@pytest.mark.parametrize("seed", range(20))
def test_what_is_much_faster_is_found_on_a_busy_machine_as_well(seed: int) -> None:
    source = random.Random(seed)
    link = Link(50e6, noise=lambda _: source.lognormvariate(0, 0.7))
    assert link.run(300) is Encoding.DELTA_ZSTD


def test_what_is_a_little_faster_is_not_worth_the_processors() -> None:
    speeds = {encoding: Speed(20e9, 0.85) for encoding in Encoding} | {
        Encoding.NONE: Speed(20e9, 1.0)
    }
    assert Link(100e6, speeds=speeds).run(120) is Encoding.NONE


def test_what_is_as_fast_and_cheaper_is_taken_again() -> None:
    link = Link(50e6)
    assert link.run(60) is Encoding.DELTA_ZSTD
    link.speeds = {encoding: Speed(20e9, 1.0) for encoding in Encoding}
    assert link.run(60) is Encoding.NONE


def test_checkpoints_of_a_few_pages_are_not_measured() -> None:
    link = Link(1e6, page_bytes=8 * 4096)
    assert link.run(120) is Encoding.NONE
    assert set(link.used) == {Encoding.NONE}


def test_a_trial_with_nothing_to_measure_ends() -> None:
    link = Link(118e6)
    while not link.is_on_trial():
        link.run(0.05)
    link.page_bytes = 4096
    link.run(2 * TRIAL_NS_MAX / SECOND)
    assert not link.is_on_trial()
    assert link.chooser.settled is Encoding.NONE


def test_a_change_of_policy_counts_from_the_next_checkpoint_on() -> None:
    link = Link(118e6)
    link.run(30)
    link.chooser.change("none", link.now_ns)
    assert link.chooser.encoding is Encoding.NONE
    assert link.run(60) is Encoding.NONE
    assert set(link.used) == {Encoding.NONE}
    link.chooser.change(AUTO, link.now_ns)
    assert link.run(30) is Encoding.DELTA_ZSTD


def test_the_same_policy_again_changes_nothing() -> None:
    link = Link(118e6)
    link.run(30)
    reason = link.chooser.reason
    link.chooser.change(AUTO, link.now_ns)
    assert (link.chooser.settled, link.chooser.reason) == (Encoding.DELTA_ZSTD, reason)


def test_trials_are_at_least_two_seconds_apart() -> None:
    link = Link(2e9)
    began: list[int] = []
    before = Encoding.NONE
    for _ in range(2000):
        link.run(0.05)
        encoding = link.chooser.encoding
        if encoding is not Encoding.NONE and before is Encoding.NONE:
            began.append(link.now_ns)
        before = encoding
    assert len(began) > 3
    assert all(later - earlier >= 2 * SECOND for earlier, later in zip(began, began[1:]))  # noqa: B905, RUF007


def test_a_policy_that_says_auto_again_is_measured_soon() -> None:
    link = Link(2e9, epoch_ns=SECOND)
    link.run(20_000)
    link.chooser.change("none", link.now_ns)
    link.chooser.change(AUTO, link.now_ns)
    link.epoch_ns, link.bytes_per_second = EPOCH_NS, 50e6
    assert link.run(30) is Encoding.DELTA_ZSTD


def test_what_was_settled_is_measured_before_anything_else_is_tried() -> None:
    link = Link(118e6, epoch_ns=SECOND)
    while link.chooser.settled is Encoding.NONE:
        link.run(1)
    before = link.checkpoints
    while not link.is_on_trial():
        link.run(1)
    assert link.checkpoints - before >= MEASUREMENTS_MIN
