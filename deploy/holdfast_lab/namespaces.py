"""Network namespaces: making, removing, entering them, and ending what runs in them.

Needs CAP_NET_ADMIN and CAP_SYS_ADMIN; calls `ip`, setns(2), kill(2); reads /proc.

A named namespace is a file below /run/netns on which the kernel's object is mounted. A process is
in it when /proc/PID/ns/net is the same object (device and inode).
"""

import ctypes
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from holdfast_lab.errors import LabError, LabTimedOut

NETNS_FOLDER = Path("/run/netns")
CLONE_NEWNET = 0x40000000
COMMAND_DEADLINE_SECONDS = 20.0
POLL_SECONDS = 0.002

Result = TypeVar("Result")

_libc = ctypes.CDLL(None, use_errno=True)


def run_tool(argv: list[str], text: str = "") -> str:
    """Run a tool of the system with `text` on its standard input; return what it printed.

    Raises LabError with the tool's own words when it fails.
    """
    done = subprocess.run(
        argv,
        input=text,
        capture_output=True,
        text=True,
        check=False,
        timeout=COMMAND_DEADLINE_SECONDS,
    )
    if done.returncode != 0:
        raise LabError(f"`{' '.join(argv)}` failed: {done.stderr.strip()}\n{text}".strip())
    return done.stdout


def batch(name: str, *commands: str) -> None:
    """Carry out `ip` commands inside a namespace, stopping at the first that fails."""
    run_tool(["ip", "-netns", name, "-batch", "-"], "\n".join(commands) + "\n")


def exists(name: str) -> bool:
    """Tell whether there is a namespace of this name."""
    return (NETNS_FOLDER / name).exists()


def names() -> list[str]:
    """Return the names of all namespaces of the machine."""
    return sorted(path.name for path in NETNS_FOLDER.glob("*"))


def create(name: str) -> None:
    """Make a namespace without IPv6, its loopback interface up.

    IPv6 is off because every interface would send solicitations of its own into links on which
    tests count packets.
    """
    run_tool(["ip", "netns", "add", name])

    def switch_ipv6_off() -> None:
        for which in ("all", "default"):
            Path(f"/proc/sys/net/ipv6/conf/{which}/disable_ipv6").write_text("1")

    enter(name, switch_ipv6_off)
    batch(name, "link set lo up")


def remove(name: str) -> None:
    """End every process in a namespace and remove it with all its interfaces. Idempotent."""
    if exists(name):
        kill_all(name)
        run_tool(["ip", "netns", "delete", name])


def enter(name: str, function: Callable[[], Result]) -> Result:
    """Call a function inside a namespace and return its result, or raise what it raised.

    It runs in a thread of its own, which ends with it: no other thread changes its namespace.
    Sockets made there stay in that namespace for good.
    """
    results: list[Result] = []
    faults: list[BaseException] = []

    def body() -> None:
        try:
            with (NETNS_FOLDER / name).open("rb") as file:
                if _libc.setns(file.fileno(), CLONE_NEWNET) != 0:
                    number = ctypes.get_errno()
                    raise OSError(number, f"setns {name}: {os.strerror(number)}")  # noqa: TRY301 - handed over below
            results.append(function())
        except BaseException as fault:  # noqa: BLE001 - raised again in the caller's thread
            faults.append(fault)

    thread = threading.Thread(target=body, name=f"in {name}")
    thread.start()
    thread.join()
    if faults:
        raise faults[0]
    return results[0]


def open_socket(name: str, family: int, kind: int, protocol: int = 0) -> socket.socket:
    """Return a new socket that lives in a namespace; the caller closes it."""
    return enter(name, lambda: socket.socket(family, kind, protocol))


def processes_in(name: str) -> list[int]:
    """Return the ids of the processes in a namespace, but for the caller's own."""
    wanted = (NETNS_FOLDER / name).stat()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            facts = (folder / "ns" / "net").stat()
        except OSError:
            continue  # it ended meanwhile
        same = (facts.st_dev, facts.st_ino) == (wanted.st_dev, wanted.st_ino)
        if same and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def kill_all(name: str, deadline_seconds: float = 20.0) -> None:
    """End every process in a namespace at once, without a chance to say goodbye.

    Looks again until it finds none: a process may have forked while it was being killed.
    """
    deadline = time.monotonic() + deadline_seconds
    while pids := processes_in(name):
        if time.monotonic() > deadline:
            raise LabTimedOut(f"processes {pids} in namespace {name} survive SIGKILL")
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(POLL_SECONDS)
