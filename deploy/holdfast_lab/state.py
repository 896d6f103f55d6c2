"""What is known of a lab between two commands: one file, changed under a lock.

Reads and writes /run/holdfast-lab/NAME/lab.json; takes flock(2) on the folder above.
"""

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from holdfast_lab.errors import LabRefused
from holdfast_lab.network import NAME_PATTERN
from holdfast_lab.paths import RUN_FOLDER
from holdfast_lab.processes import Process


class VmState(BaseModel):
    """A VM that the lab started; where it runs now only Holdfast knows."""

    model_config = ConfigDict(frozen=True)

    name: str
    started_on: str
    addresses: tuple[str, ...]
    """One for each NIC."""
    macs: tuple[str, ...]


class LabState(BaseModel):
    """Everything that the lab must remember."""

    name: str
    components: tuple[str, ...]
    accelerator: str
    memory_total_bytes: int | None = None
    """What every host's agent is told to have; None: what the machine has."""
    owner: Process | None = None
    """The process with which the lab shall end; None: it stays until it is taken down."""
    hosts: dict[str, bool] = {}
    """Every host, and whether it is powered."""
    processes: dict[str, Process] = {}
    """By service: `etcd`, `controller 2`, `forwarder controller`, `agent h1`, `vm NAME on h1`,
    and `thaw SERVICE` for one that is frozen."""
    vms: dict[str, VmState] = {}
    cuts: tuple[tuple[str, str], ...] = ()
    """Sender and receiver."""
    replicas: dict[str, int] = {}
    """How many there are of `etcd` and of `controller`; one of what is not named."""
    clocks: bool = False
    """The hosts' clocks can be stopped."""
    tls: bool = True
    """The hosts speak to each other by TLS, as they do unless they are told otherwise."""
    ports: tuple[int, ...] = ()
    """On the machine's own loopback; each leads to a controller."""
    guests_started: int = 0
    complete: bool = False
    """Coming up got to its end."""


class Folder:
    """The folder of one lab."""

    def __init__(self, name: str) -> None:
        """Speak of the lab `name`. Raises LabRefused for a name that would not do."""
        if not re.fullmatch(NAME_PATTERN, name):
            raise LabRefused(
                f"a lab's name is at most 20 of a-z, 0-9 and -, starting without -: not {name!r}"
            )
        self.name = name
        self.path = RUN_FOLDER / name

    def log(self, service: str) -> Path:
        """Return where a service's output goes."""
        return self.path / "logs" / (service.replace(" ", "-") + ".log")

    def disk(self, host: str) -> Path:
        """Return what a host keeps through a power loss."""
        return self.path / "hosts" / host / "state"

    def run(self, host: str) -> Path:
        """Return what a host has on tmpfs: sockets; gone after a power loss."""
        return self.path / "hosts" / host / "run"

    @property
    def authority(self) -> Path:
        """Return the folder of the authority and of what it made for each host."""
        return self.path / "pki"

    def create(self, state: LabState) -> None:
        """Make the folder with a first state."""
        (self.path / "logs").mkdir(parents=True)
        self._write(state)

    def exists(self) -> bool:
        """Tell whether there is anything of this lab on disk."""
        return self.path.exists()

    def read(self) -> LabState:
        """Return the state as it is. Raises LabRefused when there is no such lab."""
        try:
            return LabState.model_validate_json((self.path / "lab.json").read_bytes())
        except FileNotFoundError:
            raise LabRefused(
                f"there is no lab named {self.name}: `holdfast lab up --name {self.name}` makes it"
            ) from None
        except ValidationError as fault:
            raise LabRefused(
                f"{self.path}/lab.json is damaged or of another version: "
                f"`holdfast lab down --name {self.name}` removes what is left"
            ) from fault

    @contextlib.contextmanager
    def change(self) -> Iterator[LabState]:
        """Give the state to be changed; it is written back unless the block raises.

        Holds the lock meanwhile, so keep the block short.
        """
        with lock():
            state = self.read()
            yield state
            self._write(state)

    def remove(self) -> None:
        """Remove all files of the lab."""
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):
            RUN_FOLDER.rmdir()  # the last one; else it is not empty

    def _write(self, state: LabState) -> None:
        temporary = self.path / "lab.json.new"
        temporary.write_text(state.model_dump_json(indent=2))
        temporary.rename(self.path / "lab.json")


def lab_names() -> list[str]:
    """Return the names of the labs that have left anything on disk."""
    return sorted(path.name for path in RUN_FOLDER.glob("*") if path.is_dir())


@contextlib.contextmanager
def lock() -> Iterator[None]:
    """Keep other commands from changing any lab's file meanwhile."""
    while True:
        RUN_FOLDER.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(RUN_FOLDER, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # removed between the two lines: the last lab went down
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not RUN_FOLDER.exists() or not os.path.samestat(
                os.fstat(descriptor), RUN_FOLDER.stat()
            ):
                continue
            yield
            return
        finally:
            os.close(descriptor)
