"""Turn the API's models into tables, JSON and YAML on standard output; notices on standard error.

Without a terminal a table is plain text: no colour, no frame, no line cut or wrapped. Whatever
comes from the API is stripped of control characters before a terminal gets to see it.
"""

import os
import sys
from collections.abc import Sequence
from typing import TextIO

import typer
import yaml
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

from holdfast_api.cli.options import ExitCode, OutputFormat
from holdfast_api.records import Percentiles, Policy

UNSAFE_MARK = "UNSAFE: output unbuffered"
"""Shown wherever a policy lets output leave before it is acknowledged."""
PLAIN_WIDTH = 100_000
"""Wider than any line: without a terminal nothing is wrapped."""
STYLES = {
    "protected": "green",
    "seeding": "yellow",
    "unprotected": "yellow",
    "ended": "red",
    "blocking": "red",
    "warning": "yellow",
    "silent": "red",
}

Row = Sequence[str]


def show_model(model: BaseModel, form: OutputFormat) -> None:
    """Print one model as JSON or YAML."""
    assert form is not OutputFormat.TABLE, "a table needs columns"
    if form is OutputFormat.JSON:
        put(model.model_dump_json(indent=2) + "\n")
        return
    put(yaml.safe_dump(model.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def show_table(columns: Row, rows: Sequence[Row], *, empty: str) -> None:
    """Print rows under columns, or `empty` when there are none."""
    if not rows:
        notice(empty)
        return
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    _print(table)


def show_fields(fields: Sequence[tuple[str, str]]) -> None:
    """Print names and values, one a line; without the values that are empty."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name, value in fields:
        if value:
            table.add_row(Text(name, "bold"), _cell(value))
    _print(table)


def line(text: str) -> None:
    """Print one line of result."""
    put(clean(text) + "\n")


def put(text: str) -> None:
    """Write to standard output at once.

    Raises:
        typer.Exit: OK if nobody reads any more (`| head`); then nothing may be written again.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still buffered has to go somewhere when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(ExitCode.OK) from None


def notice(text: str) -> None:
    """Print one line that is no result, on standard error."""
    sys.stderr.write(clean(text) + "\n")
    sys.stderr.flush()


def clean(text: str) -> str:
    """Return `text` without control characters: a name must not move the cursor."""
    return "".join(c if c.isprintable() else " " for c in text)


def console_of(stream: TextIO) -> Console:
    """Return a console that is plain unless `stream` is a terminal."""
    terminal = stream.isatty()
    return Console(
        file=stream,
        force_terminal=terminal,
        width=None if terminal else PLAIN_WIDTH,
        highlight=False,
        markup=False,
        emoji=False,
    )


def unsafe(policy: Policy) -> str:
    """Return the mark of an unsafe policy, or nothing."""
    return UNSAFE_MARK if policy.output == "unbuffered" else ""


def size(size_bytes: float) -> str:
    """Return a size with its unit, in powers of 1024."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:  # noqa: PLR2004 - bytes in the next unit
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def duration(seconds: float) -> str:
    """Return a duration as people say it."""
    whole = round(seconds)
    if whole < 60:  # noqa: PLR2004 - seconds in a minute
        return f"{seconds:.1f} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def median_and_tail(values: Percentiles, unit: str = "") -> str:
    """Return `p50 / p99`, or a dash before the first value."""
    return f"{values.p50:.1f} / {values.p99:.1f}{unit}" if values.max else "-"


def _cell(value: str) -> Text:
    return Text(clean(value), STYLES.get(value) or ("bold red" if UNSAFE_MARK in value else ""))


def _print(table: Table) -> None:
    console = console_of(sys.stdout)
    with console.capture() as capture:
        console.print(table)
    # Without a terminal the last column is as wide as its longest line.
    put("".join(text.rstrip() + "\n" for text in capture.get().split("\n")[:-1]))
