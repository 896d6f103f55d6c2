"""`HoldfastClient` against real HTTP servers: good, hung, unable, dead, torn."""

from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
from tests.unit.api.canned import (
    HANG,
    FakeController,
    Reply,
    closing_after_each_request,
    event,
    events,
    good,
    host,
    hosts,
    problem,
    protection,
    stream,
    vm,
    vms,
)
from tests.unit.api.conftest import StartController

from holdfast_api.client import HoldfastClient
from holdfast_api.errors import Refused, Unavailable
from holdfast_api.messages import (
    EventList,
    HostPatch,
    PolicyList,
    PolicyPatch,
    Preflight,
)
from holdfast_api.records import Policy, StoredPolicy

SHORT_SECONDS = 1.0
STORED = StoredPolicy(name="fast", policy=Policy(interval_ms=20))
PREFLIGHT = Preflight(vm="redis", protectable=True, issues=())

CALLS: list[tuple[str, str, Reply, Callable[[HoldfastClient], Any], Any]] = [
    ("GET", "/v1/hosts", good(hosts("h1")), lambda c: c.hosts(), hosts("h1")),
    ("GET", "/v1/hosts/h1", good(host()), lambda c: c.host("h1"), host()),
    ("GET", "/v1/vms", good(vms(vm())), lambda c: c.vms(), vms(vm())),
    ("GET", "/v1/vms/redis", good(vm()), lambda c: c.vm("redis"), vm()),
    (
        "GET",
        "/v1/vms/redis/preflight",
        good(PREFLIGHT),
        lambda c: c.preflight("redis"),
        PREFLIGHT,
    ),
    (
        "GET",
        "/v1/vms/redis/protection",
        good(protection()),
        lambda c: c.protection("redis"),
        protection(),
    ),
    (
        "DELETE",
        "/v1/vms/redis/protection",
        good(protection(), 202),
        lambda c: c.unprotect("redis"),
        protection(),
    ),
    (
        "DELETE",
        "/v1/vms/redis/protection",
        Reply(204),
        lambda c: c.unprotect("redis"),
        None,
    ),
    (
        "GET",
        "/v1/policies",
        good(PolicyList(policies=(STORED,))),
        lambda c: c.policies(),
        PolicyList(policies=(STORED,)),
    ),
    ("GET", "/v1/policies/fast", good(STORED), lambda c: c.policy("fast"), STORED),
    ("DELETE", "/v1/policies/fast", Reply(204), lambda c: c.remove_policy("fast"), None),
]

CHANGES: list[tuple[str, str, Reply, Callable[[HoldfastClient], Any], Any]] = [
    (
        "PATCH",
        "/v1/hosts/h1",
        good(host()),
        lambda c: c.change_host("h1", HostPatch(labels={"rack": "a", "old": None})),
        {"labels": {"rack": "a", "old": None}, "maintenance": None},
    ),
    (
        "PUT",
        "/v1/vms/redis/protection",
        good(protection(), 202),
        lambda c: c.protect("redis", policy_name="fast"),
        {"policy_name": "fast", "policy": None},
    ),
    (
        "PUT",
        "/v1/vms/redis/protection",
        good(protection(), 202),
        lambda c: c.protect("redis", policy=Policy(interval_ms=20)),
        {"policy_name": None, "policy": Policy(interval_ms=20).model_dump(mode="json")},
    ),
    (
        "PATCH",
        "/v1/vms/redis/protection",
        good(protection()),
        lambda c: c.change("redis", PolicyPatch(interval_ms=20)),
        {
            "interval_ms": 20,
            "min_interval_ms": None,
            "output_triggered": None,
            "reprotect": None,
            "encoding": None,
        },
    ),
    (
        "POST",
        "/v1/vms/redis/switchover",
        good(protection(), 202),
        lambda c: c.switchover("redis", to="h2"),
        {"to": "h2"},
    ),
    (
        "PUT",
        "/v1/policies/fast",
        good(STORED),
        lambda c: c.store_policy("fast", STORED.policy),
        STORED.policy.model_dump(mode="json"),
    ),
]


@pytest.mark.parametrize(("method", "path", "reply", "call", "expected"), CALLS)
def test_each_reading_call_asks_its_path_and_returns_its_model(
    *,
    controller: FakeController,
    method: str,
    path: str,
    reply: Reply,
    call: Callable[[HoldfastClient], Any],
    expected: Any,
) -> None:
    controller.on(method, path, reply)
    with HoldfastClient([controller.url]) as client:
        assert call(client) == expected
    assert len(controller.requests) == 1


