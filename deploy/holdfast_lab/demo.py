"""`./dev demo`: a VM loses its host twice under a client that counts, and the client never notices.

Makes a lab named `demo`, needs what the lab needs, and removes it at the end, also on Ctrl-C.

What is shown is measured, not announced: the client's own replies, and the moments that the
surviving host put into its report. Every process of the lab shares this machine's monotonic clock,
so those moments can be compared with the one at which the power was cut.
"""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from holdfast_api.client import HoldfastClient
from holdfast_api.errors import HoldfastError
from holdfast_api.records import Event, Protection
from holdfast_api.words import EventKind, Phase
from holdfast_lab.clients import Count, CountingClient
from holdfast_lab.errors import LabError, LabRefused, LabTimedOut
from holdfast_lab.lab import Lab
from holdfast_lab.vm import VmOptions

NAME = "demo"
VM = "redis"
HOSTS = 3
KILLS = 2
MEMORY_MB = 256
DIRTY_PAGES_PER_SECOND = 2000
WARM_UP_REPLIES = 200
SEEN_DEADLINE_SECONDS = 60.0
PROTECTED_DEADLINE_SECONDS = 180.0
REPLIES_DEADLINE_SECONDS = 60.0
CLIENT_TIMEOUT_SECONDS = 60.0
"""Of the client's connection: longer than any failover, so that it waits and does not give up."""
STOP_DEADLINE_SECONDS = 5.0
POLL_SECONDS = 0.05
PLAIN_LINE_SECONDS = 1.0
"""Without a terminal, progress is said no more often than this."""
PLAIN_WIDTH = 100
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

SUSPECTED, RUNNING = "suspected_at_monotonic_ns", "running_at_monotonic_ns"
# What the new primary reports of a failover: key of the evidence, and what it means.
MOMENTS = (
    (SUSPECTED, "the backup suspects it, and stops acknowledging for good"),
    ("asked_at_monotonic_ns", "the backup asks the controller for the claim"),
    ("won_at_monotonic_ns", "the claim is won: nobody else may go on"),
    (RUNNING, "the guest runs again"),
)
NEXT_REPLY = "the client has its next reply (its TCP asks again after 200 ms)"


