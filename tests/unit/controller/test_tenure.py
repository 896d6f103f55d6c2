"""How long a leader believes that it leads, against a lease that etcd counts."""

import random

import pytest

from holdfast_controller.core.tenure import Tenure, survives_a_failed_renewal

TTL_SECONDS = 5.0


class Lease:
    """Etcd's side: counts from when a request arrives."""

    def __init__(self, arrived_seconds: float) -> None:
        self.ends_at_seconds = arrived_seconds + TTL_SECONDS

    def renewed(self, arrived_seconds: float) -> bool:
        if arrived_seconds >= self.ends_at_seconds:
            return False
        self.ends_at_seconds = arrived_seconds + TTL_SECONDS
        return True


def test_a_tenure_holds_from_the_request_to_before_the_lease_ends() -> None:
    tenure = Tenure(asked_at_seconds=100.0, ttl_seconds=TTL_SECONDS)
    assert not tenure.holds(99.9), "a clock that went back"
    assert tenure.holds(100.0)
    assert tenure.holds(104.4)
    assert not tenure.holds(104.5)
    assert not tenure.holds(105.0)
    assert tenure.ends_at_seconds == pytest.approx(104.5)


def test_it_is_renewed_in_time_for_a_second_try() -> None:
    tenure = Tenure(asked_at_seconds=100.0, ttl_seconds=TTL_SECONDS)
    assert tenure.renew_at_seconds == pytest.approx(101.0)


@pytest.mark.parametrize("seed", range(200))
def test_however_slow_the_network_no_tenure_outlives_its_lease(seed: int) -> None:
    """Requests and answers take any time; half of the answers are lost; our clock runs 5 % slow."""
    dice = random.Random(seed)
    speed = 0.95
    now = dice.uniform(0, 1000)
    lease = Lease(now + dice.uniform(0, 3))
    tenure = Tenure(now * speed, TTL_SECONDS)
    held = 0
    for _ in range(50):
        asked_at = now
        arrived = asked_at + dice.uniform(0, 3)
        answered = arrived + dice.uniform(0, 3)
        before = lease.ends_at_seconds
        done = lease.renewed(arrived)
        for moment in (dice.uniform(asked_at, answered) for _ in range(20)):
            if tenure.holds(moment * speed):
                held += 1
                assert moment < (lease.ends_at_seconds if moment >= arrived else before)
        if done and dice.random() < 0.5:
            tenure = Tenure(asked_at * speed, TTL_SECONDS)
        now = answered
    assert held, "it never led at all"


def test_a_timeout_that_uses_up_the_lease_is_too_long() -> None:
    assert survives_a_failed_renewal(5.0, 2.0)
    assert survives_a_failed_renewal(10.0, 7.0)
    assert not survives_a_failed_renewal(2.0, 1.5)
    assert not survives_a_failed_renewal(5.0, 5.0)