@pytest.mark.parametrize(("method", "path", "reply", "call", "body"), CHANGES)
def test_each_change_sends_its_message(
    *,
    controller: FakeController,
    method: str,
    path: str,
    reply: Reply,
    call: Callable[[HoldfastClient], Any],
    body: Any,
) -> None:
    controller.on(method, path, reply)
    with HoldfastClient([controller.url]) as client:
        call(client)
    (request,) = controller.requests
    assert request.json == body


def test_a_name_that_can_not_be_one_is_refused_before_anything_is_sent(
    controller: FakeController,
) -> None:
    with HoldfastClient([controller.url]) as client:
        for call in (
            lambda: client.vm("../hosts"),
            lambda: client.protect("redis", policy_name="NO"),
            lambda: client.switchover("redis", to=""),
        ):
            with pytest.raises(Refused, match="can not be a name"):
                call()
    assert controller.requests == []


def test_a_problem_is_refused_with_its_code(controller: FakeController) -> None:
    controller.on("GET", "/v1/vms/ghost", problem("unknown-vm", "no agent reports ghost"))
    with HoldfastClient([controller.url]) as client, pytest.raises(Refused) as caught:
        client.vm("ghost")
    assert (caught.value.code, caught.value.detail) == ("unknown-vm", "no agent reports ghost")


def test_a_refusal_is_not_taken_to_another_controller(start_controller: StartController) -> None:
    first, second = start_controller(), start_controller()
    first.on("GET", "/v1/hosts", problem("conflict"))
    with HoldfastClient([first.url, second.url]) as client, pytest.raises(Unavailable):
        client.hosts()
    assert second.requests == []


def test_a_dead_port_is_passed_over_and_the_good_one_remembered(
    controller: FakeController, dead_url: str
) -> None:
    controller.on("GET", "/v1/hosts", good(hosts("h1")))
    with HoldfastClient([dead_url, controller.url]) as client:
        assert client.hosts() == hosts("h1")
        assert client._controllers.order()[0] == controller.url


def test_a_controller_that_answers_503_is_passed_over(start_controller: StartController) -> None:
    unable, able = start_controller(), start_controller()
    unable.on("GET", "/v1/hosts", problem("store-unavailable"))
    able.on("GET", "/v1/hosts", good(hosts("h1")))
    with HoldfastClient([unable.url, able.url]) as client:
        client.hosts()
        client.hosts()
    assert len(unable.requests) == 1, "the good one is asked first from then on"


@pytest.mark.parametrize("hung", [HANG, Reply(parts=(b'{"hosts":',), hang=True)])
def test_a_hung_controller_leaves_time_for_the_others(
    start_controller: StartController, hung: Reply
) -> None:
    stuck, able = start_controller(), start_controller()
    stuck.on("GET", "/v1/hosts", hung)
    able.on("GET", "/v1/hosts", good(hosts("h1")))
    with HoldfastClient([stuck.url, able.url], timeout_seconds=SHORT_SECONDS) as client:
        assert client.hosts() == hosts("h1")


def test_when_all_are_out_of_reach_the_error_names_each(
    controller: FakeController, dead_url: str
) -> None:
    controller.on("GET", "/v1/hosts", HANG)
    urls = [controller.url, dead_url]
    with (
        HoldfastClient(urls, timeout_seconds=SHORT_SECONDS) as client,
        pytest.raises(Unavailable) as caught,
    ):
        client.hosts()
    assert caught.value.code == "no-controller"
    assert all(url in caught.value.detail for url in urls)
    assert caught.value.__cause__ is not None


def test_an_answer_from_something_else_is_not_believed(controller: FakeController) -> None:
    controller.on("GET", "/v1/hosts", Reply(200, (b"<html>hello",), "text/html"))
    with HoldfastClient([controller.url]) as client, pytest.raises(Unavailable) as caught:
        client.hosts()
    assert caught.value.code == "internal"


@pytest.mark.parametrize("timeout_seconds", [0.0, -1.0])
def test_a_timeout_without_time_is_refused(timeout_seconds: float) -> None:
    with pytest.raises(ValueError, match="leaves no time"):
        HoldfastClient(["http://127.0.0.1:1"], timeout_seconds=timeout_seconds)


