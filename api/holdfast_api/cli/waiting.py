"""Wait for what was asked for, with a progress bar on a terminal and plain lines elsewhere.

Polls the API; sleeps between. Everything is printed on standard error, so that the result on
standard output stays clean. A wait that ends early leaves what was asked for as it is.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Column

from holdfast_api.cli.options import ExitCode
from holdfast_api.cli.show import clean, console_of, duration, notice, size
from holdfast_api.client import HoldfastClient
from holdfast_api.errors import Refused, Unavailable
from holdfast_api.records import Protection, SeedingProgress
from holdfast_api.words import Generation, HostId, Phase, VmId

POLL_SECONDS = 0.25
BAR_WIDTH = 15
"""Leaves room for the figures on a terminal of 80 columns."""
LINE_SECONDS_MIN = 2.0
"""Without a terminal, progress within the same phase is said no more often than this."""


@dataclass(frozen=True)
class Watch:
    """What is being waited for."""

    client: HoldfastClient
    vm: VmId
    deadline_seconds: float
    stays: str
    """What goes on when nobody waits any more."""


def wait_until_protected(watch: Watch, since: Generation) -> Protection:
    """Wait until `watch.vm` is protected in generation `since` or a later one.

    Raises:
        typer.Exit: FAULT if the protection ended, DEADLINE if it took too long.
    """

    def protected(protection: Protection | None) -> bool:
        if protection is None or protection.phase in (Phase.RELEASING, Phase.RETIRED):
            _fail(f"{watch.vm}: somebody ended the protection")
        if protection.generation < since:
            return False
        if protection.phase is Phase.ENDED:
            _fail(f"{watch.vm}: {protection.reason or 'the guest ended'}")
        return protection.phase is Phase.PROTECTED

    found = _wait(watch, protected)
    assert found is not None, "protected() refuses None"
    return found


def wait_until_moved(watch: Watch, before: Protection, target: HostId) -> Protection:
    """Wait until `target` is the primary; a generation that went by without that is a failure."""

    def moved(protection: Protection | None) -> bool:
        if protection is None or protection.generation <= before.generation:
            return False
        if protection.primary != target:
            _fail(
                f"{watch.vm}: the switchover did not happen; it is {protection.phase} "
                f"on {protection.primary}"
            )
        return True

    found = _wait(watch, moved)
    assert found is not None, "moved() is false for None"
    return found


def wait_until_unprotected(watch: Watch) -> None:
    """Wait until nothing of the protection is left."""
    _wait(watch, lambda protection: protection is None or protection.phase is Phase.RETIRED)


def percent_done(progress: SeedingProgress) -> float:
    """Return how much is there, 0 to 100; rounds may send more than the total."""
    if progress.total_bytes <= 0:
        return 0.0
    return min(100.0, 100.0 * progress.sent_bytes / progress.total_bytes)


def seconds_left(progress: SeedingProgress) -> float | None:
    """Return the estimate of what is left of seeding; None while there is no rate."""
    missing_bytes = progress.total_bytes - progress.sent_bytes
    if progress.rate_bytes_per_second <= 0 or progress.total_bytes <= 0:
        return None
    return max(0, missing_bytes) / progress.rate_bytes_per_second


def say(protection: Protection | None) -> str:
    """Return one line about how a protection stands."""
    if protection is None:
        return "not protected"
    progress = protection.seeding
    if protection.phase is not Phase.SEEDING or progress is None:
        return f"{protection.phase}" + (f": {protection.reason}" if protection.reason else "")
    left = seconds_left(progress)
    parts = [
        f"seeding to {protection.backup}, round {progress.round}",
        f"{percent_done(progress):.0f} % of {size(progress.total_bytes)}",
        f"{size(progress.rate_bytes_per_second)}/s",
    ]
    return ", ".join(parts if left is None else [*parts, f"{duration(left)} left"])


def _wait(watch: Watch, done: Callable[[Protection | None], bool]) -> Protection | None:
    """Poll until `done`; an unreachable controller is waited for up to the deadline."""
    try:
        return _poll(watch, done)
    except KeyboardInterrupt:
        notice(f"holdfast: stopped waiting; {watch.stays}; see: holdfast status {watch.vm}")
        raise typer.Exit(ExitCode.INTERRUPTED) from None


def _poll(watch: Watch, done: Callable[[Protection | None], bool]) -> Protection | None:
    with _display(watch.vm) as show:
        while True:
            try:
                protection = _present(watch)
            except Unavailable as error:
                show(None, f"no answer, trying again: {error.detail}")
            else:
                if done(protection):
                    return protection
                show(protection, say(protection))
            if time.monotonic() >= watch.deadline_seconds:
                break
            time.sleep(POLL_SECONDS)
    notice(f"holdfast: {watch.vm}: the deadline passed; {watch.stays}")
    raise typer.Exit(ExitCode.DEADLINE)


def _present(watch: Watch) -> Protection | None:
    try:
        return watch.client.protection(watch.vm)
    except Refused as error:
        if error.code != "not-protected":
            raise
        return None


def _fail(text: str) -> NoReturn:
    notice(f"holdfast: {text}")
    raise typer.Exit(ExitCode.FAULT)


Show = Callable[[Protection | None, str], None]


@contextmanager
def _display(vm: VmId) -> Iterator[Show]:
    if not sys.stderr.isatty():
        yield _PlainLines(vm)
        return
    text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True))
    progress = Progress(
        SpinnerColumn(), BarColumn(BAR_WIDTH), text, console=console_of(sys.stderr), transient=True
    )
    with progress:
        yield _Bar(vm, progress, progress.add_task(vm, total=None))


class _PlainLines:
    """Says what changed, and now and then how far it is."""

    def __init__(self, vm: VmId) -> None:
        self._vm = vm
        self._phase: tuple[Phase | None, str | None] | None = None
        self._text = ""
        self._said_seconds = 0.0

    def __call__(self, protection: Protection | None, text: str) -> None:
        phase = (protection.phase, protection.backup) if protection else (None, None)
        now_seconds = time.monotonic()
        fresh = phase != self._phase
        lately = now_seconds - self._said_seconds < LINE_SECONDS_MIN
        if not fresh and (lately or text == self._text):
            return
        self._phase, self._text, self._said_seconds = phase, text, now_seconds
        notice(f"{self._vm}: {text}")


class _Bar:
    """Moves the bar."""

    def __init__(self, vm: VmId, progress: Progress, task: TaskID) -> None:
        self._vm = vm
        self._progress = progress
        self._task = task

    def __call__(self, protection: Protection | None, text: str) -> None:
        seeding = protection.seeding if protection is not None else None
        total_bytes = seeding.total_bytes if seeding else None
        sent_bytes = min(seeding.sent_bytes, seeding.total_bytes) if seeding else 0
        self._progress.update(
            self._task,
            description=clean(f"{self._vm}: {text.removeprefix('seeding ')}"),
            total=total_bytes or None,
            completed=sent_bytes,
        )
