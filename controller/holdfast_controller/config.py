"""What one controller process is told: a TOML file, overridden by the environment.

Reads files and the environment; decides nothing. What the cluster must agree on is not here: that
is policy, and lives in the store. Every option `name` may also be given as the environment
variable `HOLDFAST_CONTROLLER_NAME`, lists separated by commas. All faults are reported at once.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from holdfast_controller.adapters.etcd.endpoints import parse_endpoint
from holdfast_controller.core.tenure import survives_a_failed_renewal

ENVIRONMENT_PREFIX = "HOLDFAST_CONTROLLER_"


class ConfigFaults(Exception):  # noqa: N818 - reads as a sentence where it is raised
    """The configuration can not be used; every fault is named."""

    def __init__(self, faults: list[str]) -> None:
        """Carry the faults, one sentence each."""
        super().__init__("the configuration can not be used:\n  " + "\n  ".join(faults))
        self.faults = faults


class Config(BaseModel):
    """Options of a controller. Units stand at the end of each name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    listen_address: str = Field(default="127.0.0.1", min_length=1)
    """Where the API is served. An address that others reach exposes the API to them: there is no
    login yet, so put it on a management network only. Loopback reaches local clients only."""
    listen_port: int = Field(default=7070, ge=0, le=65_535)
    """TCP port of the API. 0 takes any free one and logs it, for tests; clients can not know it."""
    etcd_endpoints: tuple[str, ...] = Field(default=("127.0.0.1:2379",), min_length=1, max_length=9)
    """`address:port` of etcd's members. With one of three named, its loss is an outage; one that
    does not exist costs time whenever it is tried."""
    etcd_request_timeout_seconds: float = Field(default=2.0, ge=0.1, le=30.0)
    """How long one request to etcd may take. Short: undecided claims on a slow disk. Long: a dead
    member is noticed late and claims wait for it."""
    etcd_user: str | None = Field(default=None, min_length=1)
    """User in etcd; None: etcd has authentication off."""
    etcd_password_file: Path | None = None
    """File whose first line is the password; needed with a user."""
    etcd_authority_file: Path | None = None
    """PEM file of the authorities that sign etcd's certificates; switches TLS on. Without it,
    everything including passwords crosses the network readable."""
    etcd_certificate_file: Path | None = None
    """Our own certificate, if etcd asks for one; needs `etcd_key_file` and TLS."""
    etcd_key_file: Path | None = None
    """The key of our certificate."""
    heartbeat_ttl_seconds: int = Field(default=5, ge=2, le=300)
    """A host is silent after so long without a heartbeat, or after three of the distances that a
    large cluster's hosts are asked to keep, if that is longer. Short: a slow network looks like
    dead hosts, and backups being filled are dropped. Long: re-protection begins late. It does not
    decide a failover: the two sides do that by themselves. etcd grants nothing below 2 s."""
    heartbeats_per_second_max: int = Field(default=100, ge=1, le=10_000)
    """Of all hosts together, at all controllers: with more hosts than this each is asked to beat
    less often than once a second. Few: a dead host counts as silent late. Many: a controller
    spends about 2 ms of processor time on each, and claims wait meanwhile."""
    planner_interval_seconds: float = Field(default=1.0, ge=0.05, le=60.0)
    """Longest distance of two planner passes; changes wake it at once. Short: needless work. Long:
    what comes with time alone (trying a failed host again) comes late."""
    leader_ttl_seconds: int = Field(default=5, ge=2, le=300)
    """Of several controllers one plans; if it dies, another does after so long. Short: a slow etcd
    makes them take turns, which does no harm. Long: re-protection begins late; failovers need no
    leader. One failed renewal must fit in: at least 1.5 times `etcd_request_timeout_seconds`."""
    events_kept: int = Field(default=10_000, ge=100, le=100_000)
    """Older events are pruned. Few: followers that were away miss some. Many: they are held in
    memory and read at every start."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """`info` writes a line for each decision; `debug` much more."""

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        faults = []
        if (self.etcd_user is None) != (self.etcd_password_file is None):
            faults.append("etcd_user and etcd_password_file are needed together")
        if (self.etcd_certificate_file is None) != (self.etcd_key_file is None):
            faults.append("etcd_certificate_file and etcd_key_file are needed together")
        if self.etcd_certificate_file is not None and self.etcd_authority_file is None:
            faults.append("etcd_certificate_file needs etcd_authority_file")
        if self.planner_interval_seconds >= self.heartbeat_ttl_seconds:
            faults.append("planner_interval_seconds must be below heartbeat_ttl_seconds")
        if not survives_a_failed_renewal(
            self.leader_ttl_seconds, self.etcd_request_timeout_seconds
        ):
            faults.append("leader_ttl_seconds must be 1.5 times etcd_request_timeout_seconds")
        faults.extend(_unreadable(self))
        faults.extend(_bad_endpoints(self))
        if faults:
            raise ValueError("; ".join(faults))
        return self


def _bad_endpoints(config: Config) -> list[str]:
    faults = []
    for endpoint in config.etcd_endpoints:
        try:
            parse_endpoint(endpoint, tls=config.etcd_authority_file is not None)
        except ValueError as error:
            faults.append(str(error))
    return faults


_FILES = ("etcd_password_file", "etcd_authority_file", "etcd_certificate_file", "etcd_key_file")


def _unreadable(config: Config) -> list[str]:
    faults = []
    for name in _FILES:
        path: Path | None = getattr(config, name)
        if path is not None and not path.is_file():
            faults.append(f"{name}: there is no file {path}")
    return faults


def load_config(path: Path | None, environment: Mapping[str, str]) -> Config:
    """Return the options of the file, if one is given, and of the environment.

    Raises ConfigFaults.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values.update(_read_file(path))
    faults = []
    for variable, text in sorted(environment.items()):
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        if name in Config.model_fields:
            values[name] = text.split(",") if name == "etcd_endpoints" else text
        else:
            faults.append(f"{variable}: there is no such option")
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigFaults(faults + [_fault(found) for found in error.errors()]) from error
    if faults:
        raise ConfigFaults(faults)
    return config


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigFaults([f"{path} can not be read: {error.strerror}"]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigFaults([f"{path} is not TOML: {error}"]) from error


def _fault(found: Any) -> str:
    place = ".".join(str(part) for part in found["loc"])
    message = str(found["msg"]).removeprefix("Value error, ")
    if found["type"] == "extra_forbidden":
        message = "there is no such option"
    return f"{place}: {message}" if place else message
