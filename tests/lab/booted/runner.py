"""Runs commands inside a booted host for whoever asks from outside. Its process 1, started by init.

Needs root and nothing but the standard library: it starts with `-I -S`, as everything is ten times
slower in here. It serves a virtio-serial port, and TCP for the other hosts of its network.

Theory of operation: one thread, one selector. Each connection carries lines of JSON, a command is
known by the number that its sender gave it:

| line                                                        | direction | says                  |
|-------------------------------------------------------------|-----------|-----------------------|
| {"ready": kernel release}                                   | out       | once, at the start    |
| {"start": n, "argv", "environment", "folder", "seconds_max"}| in        | start a command       |
| {"end": n}                                                  | in        | kill it               |
| {"output": n, "data": base64}                               | out       | what it wrote         |
| {"ended": n, "status": s}                                   | out       | its exit status       |

The status is a shell's: 128 + signal for a killed one, 127 for a command that does not start, and
124 for one that ran longer than `seconds_max` and was cut. A command is a process group of its own,
killed as a whole when it is cut, when its sender says so or when its connection closes. When the
command itself ends, what it left in the background lives on and its later output is dropped.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import selectors
import signal
import socket
import struct
import subprocess
import time

TYPE_CHECKING = False
if TYPE_CHECKING:  # the module typing takes a tenth of a second to load in here, as pathlib does
    from typing import Any

TCP_PORT = 7099
OUTPUT_STEP_BYTES = 65536
CUT = 124
DOES_NOT_START = 127
SEND_TIMEVAL = struct.pack("ll", 5, 0)
DRAIN_STEPS_MAX = 16
"""A pipe holds one step; what was left in the background may go on writing."""


class Connection:
    """Somebody who sends commands."""

    def __init__(self, descriptor: int, owner: socket.socket | None = None) -> None:
        self.descriptor = descriptor
        self.owner = owner
        self.received = b""
        self.running: dict[int, Running] = {}

    def say(self, **words: Any) -> None:
        """Write a line, waiting for the other side to take it; one that is gone misses it."""
        line = memoryview(json.dumps(words).encode() + b"\n")
        try:
            while line:
                line = line[os.write(self.descriptor, line) :]
        except OSError:
            self.break_off()

    def break_off(self) -> None:
        """Say no more, as half a line may be out; what was left to read ends."""
        self.descriptor = -1
        if self.owner is not None:
            with contextlib.suppress(OSError):
                self.owner.shutdown(socket.SHUT_RDWR)


class Running:
    """A command that was started."""

    def __init__(self, connection: Connection, number: int, order: dict[str, Any]) -> None:
        self.connection = connection
        self.number = number
        self.process = subprocess.Popen(
            order["argv"],
            env={**os.environ, **order["environment"]},
            cwd=order["folder"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.output = self.process.stdout
        os.set_blocking(self.output.fileno(), False)
        self.deadline = time.monotonic() + order["seconds_max"]
        self.was_cut = False

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def pass_output_on(self) -> bool:
        """Send on what the command wrote; False when there is no more of it."""
        try:
            data = os.read(self.output.fileno(), OUTPUT_STEP_BYTES)
        except BlockingIOError:
            return False
        if data:
            self.connection.say(output=self.number, data=base64.b64encode(data).decode())
        return bool(data)


class Runner:
    """All connections and all that runs for them."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.by_pid: dict[int, Running] = {}
        woken, waker = os.pipe()
        os.set_blocking(waker, False)
        os.set_blocking(woken, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        self.selector.register(woken, selectors.EVENT_READ, lambda: self.reap(woken))

    def open_port(self) -> None:
        """Open the virtio-serial port; it can be opened only once."""
        (name,) = os.listdir("/sys/class/virtio-ports")  # noqa: PTH208 - pathlib loads slowly
        self.add(Connection(os.open(f"/dev/{name}", os.O_RDWR)))

    def listen(self) -> None:
        listener = socket.create_server(("", TCP_PORT))

        def accept() -> None:
            accepted, _ = listener.accept()
            # Somebody whose link was pulled must not keep us from serving the others.
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, SEND_TIMEVAL)
            self.add(Connection(accepted.fileno(), accepted))

        self.selector.register(listener, selectors.EVENT_READ, accept)

    def add(self, connection: Connection) -> None:
        descriptor = connection.descriptor
        self.selector.register(
            descriptor, selectors.EVENT_READ, lambda: self.receive(connection, descriptor)
        )
        connection.say(ready=os.uname().release)

    def receive(self, connection: Connection, descriptor: int) -> None:
        try:
            data = os.read(descriptor, OUTPUT_STEP_BYTES)
        except OSError:
            data = b""
        if not data:
            self.selector.unregister(descriptor)
            self.close(connection)
            return
        *lines, connection.received = (connection.received + data).split(b"\n")
        for line in lines:
            order = json.loads(line)
            if "start" in order:
                self.start(connection, order)
            elif order["end"] in connection.running:
                connection.running[order["end"]].kill()

    def close(self, connection: Connection) -> None:
        connection.break_off()
        for running in connection.running.values():
            running.kill()
        if connection.owner is not None:
            connection.owner.close()

    def start(self, connection: Connection, order: dict[str, Any]) -> None:
        number = order["start"]
        try:
            running = Running(connection, number, order)
        except OSError as error:
            text = base64.b64encode(f"{order['argv'][0]}: {error}\n".encode()).decode()
            connection.say(output=number, data=text)
            connection.say(ended=number, status=DOES_NOT_START)
            return
        self.by_pid[running.process.pid] = running
        connection.running[number] = running

        def output() -> None:
            # It may have ended since this round of events was asked for.
            if not running.output.closed and not running.pass_output_on():
                self.selector.unregister(running.output)

        self.selector.register(running.output, selectors.EVENT_READ, output)

    def reap(self, woken: int) -> None:
        """Take the status of every child that ended, orphans included: we are process 1."""
        with contextlib.suppress(BlockingIOError):
            os.read(woken, 4096)
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid in self.by_pid:
                    self.finish(self.by_pid.pop(pid), os.waitstatus_to_exitcode(status))

    def finish(self, running: Running, status: int) -> None:
        for _ in range(DRAIN_STEPS_MAX):
            if not running.pass_output_on():
                break
        if running.output in self.selector.get_map():
            self.selector.unregister(running.output)
        running.output.close()
        running.process.returncode = status
        del running.connection.running[running.number]
        shown = CUT if running.was_cut else 128 - status if status < 0 else status
        running.connection.say(ended=running.number, status=shown)

    def cut_what_is_late(self) -> float | None:
        """Kill what ran too long; return the seconds until the next deadline."""
        now = time.monotonic()
        waiting = [each for each in self.by_pid.values() if not each.was_cut]
        for running in waiting:
            if running.deadline <= now:
                running.was_cut = True
                running.kill()
        return min((max(0.0, each.deadline - now) for each in waiting), default=None)

    def serve(self) -> None:
        while True:
            for key, _ in self.selector.select(self.cut_what_is_late()):
                key.data()


def main() -> None:
    with open("/run/booted/environment.json") as file:  # noqa: PTH123 - pathlib loads slowly
        environment = json.load(file)
    os.environ.clear()
    os.environ.update(environment)
    runner = Runner()
    runner.open_port()
    runner.listen()
    runner.serve()


if __name__ == "__main__":
    main()