def test_proxies_of_the_environment_are_ignored(
    controller: FakeController, dead_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", dead_url)
    monkeypatch.setenv("ALL_PROXY", dead_url)
    controller.on("GET", "/v1/hosts", good(hosts("h1")))
    with HoldfastClient([controller.url]) as client:
        assert client.hosts() == hosts("h1")


def test_a_kept_connection_that_was_closed_costs_nothing_but_a_second_try() -> None:
    body = hosts("h1").model_dump_json().encode()
    with closing_after_each_request(body) as (url, seen), HoldfastClient([url]) as client:
        assert [client.hosts() for _ in range(3)] == [hosts("h1")] * 3
    assert seen == [2, 2, 1]


# --- events ---


def test_listed_events_are_asked_for_until_there_are_no_more(controller: FakeController) -> None:
    controller.on(
        "GET",
        "/v1/events",
        good(EventList(events=events(6, 9))),
        good(EventList(events=events(12))),
        good(EventList(events=())),
    )
    with HoldfastClient([controller.url]) as client:
        assert [e.position for e in client.events(5)] == [6, 9, 12]
    assert [r.query for r in controller.requests] == ["after=5", "after=9", "after=12"]


def test_a_controller_that_repeats_itself_does_not_repeat_events(
    controller: FakeController,
) -> None:
    controller.on("GET", "/v1/events", good(EventList(events=events(1, 2))))
    with HoldfastClient([controller.url]) as client:
        assert [e.position for e in client.events()] == [1, 2]


@pytest.mark.parametrize("tear", [True, False])
def test_a_broken_stream_is_taken_up_after_the_last_event_elsewhere(
    start_controller: StartController, tear: bool
) -> None:
    first, second = start_controller(), start_controller()
    first.on("GET", "/v1/events", stream(*events(1, 2), tear=tear), problem("store-unavailable"))
    second.on("GET", "/v1/events", stream(*events(2, 3, 4), hang=True))
    with HoldfastClient([first.url, second.url], timeout_seconds=5.0) as client:
        following = client.events(follow=True)
        assert [e.position for e in islice(following, 4)] == [1, 2, 3, 4]
        following.close()  # type: ignore[attr-defined] # a generator, said to be an Iterator
    assert second.requests[0].query == "after=2&follow=true"


def test_a_message_with_a_line_separator_stays_one_event(controller: FakeController) -> None:
    odd = event(1, message="first\u2028second\x85third")
    controller.on("GET", "/v1/events", stream(odd, hang=True))
    with HoldfastClient([controller.url]) as client:
        following = client.events(follow=True)
        assert next(following) == odd
        following.close()  # type: ignore[attr-defined]


def test_following_nobody_fails_at_once(dead_url: str) -> None:
    with HoldfastClient([dead_url], timeout_seconds=300.0) as client, pytest.raises(Unavailable):
        next(client.events(follow=True))


def test_following_gives_up_when_nobody_comes_back(controller: FakeController) -> None:
    controller.on("GET", "/v1/events", stream(*events(1), tear=True), problem("store-unavailable"))
    with HoldfastClient([controller.url], timeout_seconds=SHORT_SECONDS) as client:
        following = client.events(follow=True)
        assert next(following).position == 1
        with pytest.raises(Unavailable):
            next(following)
    assert len(controller.requests) > 2, "it tried again before it gave up"


def test_a_pause_of_the_controllers_is_survived(controller: FakeController) -> None:
    unable = problem("store-unavailable")
    controller.on(
        "GET",
        "/v1/events",
        stream(*events(1), tear=True),
        unable,
        unable,
        stream(*events(2), hang=True),
    )
    with HoldfastClient([controller.url], timeout_seconds=30.0) as client:
        following = client.events(follow=True)
        assert [e.position for e in islice(following, 2)] == [1, 2]
        following.close()  # type: ignore[attr-defined]


def test_a_refused_stream_is_refused(controller: FakeController) -> None:
    controller.on("GET", "/v1/events", problem("invalid-request"))
    with HoldfastClient([controller.url]) as client, pytest.raises(Refused):
        next(client.events(follow=True))


@pytest.mark.parametrize(
    "reply",
    [
        Reply(200, (b"<html>",), "text/html"),
        Reply(200, (b"data: {}\n\n",), "text/event-stream", hang=True),
    ],
)
def test_what_is_no_event_stream_is_a_fault_and_not_silence(
    controller: FakeController, reply: Reply
) -> None:
    controller.on("GET", "/v1/events", reply)
    with HoldfastClient([controller.url]) as client, pytest.raises(Unavailable) as caught:
        next(client.events(follow=True))
    assert caught.value.code == "internal"