@dataclass
class Demo:
    """One run of the demo in a lab that is up."""

    lab: Lab
    holdfast: HoldfastClient
    console: Console
    stalls_ms: list[float] = field(default_factory=list)

    def run(self) -> bool:
        """Show everything; return whether all went as promised."""
        self._say("Starting a VM on h1. Its guest runs Redis and knows nothing of Holdfast.")
        options = VmOptions(memory_mb=MEMORY_MB, dirty_mb=32, dirty_pps=DIRTY_PAGES_PER_SECOND)
        vm = self.lab.run_vm(VM, "h1", options)
        self._wait_until_seen()
        self._say(
            f"It has {MEMORY_MB} MiB, answers at {vm.addresses[0]}, and rewrites "
            f"{DIRTY_PAGES_PER_SECOND:,} of its pages each second."
        )
        counting = CountingClient(self.lab.redis(VM, timeout_seconds=CLIENT_TIMEOUT_SECONDS))
        self._say("A client counts: one TCP connection, INCR after INCR, as fast as replies come.")
        counting.start()
        try:
            self._say("Asking for protection, while the VM runs and the client counts.")
            self.holdfast.protect(VM)
            self._wait_until_protected(time.monotonic())
            for number in range(1, KILLS + 1):
                self._lose_a_host(counting, number)
            self._wait_for_more(counting)
        finally:
            seen = counting.stop(STOP_DEADLINE_SECONDS)
            kept = self._verdict(seen)
        return kept

    def _say(self, text: str) -> None:
        self.console.print(f"[bold]•[/] {text}", highlight=False)

    def _wait_until_seen(self) -> None:
        def seen() -> bool:
            return any(vm.vm == VM and vm.host is not None for vm in self.holdfast.vms().vms)

        _wait(f"the controller to hear of {VM}", SEEN_DEADLINE_SECONDS, seen)

    def _wait_until_protected(self, since: float) -> None:
        """Wait until a backup is filled; `since` is the moment from which it was wanted."""
        with _progress(self.console) as show:

            def protected() -> bool:
                now = self.holdfast.protection(VM)
                if now.phase is Phase.ENDED:
                    raise LabError(f"the protection ended: {now.reason}")
                show(now)
                return now.phase is Phase.PROTECTED

            _wait("protection", PROTECTED_DEADLINE_SECONDS, protected)
        seconds = time.monotonic() - since
        now = self.holdfast.protection(VM)
        self._say(
            f"Protected after {seconds:.1f} s: {now.primary} runs it, {now.backup} could take "
            f"over at any moment (generation {now.generation})."
        )

    def _lose_a_host(self, counting: CountingClient, number: int) -> None:
        """Kill the primary; show what happened; wait until another backup is filled."""
        self._wait_for_more(counting)
        before = self.holdfast.protection(VM)
        position = max((event.position for event in self.holdfast.events()), default=0)
        pause = before.pause_ms
        self._say(
            f"{counting.seen().replies:,} replies so far, {before.acknowledged_epoch:,} "
            f"checkpoints; the guest pauses {pause.p50:.1f} ms for one (99 %: {pause.p99:.1f} ms)."
        )
        self.console.rule(f"[bold red]{before.primary} loses power ({number} of {KILLS})")
        ordered_at = self.lab.kill(before.primary)
        promoted = self._promotion(position)
        # Only the new primary can have caused a reply after its guest ran; what came before may
        # have been under way as the power was cut.
        running_at = _moment(promoted, RUNNING) or ordered_at
        replied_at = counting.wait_for_reply(
            after=running_at, deadline_seconds=REPLIES_DEADLINE_SECONDS
        )
        if replied_at is None:
            raise LabError(f"no reply came any more: {counting.seen().fault or 'silence'}")
        self.stalls_ms.append(counting.stall_seconds(since=ordered_at) * 1e3)
        self._show_timeline(before.primary, promoted, ordered_at, replied_at)
        self._say(f"The client waited {self.stalls_ms[-1]:.0f} ms for that reply, and counts on.")
        if number < KILLS:
            self._say("Holdfast looks for another backup by itself.")
            self._wait_until_protected(ordered_at)

    def _wait_for_more(self, counting: CountingClient) -> None:
        wanted = counting.seen().replies + WARM_UP_REPLIES
        if not counting.wait_for_count(wanted, REPLIES_DEADLINE_SECONDS):
            fault = counting.seen().fault or "silence"
            raise LabTimedOut(f"the client got no {WARM_UP_REPLIES} further replies: {fault}")

    def _promotion(self, after: int) -> Event:
        found: list[Event] = []

        def reported() -> bool:
            events = self.holdfast.events(after)
            found.extend(event for event in events if event.kind is EventKind.PROMOTED)
            return bool(found)

        _wait("the new primary's report", SEEN_DEADLINE_SECONDS, reported)
        return found[-1]

    def _show_timeline(
        self, lost: str, promoted: Event, ordered_at: float, replied_at: float
    ) -> None:
        table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
        table.add_column(justify="right", no_wrap=True)
        table.add_column()
        table.add_row("0 ms", f"{lost} loses power: all of its processes are gone")
        for key, meaning in MOMENTS:
            moment = _moment(promoted, key)
            if moment is not None:
                where = f" on {promoted.host}" if key == RUNNING else ""
                table.add_row(f"{(moment - ordered_at) * 1e3:.0f} ms", meaning + where)
        table.add_row(f"{(replied_at - ordered_at) * 1e3:.0f} ms", NEXT_REPLY)
        self.console.print(table)

    def _verdict(self, seen: Count) -> bool:
        self.console.rule("[bold]what the client saw")
        lost = sum(received - expected for expected, received in seen.wrong if received > expected)
        repeated = sum(received < expected for expected, received in seen.wrong)
        table = Table.grid(padding=(0, 2))
        order = f"wrong ones (expected, received): {seen.wrong[:3]}" if seen.wrong else "in order"
        table.add_row("replies", f"{seen.replies:,}, {order}")
        table.add_row("lost", str(lost))
        table.add_row("repeated", str(repeated))
        table.add_row("connection", seen.fault or "the same one from beginning to end")
        stalls = ", ".join(f"{stall:.0f} ms" for stall in self.stalls_ms)
        table.add_row("stalls", stalls or "no host was lost yet")
        self.console.print(table, highlight=False)
        return not seen.wrong and seen.fault is None and len(self.stalls_ms) == KILLS


