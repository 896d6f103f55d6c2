"""What one exchange with the controllers means, without any HTTP."""

from itertools import chain, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.api.canned import CLAIM, LOST, WON, Reply, good, hosts, problem, record

from holdfast_api.errors import PROBLEMS, HoldfastError, Refused, Unavailable
from holdfast_api.exchange import (
    EVENT_BYTES_MAX,
    Answer,
    Attempt,
    Controllers,
    EventLines,
    Search,
    expect_success,
    name_segment,
    parse_urls,
    read_answer,
    read_claim_answer,
)
from holdfast_api.messages import ClaimVerdict, HostList

URLS = ("http://a:1", "http://b:2", "http://c:3")


def answer_of(reply: Reply) -> Answer:
    return Answer(reply.status, reply.content_type, b"".join(reply.parts))


def error_of(reply: Reply) -> HoldfastError:
    with pytest.raises(HoldfastError) as caught:
        expect_success(answer_of(reply))
    return caught.value


# --- URLs and names ---


def test_urls_lose_slashes_spaces_and_doubles() -> None:
    assert parse_urls([" http://a:1/ ", "", "http://a:1", "https://b"]) == (
        "http://a:1",
        "https://b",
    )


@pytest.mark.parametrize("urls", [[], [""], ["a:1"], ["ftp://a"], ["http://"], ["http://a", "b"]])
def test_what_is_no_controller_url_is_refused_at_once(urls: list[str]) -> None:
    with pytest.raises(ValueError, match="controller URL"):
        parse_urls(urls)


@pytest.mark.parametrize("name", ["", "..", "a/b", "A", "a?b", "-a", "a" * 64, "a\n"])
def test_what_can_not_be_a_name_is_refused(name: str) -> None:
    with pytest.raises(Refused, match="can not be a name"):
        name_segment(name)


def test_a_name_becomes_a_segment() -> None:
    assert name_segment("web-1.a_b") == "web-1.a_b"


# --- the way through the controllers ---


def test_the_controller_that_answered_last_is_asked_first() -> None:
    controllers = Controllers(URLS)
    controllers.remember("http://b:2")
    assert controllers.order() == ("http://b:2", "http://c:3", "http://a:1")


def test_a_controller_that_failed_is_not_asked_first_again() -> None:
    controllers = Controllers(URLS)
    search = Search(controllers, deadline_seconds=9.0)
    attempt = search.next(0.0)
    assert attempt is not None
    search.failed(attempt, OSError("gone"))
    assert controllers.order()[0] == "http://b:2"


def test_the_failure_of_another_leaves_the_good_one_first() -> None:
    controllers = Controllers(URLS)
    controllers.pass_over("http://c:3")
    assert controllers.order()[0] == "http://a:1"


def test_each_controller_gets_its_share_of_what_is_left() -> None:
    search = Search(Controllers(URLS), deadline_seconds=109.0)
    assert search.next(100.0) == Attempt("http://a:1", 3.0)
    assert search.next(101.0) == Attempt("http://b:2", 4.0)
    assert search.next(104.0) == Attempt("http://c:3", 5.0)
    assert search.next(104.0) is None


def test_patience_is_for_those_behind_whom_another_one_waits() -> None:
    search = Search(Controllers(URLS), deadline_seconds=9.0, patience_seconds=1.0)
    assert search.next(0.0) == Attempt("http://a:1", 1.0)
    assert search.next(1.0) == Attempt("http://b:2", 1.0)
    assert search.next(2.0) == Attempt("http://c:3", 7.0)


def test_a_long_poll_may_wait_its_time_and_be_late_by_our_patience() -> None:
    search = Search(
        Controllers(URLS), deadline_seconds=39.0, wait_seconds=30.0, patience_seconds=1.0
    )
    assert search.next(0.0) == Attempt("http://a:1", 31.0)


def test_nobody_is_asked_after_the_deadline() -> None:
    search = Search(Controllers(URLS), deadline_seconds=109.0)
    assert search.next(109.0) is None


