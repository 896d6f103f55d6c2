"""`./dev demo`: a VM loses its host twice under a client that counts, and the client never notices.

Makes a lab named `demo`, needs what the lab needs, and removes it at the end, also on Ctrl-C.

What is shown is measured, not announced: the client's own replies, and the moments that the
surviving host put into its report. Every process of the lab shares this machine's monotonic clock,
so those moments can be compared with the one at which the power was cut.
"""

import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

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
WARM_UP_REPLIES = 200
SEEN_DEADLINE_SECONDS = 60.0
PROTECTED_DEADLINE_SECONDS = 180.0
REPLY_DEADLINE_SECONDS = 60.0
CLIENT_TIMEOUT_SECONDS = 60.0
"""Of the client's connection: longer than any failover, so that it waits and does not give up."""
POLL_SECONDS = 0.05

# What the new primary reports of a failover: key of the evidence, and what it means.
MOMENTS = (
    ("suspected_at_monotonic_ns", "the backup suspects it and stops acknowledging, for good"),
    ("asked_at_monotonic_ns", "the backup asks for the claim"),
    ("won_at_monotonic_ns", "the claim is won: nobody else may go on"),
    ("running_at_monotonic_ns", "the guest runs again"),
)


@dataclass
class Demo:
    """One run of the demo in a lab that is up."""

    lab: Lab
    holdfast: HoldfastClient
    console: Console

    def run(self) -> bool:
        """Show everything; return whether all went as promised."""
        self._say("Starting a VM on h1. Its guest runs Redis; it knows nothing of Holdfast.")
        vm = self.lab.run_vm(VM, "h1", VmOptions(dirty_mb=32, dirty_pps=2000))
        self._wait_until_seen()
        self._say(f"It answers at {vm.addresses[0]} and rewrites 2,000 of its pages each second.")
        counting = CountingClient(self.lab.redis(VM, timeout_seconds=CLIENT_TIMEOUT_SECONDS))
        self._say("A client counts: one TCP connection, INCR after INCR, as fast as replies come.")
        counting.start()
        try:
            self._say("Asking for protection while the VM runs and the client counts.")
            self.holdfast.protect(VM)
            self._wait_until_protected()
            kept = all(self._lose_a_host(counting, number) for number in range(1, KILLS + 1))
            counting.wait_for_count(counting.seen().replies + WARM_UP_REPLIES, 30)
        finally:
            seen = counting.stop()
        return self._verdict(seen) and kept

    def _say(self, text: str) -> None:
        self.console.print(f"[bold]•[/] {text}", highlight=False)

    def _wait_until_seen(self) -> None:
        def seen() -> bool:
            return any(vm.vm == VM and vm.host is not None for vm in self.holdfast.vms().vms)

        _wait(f"the controller to hear of {VM}", SEEN_DEADLINE_SECONDS, seen)

    def _wait_until_protected(self) -> Protection:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task("looking for a backup host", total=None)

            def protected() -> bool:
                now = self.holdfast.protection(VM)
                if now.phase is Phase.ENDED:
                    raise LabError(f"the protection ended: {now.reason}")
                if now.seeding is not None and now.backup is not None:
                    progress.update(
                        task,
                        description=f"filling {now.backup} while the guest runs, "
                        f"round {now.seeding.round}",
                        total=max(now.seeding.total_bytes, now.seeding.sent_bytes, 1),
                        completed=now.seeding.sent_bytes,
                    )
                return now.phase is Phase.PROTECTED

            _wait("protection", PROTECTED_DEADLINE_SECONDS, protected)
        now = self.holdfast.protection(VM)
        self._say(
            f"Protected: {now.primary} runs it, {now.backup} could take over at any moment "
            f"(generation {now.generation})."
        )
        return now

    def _lose_a_host(self, counting: CountingClient, number: int) -> bool:
        """Kill the primary; show what happened; wait until another backup is filled."""
        counting.wait_for_count(counting.seen().replies + WARM_UP_REPLIES, 60)
        before = self.holdfast.protection(VM)
        position = max((event.position for event in self.holdfast.events()), default=0)
        pause = before.pause_ms
        self._say(
            f"{counting.seen().replies} replies so far; {before.acknowledged_epoch} checkpoints, "
            f"pause {pause.p50:.1f} ms in the middle, {pause.p99:.1f} ms in the worst of 100."
        )
        self.console.rule(f"[bold red]power loss of {before.primary} (number {number})")
        ordered_at = self.lab.kill(before.primary)
        dead_at = time.monotonic()
        replied_at = counting.wait_for_reply(after=dead_at, deadline_seconds=REPLY_DEADLINE_SECONDS)
        if replied_at is None:
            self._say(f"[red]No reply came any more: {counting.seen().fault or 'silence'}[/]")
            return False
        promoted = self._promotion(position)
        stall_ms = counting.stall_seconds(since=dead_at) * 1e3
        self._show_timeline(before.primary, promoted, ordered_at, replied_at)
        self._say(f"The client waited {stall_ms:.0f} ms for that reply. That is all it noticed.")
        if number < KILLS:
            self._say("Holdfast now looks for another backup by itself.")
            self._wait_until_protected()
        return True

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
        table = Table(
            "after", "what", title=f"from {lost} to {promoted.host}", title_justify="left"
        )
        table.add_row("0 ms", f"{lost} loses power")
        for key, meaning in MOMENTS:
            moment = promoted.evidence.get(key)
            if isinstance(moment, int):
                table.add_row(f"{(moment / 1e9 - ordered_at) * 1e3:.0f} ms", meaning)
        table.add_row(f"{(replied_at - ordered_at) * 1e3:.0f} ms", "the client has its next reply")
        self.console.print(table)

    def _verdict(self, seen: Count) -> bool:
        self.console.rule("verdict")
        intact = not seen.wrong and seen.fault is None
        table = Table.grid(padding=(0, 2))
        table.add_row("replies", f"{seen.replies}")
        table.add_row("lost or repeated", f"{len(seen.wrong)} {seen.wrong[:3] or ''}")
        table.add_row("connection", seen.fault or "the same one from beginning to end")
        self.console.print(table)
        return intact


def _wait(what: str, seconds: float, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise LabTimedOut(f"waited {seconds:.0f} s for {what}")
        time.sleep(POLL_SECONDS)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Run the demo; 0 when the client noticed nothing, 1 when it did or something failed."""
    console = Console()
    # A terminal that closes or a service manager that stops us must not leave the lab behind.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    began = time.monotonic()
    try:
        if Lab.is_healthy(NAME):
            raise LabRefused("a demo is running already; `holdfast lab down --name demo` ends it")
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
    console.print(f"The lab is removed. All of it took {time.monotonic() - began:.0f} s.")
    console.print(
        "[bold green]Nothing was lost, nothing came twice, the connection held.[/]"
        if kept
        else "[bold red]That is not what was promised.[/]"
    )
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
