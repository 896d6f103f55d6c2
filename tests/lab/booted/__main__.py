"""`./dev booted`: run a command by hand in a booted host, or in several, and end as it ends."""

import argparse
import os
import sys
import threading
from pathlib import Path

from tests.lab.booted.channel import Command
from tests.lab.booted.ingredients import KERNELS, QEMUS
from tests.lab.booted.machine import Machine, NotBootedError, booted_hosts

OUTPUT_SECONDS = 60.0


def arguments() -> argparse.Namespace:
    """Return what the user asked for."""
    parser = argparse.ArgumentParser(
        prog="./dev booted",
        description="Boot Debian kernels on this machine's root file system and run COMMAND in each"
        " host, in the present folder. A single word is a shell's command. HOLDFAST_BOOTED_HOST is"
        " the host's number; host N is 10.8.0.N. What is written inside is gone afterwards, except"
        " below --shared. Exit status: the command's; 124 if it was cut, 125 if a host died.",
    )
    parser.add_argument("--kernel", choices=KERNELS, default="6.1")
    parser.add_argument("--qemu", choices=QEMUS, default="7.2", help="which one emulates the host")
    parser.add_argument("--hosts", type=int, default=1, choices=range(1, 9), metavar="N")
    parser.add_argument("--memory-mb", type=int, default=2048)
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--modules", default="", help="to load before, separated by commas")
    parser.add_argument("--shared", type=Path, help="a folder that the host may write")
    parser.add_argument("--seconds-max", type=float, default=600.0)
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND")
    return parser.parse_args()


def follow(command: Command, prefix: str) -> None:
    """Show a command's output as it comes, whole lines if there are several hosts."""
    seen = shown = 0
    while True:
        status = command.status
        seen += len(command.more(seen, OUTPUT_SECONDS))
        data = bytes(command.output[shown:seen])
        if prefix and status is None:
            data = data[: data.rfind(b"\n") + 1]
        shown += len(data)
        if prefix:
            data = b"".join(prefix.encode() + line for line in data.splitlines(keepends=True))
        os.write(sys.stdout.fileno(), data)
        if status is not None:
            return


def main() -> int:
    """Run it."""
    given = arguments()
    words = given.command[1:] if given.command[:1] == ["--"] else given.command
    if not words:
        sys.stderr.write("error: give a command, for example: ./dev booted uname -r\n")
        return 2
    argv = ["/bin/bash", "-c", words[0]] if len(words) == 1 else words
    machine = Machine(
        kernel=given.kernel,
        qemu=given.qemu,
        memory_mb=given.memory_mb,
        cpus=given.cpus,
        modules=tuple(name for name in given.modules.split(",") if name),
    )
    shared = given.shared.resolve() if given.shared else None
    try:
        with booted_hosts(given.hosts, machine, shared=shared) as hosts:
            commands = [host.start(argv, seconds_max=given.seconds_max) for host in hosts]
            followers = [
                threading.Thread(
                    target=follow, args=(command, f"{number}| " if given.hosts > 1 else "")
                )
                for number, command in enumerate(commands, start=1)
            ]
            for follower in followers:
                follower.start()
            statuses = [command.wait().status for command in commands]
            for follower in followers:
                follower.join(OUTPUT_SECONDS)
    except NotBootedError as error:
        sys.stderr.write(f"error: {error}\n")
        return 125
    return next((status for status in statuses if status), 0)


if __name__ == "__main__":
    sys.exit(main())
