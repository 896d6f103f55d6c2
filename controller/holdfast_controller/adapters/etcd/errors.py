"""What can go wrong with etcd: one class per decision of the caller, and what answers mean. Pure.

| class            | the caller should                                                         |
|------------------|---------------------------------------------------------------------------|
| `EtcdUnavailable`| try later; after a write with `maybe_applied`, read before anything else  |
| `EtcdRefused`    | change the request, the credentials or the store; repeating does not help |
| `EtcdOutOfSpace` | the same, and tell an operator: the store's quota is used up              |

`judge` sorts a gRPC status. The only statuses taken as proof that a write was not applied are those
that etcd gives before it proposes a request to its log, and refusals. A deadline, a broken
connection or "request timed out" prove nothing: the proposal may still be on its way.

Source: etcd api/v3rpc/rpctypes/error.go, etcdserver/v3_server.go, api/v3rpc/interceptor.go.
"""

from enum import Enum, auto

from grpc import StatusCode


class EtcdError(Exception):
    """Base of what the etcd client raises."""


class EtcdUnavailable(EtcdError):  # noqa: N818 - reads as a sentence where it is raised
    """Nobody answered in time: no connection, no leader, or the connection broke.

    `maybe_applied`: a write was sent and its outcome is unknown. It may even take effect later,
    after a read that does not show it yet.
    """

    def __init__(self, what: str, *, maybe_applied: bool, reasons: dict[str, str]) -> None:
        """Make the error of the call `what`, with the last reason per endpoint."""
        heard = "; ".join(f"{endpoint}: {reason}" for endpoint, reason in reasons.items())
        outcome = ", it is unknown whether it was applied" if maybe_applied else ""
        super().__init__(f"etcd did not answer {what}{outcome} ({heard or 'out of time'})")
        self.what = what
        self.maybe_applied = maybe_applied
        self.reasons = reasons


class EtcdRefused(EtcdError):  # noqa: N818
    """Etcd answered with an error that repeating does not mend; nothing was changed."""

    def __init__(self, what: str, *, code: str, reason: str) -> None:
        """Make the error of the call `what` with gRPC's code and etcd's words."""
        super().__init__(f"etcd refused {what}: {reason} ({code})")
        self.what = what
        self.code = code
        self.reason = reason


class EtcdOutOfSpace(EtcdRefused):
    """The store's quota is used up: it reads, deletes and compacts, but takes no put."""


class Compacted(EtcdRefused):
    """The revision asked for is gone from etcd's history."""


class AnswerTooLarge(EtcdRefused):
    """The answer exceeds the message limit of this client; ask for less at a time."""


class Verdict(Enum):
    """What a failed attempt means."""

    REFUSED = auto()
    """Decided: no. Nothing was changed."""
    NOT_APPLIED = auto()
    """Not decided and certainly not applied: any request may be repeated."""
    NOT_AUTHENTICATED = auto()
    """Certainly not applied: the token is not known or out of date."""
    UNKNOWN = auto()
    """A write may have been applied or may yet be."""


_NEVER_PROPOSED = (
    "etcdserver: no leader",
    "etcdserver: not capable",
    "etcdserver: too many requests",
    "etcdserver: rpc not supported for learner",
    "raft proposal dropped",
)
_STALE_TOKEN = (
    "etcdserver: invalid auth token",
    "etcdserver: revision of auth store is old",
    "auth: revision in header is old",
    # No token was sent: authentication was switched on after we had asked for one.
    "etcdserver: user name is empty",
)
_REFUSING_CODES = frozenset(
    {
        StatusCode.INVALID_ARGUMENT,
        StatusCode.NOT_FOUND,
        StatusCode.ALREADY_EXISTS,
        StatusCode.PERMISSION_DENIED,
        StatusCode.FAILED_PRECONDITION,
        StatusCode.OUT_OF_RANGE,
        StatusCode.UNIMPLEMENTED,
        StatusCode.DATA_LOSS,
    }
)
NO_SPACE = "etcdserver: mvcc: database space exceeded"
COMPACTED = "etcdserver: mvcc: required revision has been compacted"
AUTH_NOT_ENABLED = "etcdserver: authentication is not enabled"
LEASE_NOT_FOUND = "etcdserver: requested lease not found"
LEASE_EXISTS = "etcdserver: lease already exists"
_NOT_LEADER = "etcdserver: not leader"


def judge(code: StatusCode, details: str) -> Verdict:
    """Return what a gRPC status means for a request that was sent."""
    if code is StatusCode.UNAUTHENTICATED or details in _STALE_TOKEN:
        return Verdict.NOT_AUTHENTICATED
    if details in _NEVER_PROPOSED:
        return Verdict.NOT_APPLIED
    if details == _NOT_LEADER:
        return Verdict.UNKNOWN
    if code in _REFUSING_CODES or details == NO_SPACE or is_too_large(code, details):
        return Verdict.REFUSED
    return Verdict.UNKNOWN


def is_too_large(code: StatusCode, details: str) -> bool:
    """Return whether a gRPC library, ours or etcd's, refused the size of a message.

    Ours means that the answer is too large. Only a read, or the branch of a transaction that
    changes nothing, has a large answer; so this is never the end of a write that was applied.
    """
    return code is StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details


def refusal(what: str, code: StatusCode, details: str) -> EtcdRefused:
    """Return the error to raise for a status that was judged a refusal."""
    kind: type[EtcdRefused] = EtcdRefused
    if details == NO_SPACE:
        kind = EtcdOutOfSpace
    elif details == COMPACTED:
        kind = Compacted
    elif is_too_large(code, details):
        kind = AnswerTooLarge
    return kind(what, code=code.name, reason=details)
