"""The command `events`: what happened, with its evidence. Talks to a controller over the REST API.

Followed events are printed one by one as they come: a line each, JSON lines, or YAML documents.
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import chain
from typing import Annotated

import typer
import yaml

from holdfast_api.cli.options import (
    DEFAULT_URL,
    TABLE,
    TIMEOUT_SECONDS,
    Format,
    OutputFormat,
    Timeout,
    Url,
    client_of,
)
from holdfast_api.cli.show import line, put, show_model, show_table
from holdfast_api.messages import EventList
from holdfast_api.records import Event

app = typer.Typer()


@app.command()
def events(
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    after: Annotated[int, typer.Option(min=0, help="Only events after this position.")] = 0,
    vm: Annotated[str | None, typer.Option(help="Only events of this VM.")] = None,
    output: Format = TABLE,
    url: Url = DEFAULT_URL,
    timeout: Timeout = TIMEOUT_SECONDS,
) -> None:
    """Show what happened, oldest first."""
    with client_of(url, timeout) as client:
        found = (e for e in client.events(after, follow=follow) if vm in (None, e.vm))
        if follow:
            _print_followed(found, output)
            return
        listed = tuple(found)
    if output is not TABLE:
        show_model(EventList(events=listed), output)
        return
    columns = ("POSITION", "AT", "KIND", "VM", "HOST", "GENERATION", "MESSAGE")
    show_table(columns, [_row(e) for e in listed], empty="no event")


def _print_followed(found: Iterator[Event], output: OutputFormat) -> None:
    try:
        for event in found:
            _print_one(event, output)
    except KeyboardInterrupt:
        return  # Ctrl-C is how following ends; that is no fault.


def _print_one(event: Event, output: OutputFormat) -> None:
    match output:
        case OutputFormat.TABLE:
            line("  ".join(chain(_row(event)[:-1], [event.message])))
        case OutputFormat.JSON:
            put(event.model_dump_json() + "\n")
        case OutputFormat.YAML:
            document = event.model_dump(mode="json")
            put(yaml.safe_dump(document, sort_keys=False, allow_unicode=True, explicit_start=True))


def _row(event: Event) -> list[str]:
    at = datetime.fromtimestamp(event.at, UTC)
    return [
        str(event.position),
        at.strftime("%Y-%m-%d %H:%M:%S.") + f"{at.microsecond // 1000:03}",
        event.kind.value,
        event.vm or "-",
        event.host or "-",
        str(event.generation) if event.generation is not None else "-",
        event.message,
    ]
