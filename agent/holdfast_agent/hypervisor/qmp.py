"""One QMP connection, synchronous and pipelined. Talks to a Unix socket; blocks with deadlines.

Commands are queued and leave together in one write; QEMU runs them in order and answers in order.
That order is what the checkpoint relies on: stop, save, cont.

What a command costs is its length. QEMU's monitor reads its socket one byte at a time
(`monitor_can_read` in `monitor/monitor.c` returns 1), seven system calls each: 4-6 us a byte,
so a `qom-set` of 100 bytes costs half a millisecond before it begins to run. Hence:

- no blanks, and no `id` on commands of the capture (`brief=True`); answers are matched by order;
- `arm` sends a command without its last brace, `fire` the brace: one byte, when it matters.

The capability `oob` is asked for although no command is sent out of band: without it QEMU stops
reading the socket after each command until that one is answered (it queues at most one), with it
the monitor's thread reads the next commands while the main thread runs the first.

Events that arrive between answers are kept, the oldest falling off beyond a limit. When QEMU
ends, one last event `GONE` says so. Descriptors travel with SCM_RIGHTS, with one command.

While we wait for QEMU, QEMU may wait for us: a socket that takes the guest's packets may be full.
`attend` names such a socket and what drains it; every wait here serves it too.

Not thread-safe: one user at a time.
"""

import array
import contextlib
import errno
import json
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NewType, Self

from holdfast_agent.core.failures import (
    MonitorBusy,
    VirtualMachineFailed,
    VirtualMachineGone,
)
from holdfast_agent.hypervisor.qmp_message import parse_message, parse_object

Ticket = NewType("Ticket", int)

CONNECT_TIMEOUT_S = 5.0
"""QEMU greets at once; longer means that another client holds the monitor, or QEMU hangs."""
COMMAND_TIMEOUT_S = 30.0
"""Long enough for a `stop` that drains disks on a busy host; longer means QEMU hangs."""
LINE_LIMIT_BYTES = 8 << 20
"""The longest answer of a sound QEMU (`query-machines`, `info mtree`) is a few hundred KiB."""
EVENT_LIMIT = 1024
UNANSWERED_LIMIT = 256
"""So many answers fit into QEMU's output buffer and our socket without reading them."""
RECEIVE_BYTES = 1 << 16
DISARM = b',"arguments":{"called-off":0}}'
"""Completes a command without arguments to one that QEMU refuses: the parameter is unknown."""


@dataclass(frozen=True)
class QmpEvent:
    """Something QEMU said by itself; `GONE` is ours: QEMU ended or hung up."""

    name: str
    reason: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


