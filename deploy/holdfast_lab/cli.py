"""`holdfast lab`: several hosts on this machine, to try Holdfast and to break things on purpose.

A thin cover over `lab.Lab`. Exit codes, the same as those of `holdfast`: 0 done, 1 something
failed, 2 wrong usage, 3 refused (the message says what to do), 5 something was not ready in time.
"""

import json
import os
import re
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from holdfast_lab.errors import LabError, LabRefused, LabTimedOut
from holdfast_lab.faults import FROZEN_SECONDS
from holdfast_lab.lab import Lab
from holdfast_lab.services import COMPONENTS
from holdfast_lab.state import lab_names
from holdfast_lab.vm import VmOptions

EXIT_FAILED, EXIT_REFUSED, EXIT_TIMED_OUT = 1, 3, 5

console = Console()


class LabGroup(TyperGroup):
    """Commands whose expected errors become a sentence and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            if os.geteuid() != 0:
                raise LabRefused("the lab makes network namespaces and taps: run it as root")
            return super().invoke(ctx)
        except LabError as fault:
            typer.echo(f"error: {fault}", err=True)
            codes = {LabRefused: EXIT_REFUSED, LabTimedOut: EXIT_TIMED_OUT}
            raise typer.Exit(codes.get(type(fault), EXIT_FAILED)) from fault


app = typer.Typer(
    cls=LabGroup,
    no_args_is_help=True,
    help="Several hosts on this machine, each in a network namespace of its own.",
)

Name = Annotated[str, typer.Option("--name", "-n", help="Which lab; several may be up.")]
Target = Annotated[
    list[str], typer.Argument(help="A service: `agent h1`, `controller`, `etcd`, `etcd 2`.")
]


@app.command()
def up(
    *,
    hosts: Annotated[int, typer.Option(help="How many; they are called h1, h2, ...")] = 3,
    controllers: Annotated[int, typer.Option(help="Replicas: controller 1, ...")] = 1,
    etcd: Annotated[int, typer.Option(help="Members: etcd 1, ...")] = 1,
    name: Name = "lab",
    components: Annotated[
        str, typer.Option(help="What to start besides the network, by commas.")
    ] = ",".join(COMPONENTS),
    accelerator: Annotated[str, typer.Option(help="tcg or kvm.")] = "tcg",
    host_memory: Annotated[
        str, typer.Option(help="What each host shall say it has, as in 2G; empty: the truth.")
    ] = "",
    tls: Annotated[bool, typer.Option(help="Hosts speak TLS to each other.")] = True,
    replace: Annotated[bool, typer.Option(help="Even if a lab of this name works.")] = False,
) -> None:
    """Make a lab and wait until it works. What is left of a crashed one is removed first."""
    if Lab.is_healthy(name) and not replace:
        raise LabRefused(f"lab {name} is up; `holdfast lab down --name {name}`, or use --replace")
    lab = Lab.up(
        hosts,
        name,
        controllers=controllers,
        etcd=etcd,
        components=[word for word in components.split(",") if word],
        accelerator=accelerator,
        memory_total_bytes=parse_memory_mb(host_memory) << 20 if host_memory else None,
        tls=tls,
        owned=False,
        say=lambda step: console.print(f"  {step}", highlight=False),
    )
    console.print(f"Lab {name} is up: {', '.join(lab.state.hosts)}.", highlight=False)
    if lab.urls:
        where = ", ".join(lab.urls)
        console.print(f"Its controller answers at {where} (`holdfast lab env`).", highlight=False)


@app.command()
def down(
    name: Name = "lab",
    every: Annotated[bool, typer.Option("--all", help="All labs of this machine.")] = False,
) -> None:
    """End everything a lab started and remove all it made."""
    for each in lab_names() if every else [name]:
        Lab.remove(each)
        console.print(f"Lab {each} is gone.", highlight=False)


@app.command()
def status(
    name: Name = "lab",
    output: Annotated[str, typer.Option("--output", "-o", help="table or json.")] = "table",
) -> None:
    """Show hosts, services, VMs that were started, and cuts."""
    facts = Lab.attach(name).status()
    if output == "json":
        typer.echo(json.dumps(facts, indent=2))
    elif output == "table":
        _print_status(facts)
    else:
        raise LabRefused(f"output is table or json, not {output}")


@app.command("run-vm")
def run_vm(
    vm: Annotated[str, typer.Argument(help="The new VM's name.")],
    *,
    host: Annotated[str, typer.Option(help="Where to start it.")] = "h1",
    memory: Annotated[str, typer.Option(help="As in 256M or 4G.")] = "256M",
    vcpus: int = 1,
    shared_memory: Annotated[
        bool, typer.Option(help="Guest memory in a memfd, else QEMU's own.")
    ] = False,
    dirty_mb: Annotated[int, typer.Option(help="MiB that the guest keeps rewriting.")] = 16,
    dirty_pps: Annotated[int, typer.Option(help="Pages it rewrites in each second.")] = 0,
    nics: int = 1,
    graphics: bool = True,
    cpu: Annotated[str, typer.Option(help="As QEMU's -cpu takes it.")] = "max",
    vhost: Annotated[bool, typer.Option(help="Its NICs by vhost: needs kernel plugs.")] = False,
    wait: Annotated[bool, typer.Option(help="Until its Redis answers.")] = True,
    name: Name = "lab",
) -> None:
    """Start a VM whose guest runs Redis on port 6379."""
    options = VmOptions(
        memory_mb=parse_memory_mb(memory),
        vcpus=vcpus,
        shared_memory=shared_memory,
        dirty_mb=dirty_mb,
        dirty_pps=dirty_pps,
        nics=nics,
        graphics=graphics,
        cpu=cpu,
        vhost=vhost,
    )
    state = Lab.attach(name).run_vm(vm, host, options, wait=wait)
    verb = "serves Redis" if wait else "boots"
    console.print(f"{vm} {verb} on {host} at {', '.join(state.addresses)}.", highlight=False)


@app.command("power-off-vm")
def power_off_vm(vm: str, name: Name = "lab") -> None:
    """Let a guest shut itself down from inside."""
    Lab.attach(name).power_off_vm(vm)


@app.command()
def kill(
    target: Annotated[list[str], typer.Argument(help="A host, or a service such as `agent h1`.")],
    name: Name = "lab",
) -> None:
    """Let a host lose power: all its processes die, its link goes down. Or SIGKILL a service."""
    Lab.attach(name).kill(" ".join(target))
    console.print(f"{' '.join(target)} is dead.", highlight=False)


@app.command()
def revive(
    target: Annotated[list[str], typer.Argument(help="A killed host, or a killed service.")],
    name: Name = "lab",
) -> None:
    """Give a killed host its power back: network and agent; its state folder was kept."""
    Lab.attach(name).revive(" ".join(target))
    console.print(f"{' '.join(target)} is back.", highlight=False)


@app.command()
def freeze(
    target: Annotated[list[str], typer.Argument(help="A service, or `vm NAME on HOST`.")],
    seconds: Annotated[float, typer.Option(help="Thawed by itself after so long.")] = (
        FROZEN_SECONDS
    ),
    name: Name = "lab",
) -> None:
    """Stop a process where it is (SIGSTOP)."""
    Lab.attach(name).freeze(" ".join(target), seconds=seconds)


@app.command()
def thaw(target: Target, name: Name = "lab") -> None:
    """Let what was frozen run again."""
    Lab.attach(name).thaw(" ".join(target))


@app.command()
def cut(
    first: str,
    second: str,
    one_way: Annotated[bool, typer.Option(help="Only from first to second.")] = False,
    name: Name = "lab",
) -> None:
    """Let all that two parties (h1, etcd-1, `control`, `client`) send to each other vanish."""
    Lab.attach(name).cut(first, second, one_way=one_way)
    console.print(f"{first} {'-/->' if one_way else '<-/->'} {second}", highlight=False)


@app.command()
def heal(
    first: Annotated[str | None, typer.Argument()] = None,
    second: Annotated[str | None, typer.Argument()] = None,
    name: Name = "lab",
) -> None:
    """Take back the cuts between two parties; without parties, all."""
    if first is not None and second is None:
        raise LabRefused("name two parties, or none to heal all cuts")
    Lab.attach(name).heal(first, second)


@app.command()
def start(target: Target, name: Name = "lab") -> None:
    """Start a service that was stopped or killed."""
    Lab.attach(name).start(" ".join(target))


@app.command()
def stop(target: Target, name: Name = "lab") -> None:
    """Stop a service as an administrator would."""
    Lab.attach(name).stop(" ".join(target))


@app.command()
def restart(target: Target, name: Name = "lab") -> None:
    """Stop a service and start it again."""
    Lab.attach(name).restart(" ".join(target))


@app.command()
def env(name: Name = "lab") -> None:
    """Print what a shell needs to talk to this lab: `eval "$(holdfast lab env)"`."""
    lab = Lab.attach(name)
    typer.echo(f"export HOLDFAST_URL={','.join(lab.urls) or lab.url}")
    typer.echo(f"export HOLDFAST_LAB={name}")


@app.command("exec", context_settings={"ignore_unknown_options": True})
def execute(
    party: Annotated[str, typer.Argument(help="A host, `control` or `client`.")],
    command: Annotated[list[str], typer.Argument(help="After `--`.")],
    name: Name = "lab",
) -> None:
    """Run a program on a party's machine, in the place of this one."""
    namespace = Lab.attach(name).powered_namespace(party)
    os.execvp("ip", ["ip", "netns", "exec", namespace, *command])  # noqa: S606 - no shell wanted


