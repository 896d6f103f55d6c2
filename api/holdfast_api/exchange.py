"""What one exchange with the controllers means: which one to ask, and how its answer reads. Pure.

`client` does the HTTP; everything it decides is here, so that the blocking and the asyncio client
decide alike. Time is a number of seconds given by the caller.

A call goes once through the controllers, beginning with the one that answered last. It moves on
when one does not answer or answers 502, 503 or 504; any other answer is *the* answer. A controller
that closed a kept connection under the request is asked once more on a fresh one: uvicorn drops
idle connections, and that says nothing about the controller.

Claims are read by `read_claim_answer`, which knows only won, lost and undecided (INV-5: an unknown
answer is not a won claim; and as the loser destroys its VM, it is not a lost one either).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from json import JSONDecodeError, loads
from math import inf
from re import fullmatch
from typing import TypeVar
from urllib.parse import quote, urlsplit

from pydantic import BaseModel, ValidationError

from holdfast_api.errors import PROBLEMS, HoldfastError, Refused, Unavailable
from holdfast_api.messages import Claim, ClaimVerdict
from holdfast_api.records import ProtectionRecord
from holdfast_api.words import NAME_PATTERN, Role

ANSWER_BYTES_MAX = 256 * 1024 * 1024
"""A listing of 10,000 protected VMs is about 30 MB; more than this is not an answer of ours."""
EVENT_BYTES_MAX = 1024 * 1024
"""One server-sent event; ours are a few hundred bytes."""
DETAIL_CHARACTERS_MAX = 500
"""So much of an unexpected answer is shown."""

AnyModel = TypeVar("AnyModel", bound=BaseModel)

MOVE_ON_STATUSES = frozenset({502, 503, 504})


@dataclass(frozen=True)
class Answer:
    """A whole HTTP answer."""

    status: int
    content_type: str
    body: bytes

    @property
    def is_problem(self) -> bool:
        """Whether this is an RFC 9457 problem document."""
        return self.content_type.partition(";")[0].strip().lower() == "application/problem+json"


def parse_urls(urls: Sequence[str]) -> tuple[str, ...]:
    """Return the controllers' base URLs without trailing slashes.

    Raises:
        ValueError: None given, or one is no http(s) URL; says which.
    """
    parsed = tuple(dict.fromkeys(url.strip().rstrip("/") for url in urls if url.strip()))
    if not parsed:
        raise ValueError("no controller URL given; give one or several, separated by commas")
    for url in parsed:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not a controller URL; write it as http://ADDRESS:PORT")
    return parsed


def name_segment(name: str) -> str:
    """Return a name as a URL segment.

    Raises:
        Refused: `name` can not be the name of a host, VM or policy.
    """
    if not fullmatch(NAME_PATTERN, name):
        raise Refused(
            "invalid-request",
            f"{name!r} can not be a name: use 1 to 63 of a-z, 0-9, '.', '_', '-', "
            "beginning and ending with a letter or digit",
        )
    return quote(name, safe="")


class Controllers:
    """The controllers of one client, and which of them answered last."""

    def __init__(self, urls: Sequence[str]) -> None:
        """Take the base URLs; the first is asked first."""
        self.urls = parse_urls(urls)
        self._good_index = 0

    def order(self) -> tuple[str, ...]:
        """Return all URLs, beginning with the one that answered last."""
        return self.urls[self._good_index :] + self.urls[: self._good_index]

    def remember(self, url: str) -> None:
        """Ask `url` first from now on."""
        self._good_index = self.urls.index(url)

    def pass_over(self, url: str) -> None:
        """Ask the next one first, if `url` is the one that would be."""
        if self.urls[self._good_index] == url:
            self._good_index = (self._good_index + 1) % len(self.urls)


@dataclass(frozen=True)
class Attempt:
    """Ask `url`, and give up on it after `seconds`."""

    url: str
    seconds: float


@dataclass
class Search:
    """One call's way through the controllers.

    Each gets an equal part of what is left of the deadline, so that a hung one leaves time for the
    others, and no more than `patience_seconds` while there is another one to ask; the last gets all
    that is left. `wait_seconds` is what a long poll may take by right; each gets that in full, as
    far as the deadline allows.
    """

    controllers: Controllers
    deadline_seconds: float
    wait_seconds: float = 0.0
    patience_seconds: float = inf
    cause: Exception | None = None
    _queue: list[str] = field(default_factory=list)
    _again: set[str] = field(default_factory=set)
    _reasons: list[str] = field(default_factory=list)
    _last_problem: Answer | None = None

    def __post_init__(self) -> None:
        """Fix the order now: another call may move the good one meanwhile."""
        self._queue = list(self.controllers.order())

    def next(self, now_seconds: float) -> Attempt | None:
        """Return whom to ask next; None when all were asked or the time is over."""
        left_seconds = self.deadline_seconds - now_seconds
        if not self._queue or left_seconds <= 0:
            return None
        right_seconds = min(self.wait_seconds, left_seconds)
        share_seconds = (left_seconds - right_seconds) / len(self._queue)
        if len(self._queue) > 1:
            share_seconds = min(share_seconds, self.patience_seconds)
        return Attempt(self._queue.pop(0), right_seconds + share_seconds)

    def failed(self, attempt: Attempt, error: Exception, *, stale: bool = False) -> None:
        """Take note that `attempt` brought no answer; `stale`: its connection was an old one."""
        self.cause = error
        if stale and attempt.url not in self._again:
            self._again.add(attempt.url)
            self._queue.insert(0, attempt.url)
            return
        self.controllers.pass_over(attempt.url)
        self._reasons.append(f"{attempt.url}: {str(error) or type(error).__name__}")

    def settled(self, attempt: Attempt, answer: Answer) -> bool:
        """Whether `answer` ends the search; otherwise the next controller is to be asked."""
        if answer.status in MOVE_ON_STATUSES:
            self.controllers.pass_over(attempt.url)
            self._reasons.append(f"{attempt.url}: {_one_line(answer)}")
            self._last_problem = answer if answer.is_problem else self._last_problem
            return False
        self.controllers.remember(attempt.url)
        return True

    def unavailable(self) -> Unavailable:
        """Return what to raise when nobody answered."""
        tried = "; ".join(self._reasons) or "no time was left to ask"
        code = "no-controller"
        if self._last_problem is not None:
            code = _problem_fields(self._last_problem)[0] or code
        if PROBLEMS[code][0] not in MOVE_ON_STATUSES:
            code = "no-controller"
        return Unavailable(code, f"no controller gave an answer ({tried})")


def read_answer(answer: Answer, model: type[AnyModel]) -> AnyModel:
    """Return the body of a successful answer.

    Raises:
        Refused: The controller says no; repeating will not help.
        Unavailable: It is not known what became of the request.
    """
    expect_success(answer)
    try:
        return model.model_validate_json(answer.body)
    except ValidationError as error:
        raise Unavailable(
            "internal",
            f"the answer is no {model.__name__} of this version of the API "
            f"(is the URL a controller's, and of the same version?): {_first_fault(error)}",
        ) from error


def expect_success(answer: Answer) -> None:
    """Raise what a problem document means; other answers than 2xx become problems too."""
    if 200 <= answer.status < 300:  # noqa: PLR2004 - the class of HTTP statuses
        return
    raise _error_of(answer)


def read_claim_answer(answer: Answer, claim: Claim) -> ClaimVerdict | str:
    """Return the verdict, or a sentence why `answer` decides nothing (INV-5).

    Only a verdict decides, and only one whose record bears it out. No refusal does: the controller
    refuses a claim that is out of place where the record stands *now* (a backup that is not filled
    yet, a generation that it has not seen), and that may change. A verdict without a record comes
    from an emptied or another store, and the loser destroys its VM.
    """
    if answer.status != 200:  # noqa: PLR2004 - a verdict comes with 200 and nothing else
        return _one_line(answer)
    try:
        verdict = ClaimVerdict.model_validate_json(answer.body)
    except ValidationError as error:
        return f"not a verdict: {_first_fault(error)}"
    if verdict.record is None:
        return f"a verdict without a record: {verdict.explanation}"
    borne_out = (_bears_out_win if verdict.won else _bears_out_loss)(verdict.record, claim)
    return verdict if borne_out else f"a verdict that its record does not bear out: {verdict}"


class EventLines:
    """Take server-sent events out of a byte stream (WHATWG HTML, section 9.2.6).

    Splits at line feeds only: `str.splitlines` would also split at U+2028 inside a message.
    """

    def __init__(self) -> None:
        """Begin at the start of a stream."""
        self._rest = b""
        self._data: list[bytes] = []
        self._data_bytes = 0

    def feed(self, part: bytes) -> Iterator[bytes]:
        """Yield the data of each event that `part` completes.

        Raises:
            Unavailable: An event is larger than `EVENT_BYTES_MAX`.
        """
        *lines, self._rest = (self._rest + part).split(b"\n")
        for line in lines:
            data = self._take(line.removesuffix(b"\r"))
            if data is not None:
                yield data
        if len(self._rest) + self._data_bytes > EVENT_BYTES_MAX:
            raise Unavailable("internal", f"an event is larger than {EVENT_BYTES_MAX} bytes")

    def _take(self, line: bytes) -> bytes | None:
        if not line:
            data, self._data, self._data_bytes = self._data, [], 0
            return b"\n".join(data) if data else None
        name, _, value = line.partition(b":")
        if name == b"data":
            value = value.removeprefix(b" ")
            self._data.append(value)
            self._data_bytes += len(value)
        return None


def _bears_out_win(record: ProtectionRecord, claim: Claim) -> bool:
    """A won claim stays recognisable after the planner has moved the record on."""
    past = record.generation > claim.generation
    return past and record.vm == claim.vm and record.primary == claim.host


def _bears_out_loss(record: ProtectionRecord, claim: Claim) -> bool:
    """The record went on without the claimant, or never named it."""
    past = record.generation > claim.generation
    stranger = record.generation == claim.generation and record.role_of(claim.host) is Role.NONE
    return record.vm == claim.vm and (past or stranger)


def query_of(**parameters: str | int) -> dict[str, str]:
    """Return URL parameters."""
    return {name: str(value) for name, value in parameters.items()}


def _error_of(answer: Answer) -> HoldfastError:
    code, detail, faults = _problem_fields(answer)
    if code in PROBLEMS:
        undecided = answer.status >= 500 or code == "conflict"  # noqa: PLR2004
        return (Unavailable if undecided else Refused)(code, detail, faults)
    shown = f"{_one_line(answer)} (is the URL a controller's, and of the same version?)"
    if 400 <= answer.status < 500:  # noqa: PLR2004
        return Refused("invalid-request", shown, faults)
    return Unavailable("internal", shown, faults)


def _problem_fields(answer: Answer) -> tuple[str, str, list[str]]:
    """Return code (empty if none is known), detail and faults, however odd the body is."""
    if not answer.is_problem:
        return "", "", []
    try:
        body = loads(answer.body)
    except (JSONDecodeError, UnicodeDecodeError):
        return "", "", []
    if not isinstance(body, Mapping):
        return "", "", []
    code = body.get("code")
    faults = body.get("faults")
    return (
        code if isinstance(code, str) and code in PROBLEMS else "",
        str(body.get("detail") or body.get("title") or "no reason given"),
        [str(fault) for fault in faults] if isinstance(faults, list) else [],
    )


def _one_line(answer: Answer) -> str:
    code, detail, _ = _problem_fields(answer)
    text = f"{code}: {detail}" if detail else answer.body.decode("utf-8", "replace")
    return f"HTTP {answer.status} {' '.join(text.split())[:DETAIL_CHARACTERS_MAX]}".rstrip()


def _first_fault(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "body"
    return f"{place}: {first['msg']}"
