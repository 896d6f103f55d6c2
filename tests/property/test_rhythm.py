"""The rhythm of heartbeats: bounded work for the controllers, and no host that beats is silent."""

from hypothesis import given
from hypothesis import strategies as st

from holdfast_api.words import BEAT_SECONDS_MAX
from holdfast_controller.core.rhythm import rhythm_of

HOSTS = st.integers(0, 20_000)
RATES = st.integers(1, 10_000)
SILENCES = st.integers(2, 300)


@given(HOSTS, RATES, SILENCES)
def test_all_hosts_together_beat_no_more_often_than_allowed(
    hosts: int, rate: int, silence: int
) -> None:
    beat_seconds = rhythm_of(hosts, rate, silence).beat_seconds
    assert 0 <= beat_seconds <= BEAT_SECONDS_MAX
    assert beat_seconds == BEAT_SECONDS_MAX or hosts <= rate * beat_seconds * 1.001


@given(HOSTS, RATES, SILENCES)
def test_a_lease_outlives_two_beats_and_is_never_shorter_than_the_operator_wants(
    hosts: int, rate: int, silence: int
) -> None:
    rhythm = rhythm_of(hosts, rate, silence)
    assert rhythm.lease_seconds >= 2.5 * rhythm.beat_seconds
    assert rhythm.lease_seconds >= rhythm.lease_seconds_min >= 2 * rhythm.beat_seconds
    assert rhythm.lease_seconds_min >= silence
    assert rhythm.figures_seconds >= max(3, 3 * rhythm.beat_seconds)


@given(HOSTS, RATES, SILENCES)
def test_a_host_more_replaces_no_lease_that_was_just_made(
    hosts: int, rate: int, silence: int
) -> None:
    made = rhythm_of(hosts, rate, silence).lease_seconds
    grown = hosts + hosts // 5
    assert made >= rhythm_of(grown, rate, silence).lease_seconds_min


def test_a_small_cluster_keeps_the_operators_times_and_a_large_one_is_slower() -> None:
    small, large = rhythm_of(3, 200, 5), rhythm_of(1000, 200, 5)
    assert (small.lease_seconds, small.lease_seconds_min) == (5, 5)
    assert small.beat_seconds < 0.1
    assert (large.beat_seconds, large.lease_seconds, large.lease_seconds_min) == (5.0, 13, 10)
    assert large.figures_seconds == 15.0