@app.command()
def logs(
    target: Annotated[
        list[str], typer.Argument(help="A service, `vm NAME on HOST` or `console NAME`.")
    ],
    name: Name = "lab",
) -> None:
    """Print what a service, a QEMU or a guest's console said."""
    lab = Lab.attach(name)
    path = lab.log(" ".join(target))
    if not path.exists():
        known = ", ".join(sorted(each.stem for each in path.parent.iterdir()))
        raise LabRefused(f"there is no log of {' '.join(target)}; there are {known}")
    typer.echo(path.read_text(errors="replace"), nl=False)


def parse_memory_mb(text: str) -> int:
    """Return MiB for `256`, `256M` or `4G`. Raises LabRefused for anything else."""
    match = re.fullmatch(r"(\d+)([MG]?)", text.upper())
    if match is None:
        raise LabRefused(f"memory is given as 256M or 4G, not {text}")
    return int(match[1]) * (1024 if match[2] == "G" else 1)


def _print_status(facts: dict[str, Any]) -> None:
    hosts = Table("host", "address", "power", "agent", title=f"lab {facts['name']}")
    for host in facts["hosts"]:
        power, agent = ("on" if host["powered"] else "off"), ("runs" if host["agent"] else "-")
        hosts.add_row(host["host"], host["address"], power, agent)
    console.print(hosts)
    if facts["vms"]:
        vms = Table("VM", "addresses", "started on", "is there still")
        for vm in facts["vms"]:
            still = "yes" if vm["still_there"] else "no: see `holdfast vms`"
            vms.add_row(vm["vm"], ", ".join(vm["addresses"]), vm["started_on"], still)
        console.print(vms)
    running = [name for name, runs in facts["services"].items() if runs]
    console.print(f"running: {', '.join(running) or 'no service'}", highlight=False)
    for pair in facts["cuts"]:
        console.print(f"cut: {pair['from']} to {pair['to']}", highlight=False)
    for url in facts["urls"]:
        console.print(f"controller: {url}", highlight=False)


if __name__ == "__main__":
    app(prog_name="holdfast lab")