def test_a_long_poll_may_wait_its_whole_time_at_each_controller() -> None:
    search = Search(Controllers(URLS), deadline_seconds=39.0, wait_seconds=30.0)
    assert search.next(0.0) == Attempt("http://a:1", 33.0)
    assert search.next(1.0) == Attempt("http://b:2", 34.0)
    assert search.next(20.0) == Attempt("http://c:3", 19.0)


def test_a_stale_connection_gets_its_controller_one_more_try_and_not_two() -> None:
    search = Search(Controllers(URLS[:2]), deadline_seconds=9.0)
    asked = []
    while (attempt := search.next(0.0)) is not None:
        asked.append(attempt.url)
        search.failed(attempt, OSError("closed"), stale=True)
    assert asked == ["http://a:1", "http://a:1", "http://b:2", "http://b:2"]


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_controller_that_can_not_now_is_left_for_the_next(status: int) -> None:
    search = Search(Controllers(URLS), deadline_seconds=9.0)
    attempt = search.next(0.0)
    assert attempt is not None
    assert not search.settled(attempt, Answer(status, "text/plain", b"busy"))
    assert search.next(0.0) == Attempt("http://b:2", 4.5)
    assert search.controllers.order()[0] == "http://b:2"


@pytest.mark.parametrize("status", [200, 404, 409, 500])
def test_every_other_answer_is_the_answer(status: int) -> None:
    controllers = Controllers(URLS)
    search = Search(controllers, deadline_seconds=9.0)
    attempt = search.next(0.0)
    assert attempt is not None
    controllers.pass_over(attempt.url)  # by another call, meanwhile
    assert search.settled(attempt, Answer(status, "text/plain", b""))
    assert controllers.order()[0] == attempt.url


def test_the_last_problem_names_the_code_when_nobody_could() -> None:
    search = Search(Controllers(URLS[:2]), deadline_seconds=9.0)
    for reply in (problem("store-unavailable", "etcd is away"), Reply(502, (b"bad gateway",))):
        attempt = search.next(0.0)
        assert attempt is not None
        search.settled(attempt, answer_of(reply))
    error = search.unavailable()
    assert error.code == "store-unavailable"
    assert "http://a:1: HTTP 503 store-unavailable: etcd is away" in error.detail
    assert "http://b:2: HTTP 502 bad gateway" in error.detail


def test_a_code_that_does_not_fit_its_status_is_not_passed_on() -> None:
    search = Search(Controllers(URLS[:1]), deadline_seconds=9.0)
    attempt = search.next(0.0)
    assert attempt is not None
    body = b"".join(problem("unknown-vm").parts)
    search.settled(attempt, Answer(503, "application/problem+json", body))
    assert search.unavailable().code == "no-controller"


# --- answers ---


def test_a_problem_becomes_a_refusal_with_all_its_faults() -> None:
    error = error_of(problem("invalid-request", "two things", ["a: wrong", "b: missing"]))
    assert isinstance(error, Refused)
    assert (error.code, error.detail, error.faults) == (
        "invalid-request",
        "two things",
        ["a: wrong", "b: missing"],
    )


@pytest.mark.parametrize("code", sorted(PROBLEMS))
def test_what_is_not_decided_is_unavailable_and_all_else_is_refused(code: str) -> None:
    undecided = {"store-unavailable", "no-controller", "internal", "busy", "conflict"}
    error = error_of(problem(code))
    assert error.code == code
    assert isinstance(error, Unavailable if code in undecided else Refused)


@pytest.mark.parametrize(
    ("reply", "kind", "code"),
    [
        (Reply(404, (b"<html>no",), "text/html"), Refused, "invalid-request"),
        (Reply(500, (b"oops",), "text/plain"), Unavailable, "internal"),
        (Reply(302, (b"",), "text/html"), Unavailable, "internal"),
        (Reply(409, (b"{",), "application/problem+json"), Refused, "invalid-request"),
        (Reply(409, (b"[1]",), "application/problem+json"), Refused, "invalid-request"),
        (Reply(409, (b'{"code":"new"}',), "application/problem+json"), Refused, "invalid-request"),
        (Reply(409, (b"\xff",), "application/problem+json"), Refused, "invalid-request"),
    ],
)
def test_an_answer_that_is_no_problem_of_ours_still_becomes_an_error(
    reply: Reply, kind: type[HoldfastError], code: str
) -> None:
    error = error_of(reply)
    assert type(error) is kind
    assert error.code == code
    assert f"HTTP {reply.status}" in error.detail