def _moment(event: Event, key: str) -> float | None:
    """Return a moment of the evidence in seconds of the monotonic clock."""
    value = event.evidence.get(key)
    return value / 1e9 if isinstance(value, int) else None


def _wait(what: str, seconds: float, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise LabTimedOut(f"waited {seconds:.0f} s for {what}")
        time.sleep(POLL_SECONDS)


Show = Callable[[Protection], None]


@contextmanager
def _progress(console: Console) -> Iterator[Show]:
    """Yield what shows how far a backup is filled: a bar on a terminal, else a line at times."""
    if not console.is_terminal:
        yield _plain_lines(console)
        return
    text = TextColumn("{task.description}")
    percent = TextColumn("{task.percentage:>3.0f} %")
    with Progress(
        SpinnerColumn(), text, BarColumn(), percent, console=console, transient=True
    ) as bar:
        task = bar.add_task("looking for a backup host", total=None)

        def show(now: Protection) -> None:
            if now.seeding is not None and now.backup is not None:
                total_bytes = max(now.seeding.total_bytes, now.seeding.sent_bytes, 1)
                bar.update(
                    task,
                    description=_filling(now),
                    total=total_bytes,
                    completed=now.seeding.sent_bytes,
                )

        yield show


def _plain_lines(console: Console) -> Show:
    said_at = 0.0

    def show(now: Protection) -> None:
        nonlocal said_at
        due = time.monotonic() - said_at >= PLAIN_LINE_SECONDS
        if due and now.seeding is not None and now.backup is not None and now.seeding.total_bytes:
            said_at = time.monotonic()
            percent = min(100.0, 100.0 * now.seeding.sent_bytes / now.seeding.total_bytes)
            console.print(f"  {_filling(now)}: {percent:.0f} %", highlight=False)

    return show


def _filling(now: Protection) -> str:
    number = now.seeding.round if now.seeding is not None else 0
    return f"filling {now.backup} while the guest runs, round {number}"


def _interrupt(*_: object) -> None:
    """End the demo; a second signal must not end the cleaning up."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    """Run the demo; 0 when the client noticed nothing, 1 when it did or something failed."""
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    # A terminal that closes or a service manager that stops us must not leave the lab behind.
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    began = time.monotonic()
    try:
        if Lab.is_healthy(NAME):
            raise LabRefused("a demo is running already; `./dev lab down --name demo` ends it")
        console.print("[bold]•[/] Making a lab: three hosts, each in a network namespace.")
        with (
            Lab.up(HOSTS, NAME, say=lambda step: console.print(f"  {step}")) as lab,
            HoldfastClient([lab.url]) as holdfast,
        ):
            kept = Demo(lab, holdfast, console).run()
    except KeyboardInterrupt:
        console.print("Interrupted; the lab is removed.")
        return 130
    except (LabError, HoldfastError, OSError) as fault:
        console.print(f"The demo failed: {fault}", style="red", markup=False)
        return 1
    console.print(
        f"The lab is removed. All of it took {time.monotonic() - began:.0f} s.", highlight=False
    )
    console.print(
        "[bold green]Nothing was lost, nothing came twice, the connection held.[/]"
        if kept
        else "[bold red]That is not what was promised.[/]"
    )
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
