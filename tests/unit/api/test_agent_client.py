"""`AgentClient` against real HTTP servers; above all that a claim is never decided by guessing."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from tests.unit.api.canned import (
    ASSIGNMENTS,
    BEAT_ANSWER,
    CLAIM,
    HANG,
    HEARTBEAT,
    LOST,
    WON,
    FakeController,
    Reply,
    closing_after_each_request,
    good,
    problem,
    record,
)
from tests.unit.api.conftest import StartController

from holdfast_api import agent_client
from holdfast_api.client import AgentClient
from holdfast_api.errors import Refused, Unavailable
from holdfast_api.exchange import Attempt
from holdfast_api.messages import (
    ClaimVerdict,
    EventReport,
    RecordAnswer,
    ReleasedReport,
    SeededReport,
    SeedingFailedReport,
)
from holdfast_api.words import EventKind

CLAIMS = "/v1/agent/claims"
BEAT = "/v1/agent/hosts/h2/heartbeat"
POLL = "/v1/agent/hosts/h2/assignments"
ANSWER = RecordAnswer(record=record())
SEEDED = SeededReport(vm="redis", generation=3, host="h2")
RELEASED = ReleasedReport(vm="redis", generation=3, host="h2")
FAILED = SeedingFailedReport(vm="redis", generation=3, host="h2", reason="disk full")
EVENT = EventReport(kind=EventKind.VM_DESTROYED, host="h2", vm="redis", message="gone")
PATIENCE_SECONDS = 60.0
"""Deadline of what must not hang; never measured."""


def run(
    urls: list[str], act: Callable[[AgentClient], Awaitable[Any]], timeout_seconds: float = 10.0
) -> Any:
    async def whole() -> Any:
        async with (
            asyncio.timeout(PATIENCE_SECONDS),
            AgentClient(urls, "h2", timeout_seconds=timeout_seconds) as client,
        ):
            return await act(client)

    return asyncio.run(whole())


def note_patience(client: AgentClient, patiences: list[float]) -> None:
    """Write down how long each attempt may take; it goes on to the server as ever."""
    ask = client._ask

    async def noting(attempt: Attempt, *rest: Any) -> Any:
        patiences.append(attempt.seconds)
        return await ask(attempt, *rest)

    client._ask = noting  # type: ignore[assignment,method-assign]


def claim_at(*controllers: FakeController) -> ClaimVerdict:
    verdict = run([c.url for c in controllers], lambda c: c.claim(CLAIM))
    assert isinstance(verdict, ClaimVerdict)
    return verdict


@pytest.mark.parametrize(
    ("path", "call", "sent"),
    [
        ("/v1/agent/seeded", lambda c: c.seeded(SEEDED), SEEDED),
        ("/v1/agent/released", lambda c: c.released(RELEASED), RELEASED),
        ("/v1/agent/seeding-failed", lambda c: c.seeding_failed(FAILED), FAILED),
    ],
)
def test_a_report_is_sent_and_answered_with_the_record(
    controller: FakeController, path: str, call: Callable[[AgentClient], Awaitable[Any]], sent: Any
) -> None:
    controller.on("POST", path, good(ANSWER))
    assert run([controller.url], call) == ANSWER.record
    assert [r.json for r in controller.requests] == [sent.model_dump(mode="json")]


def test_a_heartbeat_brings_the_assignments(controller: FakeController) -> None:
    controller.on("POST", BEAT, good(BEAT_ANSWER))
    assert run([controller.url], lambda c: c.heartbeat(HEARTBEAT)) == BEAT_ANSWER
    assert controller.requests[0].json == HEARTBEAT.model_dump(mode="json")


def test_an_event_is_sent_whatever_the_body_of_the_answer(controller: FakeController) -> None:
    controller.on("POST", "/v1/agent/events", Reply(204))
    assert run([controller.url], lambda c: c.event(EVENT)) is None
    assert controller.requests[0].json == EVENT.model_dump(mode="json")


def test_a_refused_report_is_refused(controller: FakeController) -> None:
    controller.on("POST", "/v1/agent/seeded", problem("stale-generation"))
    with pytest.raises(Refused, match="stale-generation"):
        run([controller.url], lambda c: c.seeded(SEEDED))


def test_the_long_poll_says_what_it_knows_and_how_long_it_waits(
    controller: FakeController,
) -> None:
    controller.on("GET", POLL, good(ASSIGNMENTS))
    assert run([controller.url], lambda c: c.assignments(7, 25_000)) == ASSIGNMENTS
    assert controller.requests[0].query == "after=7&wait_ms=25000"


def test_a_long_poll_at_a_hung_controller_ends_and_the_next_goes_elsewhere(
    start_controller: StartController,
) -> None:
    stuck, able = start_controller(), start_controller()
    stuck.on("GET", POLL, HANG)
    able.on("GET", POLL, good(ASSIGNMENTS))

    async def poll_twice(client: AgentClient) -> None:
        for _ in range(2):
            assert await client.assignments(0, 200) == ASSIGNMENTS

    run([stuck.url, able.url], poll_twice, timeout_seconds=0.4)
    assert len(stuck.requests) == 1


def test_a_long_poll_gets_its_whole_time_at_every_controller(
    controller: FakeController, dead_url: str
) -> None:
    controller.on("GET", POLL, good(ASSIGNMENTS))
    patiences: list[float] = []

    async def poll(client: AgentClient) -> None:
        note_patience(client, patiences)
        await client.assignments(0, 30_000)

    run([dead_url, controller.url], poll)
    assert len(patiences) == 2
    assert min(patiences) > 30.0


def test_a_kept_connection_that_was_closed_costs_nothing_but_a_second_try() -> None:
    async def ask_thrice(client: AgentClient) -> None:
        for _ in range(3):
            assert await client.assignments(0, 0) == ASSIGNMENTS

    body = ASSIGNMENTS.model_dump_json().encode()
    with closing_after_each_request(body) as (url, seen):
        run([url], ask_thrice)
    assert seen == [2, 2, 1]


def test_503_dead_and_hung_controllers_are_passed_over(
    start_controller: StartController, dead_url: str
) -> None:
    unable, stuck, able = start_controller(), start_controller(), start_controller()
    unable.on("POST", BEAT, problem("store-unavailable"))
    stuck.on("POST", BEAT, HANG)
    able.on("POST", BEAT, good(BEAT_ANSWER))
    urls = [dead_url, unable.url, stuck.url, able.url]
    assert run(urls, lambda c: c.heartbeat(HEARTBEAT), timeout_seconds=4.0) == BEAT_ANSWER


def test_a_heartbeat_that_nobody_takes_is_unavailable(dead_url: str) -> None:
    with pytest.raises(Unavailable, match="no-controller"):
        run([dead_url], lambda c: c.heartbeat(HEARTBEAT))


def test_a_claim_goes_over_the_connection_that_the_heartbeat_warmed(
    controller: FakeController,
) -> None:
    controller.on("POST", BEAT, good(BEAT_ANSWER))
    controller.on("POST", CLAIMS, good(WON))

    async def beat_and_claim(client: AgentClient) -> None:
        await client.heartbeat(HEARTBEAT)
        await client.claim(CLAIM)

    run([controller.url], beat_and_claim)
    first, second = controller.requests
    assert first.port == second.port


# --- claims ---


@pytest.mark.parametrize("verdict", [WON, LOST])
def test_a_verdict_is_returned(controller: FakeController, verdict: ClaimVerdict) -> None:
    controller.on("POST", CLAIMS, good(verdict))
    assert claim_at(controller) == verdict


@pytest.mark.parametrize(
    "undecided",
    [
        HANG,
        Reply(parts=(b'{"won": true,',), hang=True),
        Reply(parts=(b'{"won": true,',), tear=True),
        Reply(parts=(), tear=True),
        problem("store-unavailable"),
        problem("conflict"),
        problem("internal"),
        problem("invalid-request"),
        problem("unknown-path"),
        problem("not-protected"),
        problem("wrong-phase"),
        problem("stale-generation"),
        good(LOST.model_copy(update={"record": None})),
        Reply(200, (b"{}",)),
        Reply(403, (b"no",), "text/plain"),
    ],
)
def test_an_undecided_claim_is_asked_again_with_the_same_name(
    controller: FakeController, undecided: Reply
) -> None:
    controller.on("POST", CLAIMS, undecided, undecided, good(WON))
    assert claim_at(controller) == WON
    assert len(controller.requests) == 3
    assert {r.body for r in controller.requests} == {CLAIM.model_dump_json().encode()}


def test_a_claim_is_taken_to_the_next_controller(
    start_controller: StartController, dead_url: str
) -> None:
    stuck, unable, able = start_controller(), start_controller(), start_controller()
    stuck.on("POST", CLAIMS, HANG)
    unable.on("POST", CLAIMS, problem("store-unavailable"))
    able.on("POST", CLAIMS, good(LOST))
    urls = [dead_url, stuck.url, unable.url, able.url]
    assert run(urls, lambda c: c.claim(CLAIM)) == LOST


def test_a_controller_that_hangs_is_asked_last_in_the_next_round(
    start_controller: StartController,
) -> None:
    stuck, able = start_controller(), start_controller()
    stuck.on("POST", CLAIMS, HANG)
    able.on("POST", CLAIMS, problem("store-unavailable"), good(WON))
    assert run([stuck.url, able.url], lambda c: c.claim(CLAIM)) == WON
    assert len(stuck.requests) == 1


def test_a_heartbeat_does_not_wait_its_whole_time_for_a_controller_that_hangs(
    start_controller: StartController,
) -> None:
    stuck, able = start_controller(), start_controller()
    stuck.on("POST", BEAT, HANG)
    able.on("POST", BEAT, good(BEAT_ANSWER))
    patiences: list[float] = []

    async def beat(client: AgentClient) -> None:
        note_patience(client, patiences)
        assert await client.heartbeat(HEARTBEAT) == BEAT_ANSWER

    run([stuck.url, able.url], beat, timeout_seconds=60.0)
    assert patiences[0] == agent_client.PATIENCE_SECONDS
    assert patiences[1] > 50.0


def test_a_slow_store_is_given_more_time_each_round(controller: FakeController) -> None:
    """The patience grows past any delay below its maximum: here past three rounds of it."""
    patiences: list[float] = []

    async def claim(client: AgentClient) -> ClaimVerdict:
        note_patience(client, patiences)
        return await client.claim(CLAIM)

    controller.on("POST", CLAIMS, *[problem("store-unavailable")] * 6, good(WON))
    assert run([controller.url], claim) == WON
    first = agent_client.CLAIM_ATTEMPT_SECONDS_MIN
    last = agent_client.CLAIM_ATTEMPT_SECONDS_MAX
    assert patiences == [min(first * 2**n, last) for n in range(7)]


def test_a_claim_that_nobody_decides_ends_only_when_it_is_cancelled(
    controller: FakeController,
) -> None:
    controller.on("POST", CLAIMS, problem("store-unavailable"))

    async def claim_until_cancelled(client: AgentClient) -> None:
        claiming = asyncio.create_task(client.claim(CLAIM))
        while len(controller.requests) < 5:
            assert not claiming.done()
            await asyncio.sleep(0.01)
        claiming.cancel()
        with pytest.raises(asyncio.CancelledError):
            await claiming

    run([controller.url], claim_until_cancelled, timeout_seconds=0.05)


def test_proxies_of_the_environment_are_ignored(
    controller: FakeController, dead_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", dead_url)
    monkeypatch.setenv("HTTP_PROXY", dead_url)
    controller.on("POST", BEAT, good(BEAT_ANSWER))
    assert run([controller.url], lambda c: c.heartbeat(HEARTBEAT)) == BEAT_ANSWER


def test_a_store_that_comes_back_decides_the_claim(
    start_controller: StartController, dead_url: str
) -> None:
    controller = start_controller()
    unable = problem("store-unavailable")
    controller.on("POST", CLAIMS, *[unable] * 8, good(WON))
    assert run([dead_url, controller.url], lambda c: c.claim(CLAIM)) == WON


def test_two_claims_at_once_do_not_disturb_each_other(controller: FakeController) -> None:
    controller.on("POST", CLAIMS, good(WON))

    async def claim_twice(client: AgentClient) -> list[ClaimVerdict]:
        return list(await asyncio.gather(client.claim(CLAIM), client.claim(CLAIM)))

    assert run([controller.url], claim_twice) == [WON, WON]
