"""Commands about one VM's protection: protect, unprotect, status, change, switchover, preflight.

Talk to a controller over the REST API; print results on standard output.
"""

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from holdfast_api.cli.options import (
    DEADLINE_SECONDS,
    DEFAULT_URL,
    TABLE,
    TIMEOUT_SECONDS,
    Deadline,
    ExitCode,
    Format,
    OutputFormat,
    Timeout,
    Url,
    VmName,
    Wait,
    client_of,
)
from holdfast_api.cli.policy_file import read_policy
from holdfast_api.cli.show import (
    UNSAFE_MARK,
    duration,
    line,
    median_and_tail,
    notice,
    show_fields,
    show_model,
    show_table,
    size,
    unsafe,
)
from holdfast_api.cli.waiting import (
    Watch,
    say,
    wait_until_moved,
    wait_until_protected,
    wait_until_unprotected,
)
from holdfast_api.messages import PolicyPatch, VmList
from holdfast_api.records import EncodingPolicy, Protection, Vm
from holdfast_api.words import Phase

app = typer.Typer()


@app.command()
def protect(
    vm: VmName,
    *,
    policy: Annotated[str | None, typer.Option(help="Name of a stored policy.")] = None,
    policy_file: Annotated[
        Path | None, typer.Option(help="A policy of its own, in YAML or JSON; - reads stdin.")
    ] = None,
    wait: Wait = True,
    deadline: Deadline = DEADLINE_SECONDS,
    output: Format = TABLE,
    url: Url = DEFAULT_URL,
    timeout: Timeout = TIMEOUT_SECONDS,
) -> None:
    """Protect a running VM: find a backup host, fill it, hold output from then on."""
    if policy is not None and policy_file is not None:
        raise typer.BadParameter("give --policy or --policy-file, not both")
    inline = read_policy(policy_file) if policy_file is not None else None
    deadline_seconds = time.monotonic() + deadline
    with client_of(url, timeout) as client:
        protection = client.protect(vm, policy_name=policy, policy=inline)
        if unsafe(protection.policy):
            notice(f"holdfast: {vm}: {UNSAFE_MARK}; a failover can lose what clients have seen")
        if wait:
            stays = f"the protection of {vm} stays on; end it with: holdfast unprotect {vm}"
            watch = Watch(client, vm, deadline_seconds, stays)
            protection = wait_until_protected(watch, protection.generation)
    _show_protection(protection, output)


@app.command()
def unprotect(
    vm: VmName,
    *,
    wait: Wait = True,
    deadline: Deadline = DEADLINE_SECONDS,
    output: Format = TABLE,
    url: Url = DEFAULT_URL,
    timeout: Timeout = TIMEOUT_SECONDS,
) -> None:
    """End a VM's protection. The VM runs on where it is."""
    deadline_seconds = time.monotonic() + deadline
    with client_of(url, timeout) as client:
        protection = client.unprotect(vm)
        if wait:
            stays = f"the protection of {vm} is still being taken down"
            wait_until_unprotected(Watch(client, vm, deadline_seconds, stays))
        if output is not TABLE:
            # What the wait saw last may be gone; the VM itself tells how it is left.
            show_model(client.vm(vm) if wait or protection is None else protection, output)
            return
    line(f"{vm}: {'not protected any more' if wait else 'the protection is being taken down'}")


@app.command()
def status(
    vm: Annotated[str | None, typer.Argument(metavar="[VM]", help="Only this VM.")] = None,
    output: Format = TABLE,
    url: Url = DEFAULT_URL,
    timeout: Timeout = TIMEOUT_SECONDS,
) -> None:
    """Show how the protections stand: of all VMs, or of one in detail."""
    with client_of(url, timeout) as client:
        if vm is not None:
            _show_protection(client.protection(vm), output)
            return
        protected = tuple(v for v in client.vms().vms if _has_protection(v))
    if output is not TABLE:
        show_model(VmList(vms=protected), output)
        return
    rows = [_status_row(v.protection) for v in protected if v.protection is not None]
    columns = ("VM", "PHASE", "PRIMARY", "BACKUP", "EPOCH", "PAUSE MS", "ACK MS", "HELD", "NOTE")
    show_table(columns, rows, empty="no VM is protected; protect one with: holdfast protect VM")


