"""Silence and keep-alives: what is a suspicion, and what is only our own sleep."""

from holdfast_agent.transport.liveness import KeepaliveTimer, SilenceJudge


def turns(judge: SilenceJudge, start: int, stop: int, step: int = 50) -> list[int]:
    """The times, one turn each `step`, at which there was a suspicion."""
    return [now for now in range(start, stop, step) if judge.is_suspicious(now)]


def test_silence_for_the_whole_limit_is_a_suspicion_and_less_is_none() -> None:
    assert turns(SilenceJudge(250, 0), 50, 400)[0] == 250


def test_a_byte_starts_the_silence_anew() -> None:
    judge = SilenceJudge(250, 0)
    assert turns(judge, 50, 250) == []
    judge.heard(240)
    assert turns(judge, 250, 600, 10)[0] == 490


def test_after_our_own_sleep_the_peer_has_half_the_limit() -> None:
    judge = SilenceJudge(250, 0)
    assert turns(judge, 50, 250) == []
    assert not judge.is_suspicious(10_000)
    assert turns(judge, 10_010, 10_300, 10)[0] == 10_130  # 125 more


def test_a_turn_of_half_the_limit_is_no_sleep() -> None:
    judge = SilenceJudge(250, 0)
    assert turns(judge, 50, 201) == []
    assert judge.is_suspicious(325)


def test_sleeping_again_and_again_does_not_put_a_suspicion_off() -> None:
    judge = SilenceJudge(250, 0)
    assert not judge.is_suspicious(1000)
    assert judge.is_suspicious(2000)


def test_after_a_byte_the_next_sleep_is_forgiven_again() -> None:
    judge = SilenceJudge(250, 0)
    assert not judge.is_suspicious(1000)
    judge.heard(1010)
    assert not judge.is_suspicious(2000)


def test_a_sleep_does_not_shorten_what_was_left() -> None:
    judge = SilenceJudge(250, 0)
    assert not judge.is_suspicious(126)  # a sleep at the very beginning
    assert judge.due_at_ns == 126 + 125


def test_the_due_time_is_when_the_suspicion_comes() -> None:
    judge = SilenceJudge(250, 0)
    assert judge.due_at_ns == 250
    judge.is_suspicious(100)
    assert judge.due_at_ns == 250
    judge.heard(120)
    assert judge.due_at_ns == 370
    assert not judge.is_suspicious(9_000)
    assert judge.due_at_ns == 9_125


def test_a_keepalive_is_due_an_interval_after_anything_was_sent() -> None:
    timer = KeepaliveTimer(50, 100)
    assert timer.due_at_ns == 150
    timer.sent(140)
    assert timer.due_at_ns == 190
