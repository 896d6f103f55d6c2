"""The pure parts of the etcd client: batches from fragments, verdicts, ranges, endpoints."""

import itertools
from pathlib import Path

import pytest
from grpc import StatusCode
from hypothesis import given
from hypothesis import strategies as st

from holdfast_controller.adapters.etcd import EtcdClient, KeyValue, TlsFiles, unchanged
from holdfast_controller.adapters.etcd.assembler import Assembler, Change
from holdfast_controller.adapters.etcd.endpoints import Address, parse_endpoint
from holdfast_controller.adapters.etcd.errors import (
    AnswerTooLarge,
    Compacted,
    EtcdOutOfSpace,
    EtcdRefused,
    EtcdUnavailable,
    Verdict,
    judge,
    refusal,
)
from holdfast_controller.adapters.etcd.values import encode_key, prefix_range


def change(revision: int, key: str = "/k") -> Change:
    return "put", KeyValue(key, b"", revision, revision, 1, 0)


def test_an_answer_in_one_piece_is_one_batch() -> None:
    assembler = Assembler(1)
    changes = [change(3, "/a"), change(3, "/b"), change(5)]
    batch = assembler.add(changes, more_fragments=False)
    assert batch is not None
    assert batch.events == tuple(changes)
    assert batch.revision == 5
    assert assembler.next_revision == 6


def test_the_last_revision_of_a_fragment_waits_for_the_next_one() -> None:
    assembler = Assembler(1)
    batch = assembler.add([change(3), change(4, "/a")], more_fragments=True)
    assert batch is not None
    assert (batch.revision, batch.events) == (3, (change(3),))
    assert assembler.next_revision == 4
    assert assembler.add([change(4, "/b")], more_fragments=True) is None
    assert assembler.next_revision == 4
    batch = assembler.add([change(4, "/c"), change(6)], more_fragments=False)
    assert batch is not None
    assert batch.events == (change(4, "/a"), change(4, "/b"), change(4, "/c"), change(6))
    assert assembler.next_revision == 7


def test_what_is_known_already_is_dropped() -> None:
    assembler = Assembler(5)
    assert assembler.add([change(4)], more_fragments=False) is None
    batch = assembler.add([change(4), change(5)], more_fragments=False)
    assert batch is not None
    assert batch.events == (change(5),)


@given(
    sizes=st.lists(st.integers(1, 4), max_size=12),
    cuts=st.sets(st.integers(1, 40)),
    begin=st.integers(1, 12),
)
def test_however_an_answer_is_cut_each_revision_comes_whole_and_once(
    sizes: list[int], cuts: set[int], begin: int
) -> None:
    changes = [change(i + 1, f"/{j}") for i, size in enumerate(sizes) for j in range(size)]
    edges = [0, *sorted(cut for cut in cuts if cut < len(changes)), len(changes)]
    assembler = Assembler(begin)
    told: list[Change] = []
    for start, end in itertools.pairwise(edges):
        batch = assembler.add(changes[start:end], more_fragments=end < len(changes))
        if batch is not None:
            assert not told or told[-1][1].mod_revision < batch.events[0][1].mod_revision
            assert batch.revision == batch.events[-1][1].mod_revision
            assert assembler.next_revision == batch.revision + 1
            told.extend(batch.events)
    assert told == [each for each in changes if each[1].mod_revision >= begin]