@app.command()
def vms(output: Format = TABLE, url: Url = DEFAULT_URL, timeout: Timeout = TIMEOUT_SECONDS) -> None:
    """List the VMs that the agents see."""
    with client_of(url, timeout) as client:
        found = client.vms()
    if output is not TABLE:
        show_model(found, output)
        return
    columns = ("VM", "HOST", "STATE", "VCPUS", "MEMORY", "MACHINE", "PROTECTION", "NOTE")
    show_table(columns, [_vm_row(v) for v in found.vms], empty="no agent reports a VM")


@app.command()
def preflight(
    vm: VmName,
    output: Format = TABLE,
    url: Url = DEFAULT_URL,
    timeout: Timeout = TIMEOUT_SECONDS,
) -> None:
    """Say whether a VM can be protected; touches nothing. Refused (3) if it can not."""
    with client_of(url, timeout) as client:
        found = client.preflight(vm)
    if output is not TABLE:
        show_model(found, output)
    else:
        rows = [(i.severity.value, i.code, i.message) for i in found.issues]
        if rows:
            show_table(("SEVERITY", "CODE", "MESSAGE"), rows, empty="")
        line(f"{vm}: {'can be protected' if found.protectable else 'can not be protected'}")
    if not found.protectable:
        raise typer.Exit(ExitCode.REFUSED)


@app.command()
def switchover(
    vm: VmName,
    *,
    to: Annotated[str | None, typer.Option(help="Must be the present backup.")] = None,
    wait: Wait = True,
    deadline: Deadline = DEADLINE_SECONDS,
    output: Format = TABLE,
    url: Url = DEFAULT_URL,
    timeout: Timeout = TIMEOUT_SECONDS,
) -> None:
    """Move a protected VM to its backup host, as planned work."""
    deadline_seconds = time.monotonic() + deadline
    with client_of(url, timeout) as client:
        protection = client.switchover(vm, to=to)
        target = to or protection.backup
        if wait and target is not None:
            stays = f"the switchover of {vm} to {target} is still under way"
            watch = Watch(client, vm, deadline_seconds, stays)
            protection = wait_until_moved(watch, protection, target)
            notice(f"{vm}: runs on {protection.primary} now")
    _show_protection(protection, output)


@app.command()
def change(
    vm: VmName,
    *,
    interval_ms: Annotated[
        int | None, typer.Option(min=5, max=10_000, help="Longest checkpoint distance.")
    ] = None,
    min_interval_ms: Annotated[
        int | None, typer.Option(min=1, max=10_000, help="Shortest distance.")
    ] = None,
    output_triggered: Annotated[
        bool | None,
        typer.Option(
            "--output-triggered/--no-output-triggered", help="Checkpoint when output waits."
        ),
    ] = None,
    reprotect: Annotated[str | None, typer.Option(help="auto or manual.")] = None,
    encoding: Annotated[
        str | None, typer.Option(help="auto, none, delta, zstd or delta-zstd.")
    ] = None,
    output: Format = TABLE,
    url: Url = DEFAULT_URL,
    timeout: Timeout = TIMEOUT_SECONDS,
) -> None:
    """Change a VM's policy while it is protected."""
    wanted = (interval_ms, min_interval_ms, output_triggered, reprotect, encoding)
    if all(value is None for value in wanted):
        raise typer.BadParameter("give at least one option to change, for example --interval-ms 20")
    patch = PolicyPatch(
        interval_ms=interval_ms,
        min_interval_ms=min_interval_ms,
        output_triggered=output_triggered,
        reprotect=_reprotect(reprotect),
        encoding=_encoding(encoding),
    )
    with client_of(url, timeout) as client:
        _show_protection(client.change(vm, patch), output)


