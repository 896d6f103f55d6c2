"""Where each thing lives in etcd, and how it is written there. Pure.

| key under `/holdfast/v1/` | value                 | lives                                 |
|---------------------------|-----------------------|---------------------------------------|
| `policies/{name}`         | `Policy`              | until removed                         |
| `hosts/{host}`            | `HostEntry`           | for good                              |
| `heartbeats/{host}`       | `Heartbeat`           | under its host's lease                |
| `protections/{vm}`        | `ProtectionRecord`    | for good: generations never go back   |
| `events/{time}-{random}`  | `Event`, position 0   | until pruned                          |

All values are JSON. The order of events is the revision at which etcd wrote them, whatever their
key; their `position` is that revision, which is why a transaction writes at most one event.
"""

from enum import StrEnum

from pydantic import ValidationError

from holdfast_api.messages import Heartbeat
from holdfast_api.records import Event, HostSettings, Model, Policy, ProtectionRecord

ROOT = "/holdfast/v1/"


class HostEntry(Model):
    """What the store keeps of a host: the operator's settings, and the last event's news."""

    settings: HostSettings = HostSettings()
    present: bool = False


class Kind(StrEnum):
    """The folders under `ROOT`."""

    POLICIES = "policies"
    HOSTS = "hosts"
    HEARTBEATS = "heartbeats"
    PROTECTIONS = "protections"
    EVENTS = "events"


Stored = Policy | HostEntry | Heartbeat | ProtectionRecord | Event

_MODELS: dict[Kind, type[Policy | HostEntry | Heartbeat | ProtectionRecord | Event]] = {
    Kind.POLICIES: Policy,
    Kind.HOSTS: HostEntry,
    Kind.HEARTBEATS: Heartbeat,
    Kind.PROTECTIONS: ProtectionRecord,
    Kind.EVENTS: Event,
}


class BadValue(Exception):  # noqa: N818 - reads as a sentence where it is raised
    """A value in the store that is not what its key promises: not ours, or of a newer version."""

    def __init__(self, key: str, why: str) -> None:
        """Name the key, so that an operator can look at it."""
        super().__init__(f"the store's {key} can not be read: {why}")
        self.key = key


def key_of(kind: Kind, name: str) -> str:
    """Return the key of `name`."""
    assert name, kind
    assert "/" not in name, name
    return f"{ROOT}{kind}/{name}"


def split_key(key: str) -> tuple[Kind, str] | None:
    """Return kind and name, or None for a key that is not one of ours."""
    folder, separator, name = key.removeprefix(ROOT).partition("/")
    if not key.startswith(ROOT) or not separator or not name or folder not in set(Kind):
        return None
    return Kind(folder), name


def encode(value: Stored) -> bytes:
    """Return the JSON of `value`.

    Heartbeats, many and short-lived, leave out what is at its default. What lasts is written in
    full: a later version with other defaults must not change what an operator once asked for.
    """
    return value.model_dump_json(exclude_defaults=isinstance(value, Heartbeat)).encode()


def decode(key: str, value: bytes) -> Stored:
    """Return the value under `key`; raises BadValue."""
    found = split_key(key)
    if found is None:
        raise BadValue(key, "its name is not one of ours")
    try:
        return _MODELS[found[0]].model_validate_json(value)
    except ValidationError as error:
        raise BadValue(key, f"{error.error_count()} faults in its JSON") from error
