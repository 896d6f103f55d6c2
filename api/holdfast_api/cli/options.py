"""Options that every command takes, exit codes, and the client made from them.

Touches the environment (`HOLDFAST_URL`) through typer only.
"""

from enum import IntEnum, StrEnum
from typing import Annotated

import typer

from holdfast_api.client import HoldfastClient
from holdfast_api.errors import PROBLEMS, HoldfastError, Unavailable

DEFAULT_URL = "http://127.0.0.1:7070"


class ExitCode(IntEnum):
    """How a command ended. Stable: scripts rely on it."""

    OK = 0
    FAULT = 1
    USAGE = 2
    REFUSED = 3
    NOT_REACHABLE = 4
    DEADLINE = 5
    INTERRUPTED = 130


EXIT_CODES_HELP = """\b
Exit codes:
  0    done
  1    a fault: of Holdfast, or the protection ended while being waited for
  2    wrong usage: options or policy files
  3    refused; stderr says why and what to do
  4    no controller or no store could be reached; nothing is known to have changed
  5    --deadline passed before what was waited for; it goes on by itself
  130  interrupted; what was asked for stays asked for
"""


class OutputFormat(StrEnum):
    """How results are printed."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


Format = Annotated[
    OutputFormat,
    typer.Option("--output", "-o", help="json and yaml are the API's own models."),
]
Url = Annotated[
    str,
    typer.Option(
        "--url", envvar="HOLDFAST_URL", help="Controllers' URLs, separated by commas; any will do."
    ),
]
Timeout = Annotated[
    float,
    typer.Option("--timeout", min=0.1, max=600.0, help="Seconds until a call is given up."),
]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is done.")]
Deadline = Annotated[
    float,
    typer.Option("--deadline", min=0.1, help="Seconds until --wait is given up (exit code 5)."),
]
VmName = Annotated[str, typer.Argument(metavar="VM", help="The VM's name.")]

TABLE = OutputFormat.TABLE
TIMEOUT_SECONDS = 10.0
DEADLINE_SECONDS = 600.0


def client_of(url: str, timeout_seconds: float) -> HoldfastClient:
    """Return a client for `--url` and `--timeout`; its faults become usage errors."""
    try:
        return HoldfastClient(url.split(","), timeout_seconds=timeout_seconds)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--url / HOLDFAST_URL") from error


def exit_code_of(error: HoldfastError) -> ExitCode:
    """Return the exit code for what the API answered."""
    if error.code == "internal":
        return ExitCode.FAULT
    unreachable = PROBLEMS["no-controller"][0]
    if isinstance(error, Unavailable) and PROBLEMS[error.code][0] == unreachable:
        return ExitCode.NOT_REACHABLE
    return ExitCode.REFUSED


HINTS = {
    "not-protected": "protect it with: holdfast protect VM",
    "unknown-vm": "list the known ones with: holdfast vms",
    "unknown-host": "list the known ones with: holdfast hosts",
    "unknown-policy": "list the stored ones with: holdfast policies list",
    "preflight-failed": "see every issue with: holdfast preflight VM",
    "wrong-phase": "see how it stands with: holdfast status VM",
    "policy-in-use": "see who uses it with: holdfast vms -o json",
    "no-controller": "check --url or HOLDFAST_URL, and that a controller runs there",
    "store-unavailable": "check etcd; protected VMs go on meanwhile",
    "busy": "repeat the command",
    "host-in-maintenance": "end it with: holdfast host set HOST --no-maintenance",
    "conflict": "repeat the command",
}
"""What to do next, where the code alone tells it."""


def line_of(error: HoldfastError) -> str:
    """Return one line: the code, what is the case, every fault, what to do."""
    faults = f" [{'; '.join(error.faults)}]" if error.faults else ""
    hint = f" ({HINTS[error.code]})" if error.code in HINTS else ""
    return " ".join(f"holdfast: {error.code}: {error.detail}{faults}{hint}".split())