class QmpConnection:
    """A negotiated QMP monitor connection; owns its socket."""

    def __init__(self, connection: socket.socket, *, timeout_s: float = COMMAND_TIMEOUT_S) -> None:
        """Take over a connected, blocking socket whose greeting was not read yet.

        Raises MonitorBusy when no greeting comes in time; the socket is then closed.
        """
        self._socket = connection
        self._timeout_s = timeout_s
        self._unsent: list[bytes] = []
        self._unanswered: deque[Ticket] = deque()
        self._answers: dict[Ticket, dict[str, Any]] = {}
        self._commands: dict[Ticket, str] = {}
        self._forgotten: set[Ticket] = set()
        self._events: deque[QmpEvent] = deque(maxlen=EVENT_LIMIT)
        self._poller = select.poll()
        self._poller.register(connection, select.POLLIN)
        self._attended: dict[int, Callable[[], object]] = {}
        self._briefs: set[Ticket] = set()
        self._armed: Ticket | None = None
        self._rest = b""
        self._last_ticket = 0
        self._gone = False
        self._is_negotiated = False
        self.version = ""
        """QEMU's version with the distribution's suffix, as it greeted us."""

    @classmethod
    def connect(cls, path: str | Path, *, timeout_s: float = CONNECT_TIMEOUT_S) -> Self:
        """Connect to the monitor socket at `path` and negotiate.

        Raises MonitorBusy when another client holds it, VirtualMachineGone when nobody listens.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout_s)
            connection.connect(str(path))
        except BlockingIOError as error:
            connection.close()
            raise MonitorBusy(f"{path}: the queue of waiting monitor clients is full") from error
        except OSError as error:
            connection.close()
            raise VirtualMachineGone(f"{path}: no QEMU answers there: {error}") from error
        connection.settimeout(None)
        qmp = cls(connection)
        try:
            qmp.negotiate(str(path), timeout_s)
        except VirtualMachineFailed:
            qmp.close()
            raise
        return qmp

    def negotiate(self, name: str, timeout_s: float) -> None:
        """Read the greeting and enter command mode; `name` stands in error messages."""
        line = self._greeting(name, time.monotonic() + timeout_s)
        try:
            greeting = parse_object(line)["QMP"]
            version = greeting["version"]["qemu"]
            self.version = "{major}.{minor}.{micro}".format_map(version)
            package = greeting["version"]["package"]
            capabilities = [offer for offer in greeting["capabilities"] if offer == "oob"]
        except (ValueError, KeyError, TypeError) as error:
            raise VirtualMachineFailed(
                f"{name}: this is not a QMP monitor: {line[:80]!r}"
            ) from error
        if package:
            self.version += f" ({package})"
        ticket = self.queue("qmp_capabilities", {"enable": capabilities})
        behind_greeting, self._rest = self._rest, b""
        self._parse(behind_greeting)
        self.wait(ticket)
        self._is_negotiated = True

    def _greeting(self, name: str, deadline: float) -> bytes:
        while b"\n" not in self._rest:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not self._readable(left_s):
                raise MonitorBusy(
                    f"{name}: busy: another monitor client holds this socket (QEMU serves one at "
                    f"a time); close it, or give QEMU a second -qmp socket for Holdfast"
                )
            try:
                data = self._socket.recv(RECEIVE_BYTES)
            except ConnectionResetError:
                data = b""
            if not data:
                raise VirtualMachineGone(f"{name}: QEMU hung up before it greeted")
            self._rest += data
            if len(self._rest) > LINE_LIMIT_BYTES:
                raise VirtualMachineFailed(f"{name}: this is not a QMP monitor")
        line, self._rest = self._rest.split(b"\n", 1)
        return line

    def attend(self, descriptor: int, serve: Callable[[], object]) -> None:
        """Call `serve` whenever `descriptor` is readable during a wait; it must drain it."""
        self._attended[descriptor] = serve
        self._poller.register(descriptor, select.POLLIN)

    def neglect(self, descriptor: int) -> None:
        """Undo `attend`. Idempotent."""
        if self._attended.pop(descriptor, None) is not None:
            self._poller.unregister(descriptor)

    # --- commands ---------------------------------------------------------------------------------

    def queue(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        fds: Sequence[int] = (),
        brief: bool = False,
    ) -> Ticket:
        """Queue a command; nothing is sent before `flush` or `wait`, unless it carries descriptors.

        Descriptors are duplicated by sending: the caller keeps and closes its own. A command with
        descriptors is sent at once, behind all that is queued. A `brief` one goes without an id.
        """
        ticket, data = self._encode(command, arguments, brief=brief)
        if fds:
            self.flush()
        self._unsent.append(data)
        if fds:
            self.flush(fds)
        return ticket

    def arm(self, command: str, arguments: Mapping[str, Any] | None = None) -> None:
        """Queue a command without its last byte; `fire` sends that byte.

        Any other command queued meanwhile calls it off.
        """
        assert self._armed is None, "one command can be armed"
        ticket, data = self._encode(command, arguments, brief=True)
        self._unsent.append(data[:-1])
        self._armed = ticket

    def arm_once(self, command: str, arguments: Mapping[str, Any] | None = None) -> None:
        """Like `arm`, unless a command is armed and not called off: it must be the same."""
        if self._armed is None:
            self.arm(command, arguments)
        assert self._armed is not None
        assert self._commands[self._armed] == command, self._commands[self._armed]

    def fire(self) -> Ticket | None:
        """Queue the last byte of the armed command; None when it was called off meanwhile."""
        ticket, self._armed = self._armed, None
        if ticket is not None:
            self._unsent.append(b"}")
        return ticket

    def disarm(self) -> None:
        """Call off the armed command, if any: what QEMU has read of it becomes a refused one."""
        ticket = self.fire()
        if ticket is not None:
            self._unsent[-1] = DISARM
            self.forget(ticket)

    def _encode(
        self, command: str, arguments: Mapping[str, Any] | None, *, brief: bool
    ) -> tuple[Ticket, bytes]:
        self.disarm()
        self._last_ticket += 1
        ticket = Ticket(self._last_ticket)
        message: dict[str, Any] = {"execute": command}
        if arguments:
            message["arguments"] = arguments
        if brief:
            self._briefs.add(ticket)
        else:
            message["id"] = ticket
        self._commands[ticket] = command
        self._unanswered.append(ticket)
        return ticket, json.dumps(message, separators=(",", ":")).encode()

    def flush(self, fds: Sequence[int] = ()) -> None:
        """Send all queued commands in one write.

        Raises VirtualMachineGone when QEMU is gone.
        """
        if not self._unsent:
            return
        if len(self._unanswered) > UNANSWERED_LIMIT:
            self._settle_oldest()
        data = b"".join(self._unsent)
        self._unsent.clear()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            sent = self._socket.sendmsg([data], rights, socket.MSG_NOSIGNAL)
            if sent < len(data):
                self._socket.sendall(data[sent:], socket.MSG_NOSIGNAL)
        except (BrokenPipeError, ConnectionResetError) as error:
            self._hung_up()
            raise VirtualMachineGone("QEMU ended or closed its monitor") from error

    def wait(self, ticket: Ticket, *, timeout_s: float | None = None) -> Any:
        """Return what the command returned; sends what is queued first.

        Raises VirtualMachineFailed with QEMU's error, or when the deadline passes (the answer is
        then dropped when it comes), VirtualMachineGone when QEMU is gone. Each ticket is good once.
        """
        command = self._commands[ticket]
        self.flush()
        if ticket not in self._answers:
            limit_s = self._timeout_s if timeout_s is None else timeout_s
            deadline = time.monotonic() + limit_s
            while ticket not in self._answers:
                if self._gone:
                    raise VirtualMachineGone(f"{command}: QEMU is gone", command=command)
                left_s = deadline - time.monotonic()
                if left_s <= 0 or not self._readable(left_s):
                    self.forget(ticket)
                    raise VirtualMachineFailed(
                        f"{command}: QEMU did not answer within {limit_s:.1f} s", command=command
                    )
                self._receive()
        answer = self._answers.pop(ticket)
        del self._commands[ticket]
        return _value_of(answer, command)

    def wait_beside(self, ticket: Ticket, descriptor: int) -> bool:
        """Wait until `descriptor` is readable; False if the command was answered before.

        The answer is not taken: `wait` for it. Raises as `wait` does.
        """
        command = self._commands[ticket]
        self.flush()
        deadline = time.monotonic() + self._timeout_s
        self.attend(descriptor, lambda: None)
        try:
            while ticket not in self._answers:
                left_s = deadline - time.monotonic()
                ready = [] if left_s <= 0 else self._poller.poll(left_s * 1000)
                if not ready:
                    raise VirtualMachineFailed(
                        f"{command}: QEMU did nothing within {self._timeout_s:.1f} s",
                        command=command,
                    )
                for one, _ in ready:
                    if one == descriptor:
                        return True
                    self._attended.get(one, self._receive)()
                if self._gone:
                    raise VirtualMachineGone(f"{command}: QEMU is gone", command=command)
        finally:
            self.neglect(descriptor)
        return False

    def take_in(self) -> None:
        """Receive what QEMU has said up to now, without waiting."""
        if not self._gone and self._readable(0):
            self._receive()

    def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        fds: Sequence[int] = (),
        timeout_s: float | None = None,
    ) -> Any:
        """Queue a command, send everything and wait for this one's answer."""
        return self.wait(self.queue(command, arguments, fds=fds), timeout_s=timeout_s)

    def human(self, command_line: str) -> str:
        """Return what the human monitor prints for `command_line`."""
        text = self.execute("human-monitor-command", {"command-line": command_line})
        return str(text).replace("\r\n", "\n")

    def forget(self, ticket: Ticket) -> None:
        """Drop the answer of a command whenever it comes; an error in it is lost."""
        if self._answers.pop(ticket, None) is None:
            self._forgotten.add(ticket)
        self._commands.pop(ticket, None)

    # --- events and the end -----------------------------------------------------------------------

    def poll_events(self) -> list[QmpEvent]:
        """Return the events that came so far, oldest first, without waiting."""
        self.take_in()
        events = list(self._events)
        self._events.clear()
        return events

    def wait_event(self, names: Sequence[str], *, timeout_s: float) -> QmpEvent | None:
        """Return the first event of one of `names`, dropping those before it; None in no time.

        `GONE` always counts as one of the names.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            while self._events:
                event = self._events.popleft()
                if event.name in names or event.name == "GONE":
                    return event
            left_s = deadline - time.monotonic()
            if self._gone or left_s <= 0 or not self._readable(left_s):
                return None
            self._receive()

    def saw_event(self, name: str) -> bool:
        """Tell whether an event of this name is among those not yet polled."""
        return any(event.name == name for event in self._events)

    def take_events(self, name: str) -> int:
        """Remove the not yet polled events of this name; returns how many there were."""
        kept = [event for event in self._events if event.name != name]
        count = len(self._events) - len(kept)
        if count:
            self._events = deque(kept, maxlen=EVENT_LIMIT)
        return count

    @property
    def gone(self) -> bool:
        """QEMU ended or hung up."""
        return self._gone

    @property
    def peer_pid(self) -> int:
        """Process id of QEMU, as the kernel knows it."""
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int(struct.unpack("3i", credentials)[0])

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when events, answers or the end arrive."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the connection; QEMU is left as it is. Idempotent."""
        self._gone = True
        with contextlib.suppress(OSError):
            self._socket.close()

    # --- below ------------------------------------------------------------------------------------

    def _readable(self, timeout_s: float) -> bool:
        """Wait until QEMU says something; serves the attended descriptors meanwhile."""
        if self._gone:
            return False
        ready = self._poller.poll(timeout_s * 1000)
        if not self._attended or not ready:
            return bool(ready)
        deadline = time.monotonic() + timeout_s
        while True:
            spoken = False
            for descriptor, _ in ready:
                serve = self._attended.get(descriptor)
                if serve is None:
                    spoken = True
                else:
                    serve()
            left_s = deadline - time.monotonic()
            if spoken or left_s <= 0:
                return spoken
            ready = self._poller.poll(left_s * 1000)

    def _receive(self) -> None:
        """Take in what is there; called when the socket is readable."""
        try:
            data = self._socket.recv(RECEIVE_BYTES)
        except OSError as error:
            if error.errno not in (errno.ECONNRESET, errno.EPIPE, errno.EBADF):
                raise
            data = b""
        if not data:
            self._hung_up()
            return
        self._parse(data)

    def _parse(self, data: bytes) -> None:
        lines = (self._rest + data).split(b"\n") if self._rest else data.split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            self._take(line)
        if len(self._rest) > LINE_LIMIT_BYTES:
            self._hung_up()
            raise VirtualMachineGone(f"QEMU sent a line of more than {LINE_LIMIT_BYTES} bytes")

    def _take(self, line: bytes) -> None:
        try:
            message = parse_message(line)
        except ValueError as error:
            self._hung_up()
            raise VirtualMachineGone(f"QEMU sent no JSON: {line[:80]!r}: {error}") from error
        name = message.get("event")
        if name is not None:
            data = message.get("data", {})
            self._events.append(QmpEvent(name, str(data.get("reason", "")), data))
            return
        if not self._is_negotiated and message.get("id") not in self._commands:
            return  # what an earlier client asked, who died before the answer
        ticket = self._unanswered.popleft() if self._unanswered else Ticket(0)
        expected = None if ticket in self._briefs else ticket
        self._briefs.discard(ticket)
        if message.get("id") != expected:
            self._hung_up()
            raise VirtualMachineGone(f"QEMU answered out of order: {line[:80]!r}, not id {ticket}")
        if ticket in self._forgotten:
            self._forgotten.discard(ticket)
        else:
            self._answers[ticket] = message

    def _settle_oldest(self) -> None:
        """Wait until few enough answers are outstanding, so that no buffer can fill up."""
        deadline = time.monotonic() + self._timeout_s
        while len(self._unanswered) > UNANSWERED_LIMIT // 2 + len(self._unsent):
            left_s = deadline - time.monotonic()
            if self._gone or left_s <= 0 or not self._readable(left_s):
                raise VirtualMachineFailed("QEMU stopped answering")
            self._receive()

    def _hung_up(self) -> None:
        if not self._gone:
            self._gone = True
            self._events.append(QmpEvent("GONE"))


def _value_of(answer: Mapping[str, Any], command: str) -> Any:
    error = answer.get("error")
    if error is None:
        return answer["return"]
    error_class = str(error.get("class", ""))
    raise VirtualMachineFailed(
        f"{command}: {error.get('desc', 'no description')} ({error_class})",
        command=command,
        error_class=error_class,
    )
