"""What goes into and comes out of the etcd client. Pure.

Keys are text. A key that is not UTF-8 (nobody but a stranger writes one) still makes the round
trip, through surrogate escapes, so that one stray key under a prefix does not stop a reader.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from holdfast_controller.adapters.etcd.proto import kv_pb2

ChangeKind = Literal["put", "delete"]


@dataclass(frozen=True)
class TlsFiles:
    """PEM files for TLS: whom we trust and, if etcd asks for it, who we are."""

    authority: Path
    """Certificates of the authorities that may have signed etcd's certificate."""
    certificate: Path | None = None
    key: Path | None = None


@dataclass(frozen=True)
class KeyValue:
    """A key as it stood at one revision. In a delete event only `key` and `mod_revision` count."""

    key: str
    value: bytes
    mod_revision: int
    create_revision: int
    version: int
    lease: int


@dataclass(frozen=True)
class Compare:
    """A condition of a transaction; make one with `unchanged` or `absent`."""

    key: str
    mod_revision: int
    """The revision of the key's last change; 0: the key must not exist."""


def unchanged(key: str, mod_revision: int) -> Compare:
    """Demand that the key was last changed at `mod_revision`."""
    if mod_revision < 1:
        raise ValueError(f"a mod_revision is 1 or more, not {mod_revision}; use absent({key!r})")
    return Compare(key, mod_revision)


def absent(key: str) -> Compare:
    """Demand that the key does not exist."""
    return Compare(key, 0)


@dataclass(frozen=True)
class Put:
    """Write a key; with a lease, it is deleted when the lease ends."""

    key: str
    value: bytes
    lease: int = 0


@dataclass(frozen=True)
class Delete:
    """Delete one key, if it is there."""

    key: str


@dataclass(frozen=True)
class DeletePrefix:
    """Delete every key that begins with `prefix`."""

    prefix: str


Write = Put | Delete | DeletePrefix


@dataclass(frozen=True)
class TxnResult:
    """What etcd decided about a transaction."""

    succeeded: bool
    revision: int
    """Of the store after the transaction; the `mod_revision` of what was put."""
    current: tuple[KeyValue | None, ...] = ()
    """If not succeeded: the compared keys, in the order of the compares, read in the same step."""


@dataclass(frozen=True)
class WatchBatch:
    """Changes under the watched prefix, or all of it."""

    revision: int
    """The watcher now knows everything up to here."""
    events: tuple[tuple[ChangeKind, KeyValue], ...] = ()
    """In the order in which they happened; all changes of one revision are in one batch."""
    resynchronised: bool = False
    """`snapshot` is the whole state at `revision`: forget what was known before. There are no
    events."""
    snapshot: tuple[KeyValue, ...] = ()


@dataclass(frozen=True)
class StoreStatus:
    """What one member of the cluster says about itself."""

    endpoint: str
    version: str
    leader: int
    """Member id of the leader it knows; 0: none, so it can neither write nor read."""
    database_size_bytes: int
    revision: int
    problems: tuple[str, ...] = ()
    """Alarms and complaints in etcd's words, for people."""


def encode_key(key: str) -> bytes:
    """Return the key's bytes on the wire."""
    return key.encode("utf-8", "surrogateescape")


def prefix_range(prefix: str) -> tuple[bytes, bytes]:
    """Return (key, range_end) of all keys that begin with `prefix`; empty: of all keys."""
    start = encode_key(prefix)
    stem = start.rstrip(b"\xff")
    if not stem:
        # Nothing sorts behind these: a range_end of one zero byte means "to the end".
        return start or b"\0", b"\0"
    return start, stem[:-1] + bytes([stem[-1] + 1])


def key_value_of(message: kv_pb2.KeyValue) -> KeyValue:
    """Return the value object of a message."""
    return KeyValue(
        key=message.key.decode("utf-8", "surrogateescape"),
        value=message.value,
        mod_revision=message.mod_revision,
        create_revision=message.create_revision,
        version=message.version,
        lease=message.lease,
    )
