"""Commands about the fleet: hosts, host set, policies. Talk to a controller over the REST API."""

from pathlib import Path
from typing import Annotated

import typer

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
from holdfast_api.cli.policy_file import read_policy
from holdfast_api.cli.show import (
    UNSAFE_MARK,
    line,
    notice,
    show_fields,
    show_model,
    show_table,
    size,
    unsafe,
)
from holdfast_api.messages import HostPatch
from holdfast_api.records import Host, StoredPolicy

app = typer.Typer()
host_app = typer.Typer(help="Change what is said of a host.", no_args_is_help=True)
policies_app = typer.Typer(help="Stored policies: list, show, set, delete.", no_args_is_help=True)

PolicyNameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The policy's name.")]


@app.command()
def hosts(
    output: Format = TABLE, url: Url = DEFAULT_URL, timeout: Timeout = TIMEOUT_SECONDS
) -> None:
    """List the hosts and what they carry."""
    with client_of(url, timeout) as client:
        found = client.hosts()
    if output is not TABLE:
        show_model(found, output)
        return
    columns = ("HOST", "STATE", "PRIMARIES", "BACKUPS", "MEMORY FREE", "QEMU", "LABELS")
    show_table(columns, [_host_row(h) for h in found.hosts], empty="no agent has appeared yet")


@host_app.command("set")
def host_set(
    host: Annotated[str, typer.Argument(metavar="HOST", help="The host's name.")],
    *,
    label: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE sets a label, KEY= removes it. May be repeated."),
    ] = None,
    maintenance: Annotated[
        bool | None,
        typer.Option("--maintenance/--no-maintenance", help="Take no new backups while set."),
    ] = None,
    output: Format = TABLE,
    url: Url = DEFAULT_URL,
    timeout: Timeout = TIMEOUT_SECONDS,
) -> None:
    """Set labels and maintenance of a host."""
    labels = dict(_label(text) for text in label or [])
    if not labels and maintenance is None:
        raise typer.BadParameter("give --label KEY=VALUE, --maintenance or --no-maintenance")
    patch = HostPatch(labels=labels or None, maintenance=maintenance)
    with client_of(url, timeout) as client:
        changed = client.change_host(host, patch)
    if output is not TABLE:
        show_model(changed, output)
        return
    line(f"{changed.host}: {_host_state(changed)}, labels: {_labels(changed) or 'none'}")


@policies_app.command("list")
def policies_list(
    output: Format = TABLE, url: Url = DEFAULT_URL, timeout: Timeout = TIMEOUT_SECONDS
) -> None:
    """List the stored policies."""
    with client_of(url, timeout) as client:
        found = client.policies()
    if output is not TABLE:
        show_model(found, output)
        return
    columns = ("NAME", "INTERVAL", "MIN", "ON OUTPUT", "REPROTECT", "NOTE")
    show_table(columns, [_policy_row(p) for p in found.policies], empty="no policy is stored")


@policies_app.command("show")
def policies_show(
    name: PolicyNameArgument,
    output: Format = TABLE,
    url: Url = DEFAULT_URL,
    timeout: Timeout = TIMEOUT_SECONDS,
) -> None:
    """Show one policy with all its fields."""
    with client_of(url, timeout) as client:
        _show_policy(client.policy(name), output)


@policies_app.command("set")
def policies_set(
    name: PolicyNameArgument,
    file: Annotated[Path, typer.Option("--file", "-f", help="YAML or JSON; - reads stdin.")],
    output: Format = TABLE,
    url: Url = DEFAULT_URL,
    timeout: Timeout = TIMEOUT_SECONDS,
) -> None:
    """Store a policy under a name, replacing an older one."""
    policy = read_policy(file)
    if unsafe(policy):
        notice(f"holdfast: {name}: {UNSAFE_MARK}; a failover can lose what clients have seen")
    with client_of(url, timeout) as client:
        _show_policy(client.store_policy(name, policy), output)


@policies_app.command("delete")
def policies_delete(
    name: PolicyNameArgument, url: Url = DEFAULT_URL, timeout: Timeout = TIMEOUT_SECONDS
) -> None:
    """Delete a stored policy that no protection uses."""
    with client_of(url, timeout) as client:
        client.remove_policy(name)
    notice(f"policy {name} deleted")


def _label(text: str) -> tuple[str, str | None]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise typer.BadParameter(
            f"{text!r}: write KEY=VALUE, or KEY= to remove it", param_hint="--label"
        )
    return key, value or None


def _labels(host: Host) -> str:
    return " ".join(f"{k}={v}" for k, v in sorted(host.settings.labels.items()))


def _host_state(host: Host) -> str:
    alive = "alive" if host.alive else "silent"
    return f"{alive}, maintenance" if host.settings.maintenance else alive


def _host_row(host: Host) -> list[str]:
    facts = host.facts
    return [
        host.host,
        _host_state(host),
        str(len(host.primaries)),
        str(len(host.backups)),
        size(facts.memory_available_bytes) if facts else "-",
        facts.qemu_version if facts else "-",
        _labels(host),
    ]


def _policy_row(stored: StoredPolicy) -> list[str]:
    policy = stored.policy
    return [
        stored.name,
        f"{policy.interval_ms} ms",
        f"{policy.min_interval_ms} ms",
        "at once" if policy.output_triggered else "waits",
        policy.reprotect,
        unsafe(policy),
    ]


def _show_policy(stored: StoredPolicy, output: OutputFormat) -> None:
    if output is not TABLE:
        show_model(stored, output)
        return
    fields = [("name", stored.name), ("warning", unsafe(stored.policy))]
    for name, value in stored.policy.model_dump(mode="json", exclude={"placement"}).items():
        fields.append((name, str(value).lower() if isinstance(value, bool) else str(value)))
    for name, value in stored.policy.placement.model_dump(mode="json").items():
        shown = [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else value
        text = " ".join(shown) if isinstance(shown, list) else str(shown or "")
        fields.append((f"placement.{name}", text))
    show_fields(fields)