@pytest.mark.parametrize(
    ("code", "details", "verdict"),
    [
        (StatusCode.UNAVAILABLE, "etcdserver: no leader", Verdict.NOT_APPLIED),
        (StatusCode.UNAVAILABLE, "etcdserver: not capable", Verdict.NOT_APPLIED),
        (StatusCode.RESOURCE_EXHAUSTED, "etcdserver: too many requests", Verdict.NOT_APPLIED),
        (StatusCode.UNKNOWN, "raft proposal dropped", Verdict.NOT_APPLIED),
        (StatusCode.UNAVAILABLE, "etcdserver: request timed out", Verdict.UNKNOWN),
        (StatusCode.UNAVAILABLE, "etcdserver: leader changed", Verdict.UNKNOWN),
        (StatusCode.UNAVAILABLE, "etcdserver: server stopped", Verdict.UNKNOWN),
        (StatusCode.UNAVAILABLE, "Socket closed", Verdict.UNKNOWN),
        (StatusCode.UNAVAILABLE, "failed to connect to all addresses", Verdict.UNKNOWN),
        (StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", Verdict.UNKNOWN),
        (StatusCode.CANCELLED, "", Verdict.UNKNOWN),
        (StatusCode.INTERNAL, "", Verdict.UNKNOWN),
        (StatusCode.RESOURCE_EXHAUSTED, "enhance your calm", Verdict.UNKNOWN),
        (StatusCode.FAILED_PRECONDITION, "etcdserver: not leader", Verdict.UNKNOWN),
        (
            StatusCode.UNAUTHENTICATED,
            "etcdserver: invalid auth token",
            Verdict.NOT_AUTHENTICATED,
        ),
        (
            StatusCode.INVALID_ARGUMENT,
            "etcdserver: revision of auth store is old",
            Verdict.NOT_AUTHENTICATED,
        ),
        (StatusCode.PERMISSION_DENIED, "etcdserver: permission denied", Verdict.REFUSED),
        (StatusCode.INVALID_ARGUMENT, "etcdserver: duplicate key given", Verdict.REFUSED),
    ],
)
def test_only_proof_counts_as_not_applied(code: StatusCode, details: str, verdict: Verdict) -> None:
    assert judge(code, details) is verdict


@pytest.mark.parametrize(
    ("code", "details", "kind"),
    [
        (
            StatusCode.RESOURCE_EXHAUSTED,
            "etcdserver: mvcc: database space exceeded",
            EtcdOutOfSpace,
        ),
        (
            StatusCode.OUT_OF_RANGE,
            "etcdserver: mvcc: required revision has been compacted",
            Compacted,
        ),
        (
            StatusCode.RESOURCE_EXHAUSTED,
            "Received message larger than max (9 vs. 4)",
            AnswerTooLarge,
        ),
        (StatusCode.NOT_FOUND, "etcdserver: requested lease not found", EtcdRefused),
    ],
)
def test_a_refusal_has_the_class_of_its_remedy(
    code: StatusCode, details: str, kind: type[EtcdRefused]
) -> None:
    assert judge(code, details) is Verdict.REFUSED
    error = refusal("Txn", code, details)
    assert type(error) is kind
    assert (error.what, error.code, error.reason) == ("Txn", code.name, details)


def test_an_unavailable_store_names_call_outcome_and_reasons() -> None:
    error = EtcdUnavailable("Txn", maybe_applied=True, reasons={"a:1": "refused", "b:2": "late"})
    assert str(error) == (
        "etcd did not answer Txn, it is unknown whether it was applied (a:1: refused; b:2: late)"
    )


@given(prefix=st.text(), rest=st.text(), other=st.text())
def test_a_prefix_range_holds_exactly_what_begins_with_it(
    prefix: str, rest: str, other: str
) -> None:
    start, end = prefix_range(prefix)

    def inside(key: bytes) -> bool:
        return key >= start and (end == b"\0" or key < end)

    assert inside(encode_key(prefix) + rest.encode("utf-8", "replace") + b"\0")
    key = other.encode("utf-8", "replace") + b"\0"
    assert inside(key) == key.startswith(encode_key(prefix))


def test_a_prefix_of_highest_bytes_reaches_to_the_end() -> None:
    assert prefix_range("\udcff\udcff") == (b"\xff\xff", b"\0")
    assert prefix_range("a\udcff") == (b"a\xff", b"b")
    assert prefix_range("") == (b"\0", b"\0")


@pytest.mark.parametrize(
    ("text", "tls", "address"),
    [
        ("10.0.0.1:2379", False, Address("10.0.0.1:2379", tls=False)),
        ("http://etcd:2379/", False, Address("etcd:2379", tls=False)),
        ("https://[::1]:2379", True, Address("[::1]:2379", tls=True)),
        ("etcd:2379", True, Address("etcd:2379", tls=True)),
    ],
)
def test_an_endpoint_is_read(text: str, tls: bool, address: Address) -> None:
    assert parse_endpoint(text, tls=tls) == address


@pytest.mark.parametrize(
    ("text", "tls", "fault"),
    [
        ("etcd", False, "not host:port"),
        ("etcd:port", False, "etcd:port"),
        ("ftp://etcd:2379", False, "not host:port"),
        ("http://etcd:2379/v3", False, "nothing may follow"),
        ("http://me@etcd:2379", False, "nothing may follow"),
        ("http://etcd:2379", True, "use https"),
        ("https://etcd:2379", False, "no TLS authority"),
    ],
)
def test_an_endpoint_that_can_not_work_is_refused_with_the_reason(
    text: str, tls: bool, fault: str
) -> None:
    with pytest.raises(ValueError, match=fault):
        parse_endpoint(text, tls=tls)


def test_a_configuration_that_can_not_work_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no etcd endpoint"):
        EtcdClient([])
    with pytest.raises(ValueError, match="user and password"):
        EtcdClient(["etcd:1"], user="me")
    with pytest.raises(ValueError, match="needs time"):
        EtcdClient(["etcd:1"], request_timeout_seconds=0)
    with pytest.raises(ValueError, match="watch_idle_seconds"):
        EtcdClient(["etcd:1"], watch_idle_seconds=0)
    with pytest.raises(FileNotFoundError):
        EtcdClient(["etcd:1"], tls=TlsFiles(tmp_path / "none"))
    with pytest.raises(ValueError, match="certificate and key"):
        EtcdClient(["etcd:1"], tls=TlsFiles(tmp_path / "ca", certificate=tmp_path / "crt"))
    with pytest.raises(ValueError, match="begins at revision"):
        EtcdClient(["etcd:1"]).watch("/", from_revision=-1)
    with pytest.raises(ValueError, match="use absent"):
        unchanged("/a", 0)