def test_a_successful_answer_that_is_not_the_model_is_not_believed() -> None:
    with pytest.raises(Unavailable, match="no HostList of this version"):
        read_answer(Answer(200, "application/json", b'{"hosts": 3}'), HostList)


def test_a_successful_answer_becomes_its_model() -> None:
    assert read_answer(answer_of(good(hosts("h1"))), HostList) == hosts("h1")


# --- claims (INV-5) ---


STRANGER = record(generation=3, primary="h1")


@pytest.mark.parametrize(
    "verdict",
    [
        WON,
        LOST,
        WON.model_copy(update={"record": record(generation=9)}),
        LOST.model_copy(update={"record": record(generation=9)}),
        LOST.model_copy(update={"record": STRANGER}),
    ],
)
def test_a_verdict_that_its_record_bears_out_is_decided(verdict: ClaimVerdict) -> None:
    assert read_claim_answer(answer_of(good(verdict)), CLAIM) == verdict


@pytest.mark.parametrize(
    "verdict",
    [
        WON.model_copy(update={"record": None}),
        WON.model_copy(update={"record": record(primary="h1")}),
        WON.model_copy(update={"record": record(generation=3)}),
        WON.model_copy(update={"record": record(vm="other")}),
        LOST.model_copy(update={"record": None}),
        LOST.model_copy(update={"record": record(generation=3)}),
        LOST.model_copy(update={"record": record(generation=2, primary="h1")}),
        LOST.model_copy(update={"record": record(primary="h1", vm="other")}),
    ],
)
def test_a_verdict_that_its_record_does_not_bear_out_decides_nothing(
    verdict: ClaimVerdict,
) -> None:
    assert isinstance(read_claim_answer(answer_of(good(verdict)), CLAIM), str)


@pytest.mark.parametrize("code", sorted(PROBLEMS))
def test_no_refusal_decides_a_claim(code: str) -> None:
    """What is out of place now (a record that still says `seeding`) need not stay so."""
    result = read_claim_answer(answer_of(problem(code, "so it is")), CLAIM)
    assert isinstance(result, str)
    assert f"{code}: so it is" in result


@pytest.mark.parametrize(
    "answer",
    [
        Answer(200, "application/json", b'{"won": true}'),
        Answer(200, "application/json", b"<html>"),
        Answer(202, "application/json", WON.model_dump_json().encode()),
        Answer(204, "", b""),
        Answer(403, "text/plain", b"the proxy says no"),
    ],
)
def test_an_odd_answer_decides_no_claim(answer: Answer) -> None:
    assert isinstance(read_claim_answer(answer, CLAIM), str)


# --- server-sent events ---

STREAM = (
    b": comment\r\n\r\n"
    b"id: 1\nevent: X\ndata: one\n\n"
    b"data:two\ndata: halves\n\n"
    b"retry: 5\n\n"
    b"data: line\xe2\x80\xa8separator\r\n\r\n"
    b"data: unfinished\n"
)
EXPECTED = [b"one", b"two\nhalves", b"line\xe2\x80\xa8separator"]


@given(st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_events_come_out_whole_however_the_stream_is_cut(cuts: list[int]) -> None:
    lines = EventLines()
    edges = [0, *sorted(cuts), len(STREAM)]
    found = [data for start, end in pairwise(edges) for data in lines.feed(STREAM[start:end])]
    assert found == EXPECTED


@pytest.mark.parametrize("piece", [b"x" * 1000, b"data: " + b"x" * 1000 + b"\n"])
def test_an_endless_event_is_cut_off(piece: bytes) -> None:
    lines = EventLines()
    with pytest.raises(Unavailable, match="larger than"):
        list(chain.from_iterable(lines.feed(piece) for _ in range(EVENT_BYTES_MAX // 1000 + 2)))


def test_many_small_events_are_not_one_large_one() -> None:
    lines = EventLines()
    found = sum(len(list(lines.feed(b"data: " + b"x" * 1000 + b"\n\n"))) for _ in range(1200))
    assert found == 1200