def _reprotect(value: str | None) -> Literal["auto", "manual"] | None:
    match value:
        case None | "auto" | "manual":
            return value
        case _:
            raise typer.BadParameter("write auto or manual", param_hint="--reprotect")


def _encoding(value: str | None) -> EncodingPolicy | None:
    match value:
        case None | "auto" | "none" | "delta" | "zstd" | "delta-zstd":
            return value
        case _:
            raise typer.BadParameter(
                "write auto, none, delta, zstd or delta-zstd", param_hint="--encoding"
            )


def _has_protection(vm: Vm) -> bool:
    return vm.protection is not None and vm.protection.phase is not Phase.RETIRED


def _note(protection: Protection) -> str:
    return "; ".join(filter(None, (unsafe(protection.policy), protection.reason)))


def _status_row(protection: Protection) -> list[str]:
    return [
        protection.vm,
        protection.phase.value,
        protection.primary,
        protection.backup or "-",
        str(protection.acknowledged_epoch),
        median_and_tail(protection.pause_ms),
        median_and_tail(protection.acknowledgement_ms),
        size(protection.held_bytes),
        _note(protection),
    ]


def _vm_row(vm: Vm) -> list[str]:
    facts = vm.facts
    protection = vm.protection if _has_protection(vm) else None
    blocking = [i.code for i in facts.issues if i.severity == "blocking"] if facts else []
    notes = [unsafe(protection.policy)] if protection else []
    notes += [f"can not be protected: {', '.join(blocking)}"] if blocking else []
    return [
        vm.vm,
        vm.host or "-",
        "-" if facts is None else ("running" if facts.running else "paused"),
        str(facts.vcpus) if facts else "-",
        size(facts.memory_bytes) if facts else "-",
        facts.machine_type if facts else "-",
        protection.phase.value if protection else "none",
        "; ".join(filter(None, notes)),
    ]


def _encoding_of(protection: Protection) -> str:
    """Return how checkpoints are encoded; with `auto` also why."""
    wanted, report = protection.policy.encoding, protection.primary_report
    if wanted != "auto" or report is None or not report.encoding:
        return wanted
    return f"auto: {report.encoding} ({report.encoding_reason})"


def _show_protection(protection: Protection, output: OutputFormat) -> None:
    if output is not TABLE:
        show_model(protection, output)
        return
    policy = protection.policy
    name = protection.policy_name or "(of its own)"
    alone_seconds = protection.unprotected_seconds
    triggered = ", at once when output waits" if policy.output_triggered else ""
    note = protection.placement
    # The note of a choice that was made is of no use any more, or is about another primary.
    unplaced = note is not None and note.chosen is None and protection.backup is None
    passed_over = note.rejections if note is not None and unplaced else ()
    largest = protection.checkpoint_bytes
    show_fields(
        [
            ("VM", protection.vm),
            ("phase", say(protection)),
            ("warning", unsafe(policy)),
            ("generation", str(protection.generation)),
            ("primary", protection.primary),
            ("backup", protection.backup or "none"),
            ("policy", f"{name}: every {policy.interval_ms} ms{triggered}"),
            ("encoding", _encoding_of(protection)),
            ("acknowledged epoch", str(protection.acknowledged_epoch)),
            ("pause p50 / p99", median_and_tail(protection.pause_ms, " ms")),
            ("acknowledgement p50 / p99", median_and_tail(protection.acknowledgement_ms, " ms")),
            (
                "checkpoint p50 / p99",
                f"{size(largest.p50)} / {size(largest.p99)}" if largest.max else "-",
            ),
            ("held output", size(protection.held_bytes)),
            ("switchover", "under way" if protection.handover else ""),
            ("unprotected for", duration(alone_seconds) if alone_seconds else ""),
            *((f"passed over {r.host}", r.reason) for r in passed_over),
        ]
    )
