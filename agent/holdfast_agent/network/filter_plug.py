"""The output plug inside QEMU: two redirectors and a wall on each tap. Talks QMP and two sockets.

For each NIC three net filters are added to its netdev while the guest runs (`queue=rx`: what the
guest sends). A packet meets them in this order:

    guest -> out (filter-redirector into our socket)
          -> wall (filter-redirector into /dev/null)
          -> in  (filter-redirector from our other socket) -> tap

While held, `out` takes every packet to us and nothing reaches the wall. An epoch ends with a mark
in what we hold: everything the guest sent before it stood still is in the socket when `stop` is
answered, as QEMU writes it there before it goes on. Released frames are written to `in` as they
came, and go on from there to the tap. So neither closing an epoch nor releasing one costs a QMP
command (a `qom-set` costs half a millisecond, see `hypervisor/qmp.py`), and the socket of `out`
is the signal that output waits.

The wall is for our death. When `out` loses its socket it lets packets pass on, and they end at the
wall: dropped, as a network may, and for good, until a new holder decides. (QEMU's `filter-buffer`
instead lets everything go once its interval, at most 71 minutes of guest time, has passed.)

Hence the orders of switching: `out` on, then wall on; and wall off, then `out` off.

Not with vhost, not with several queues: QEMU refuses filters there. A packet flagged raw (QEMU's
own announcements) loses its flag on the way through: announce before the plug is installed.

Source: QEMU 7.2, `net/filter.c`, `net/filter-mirror.c`. At most two epochs are held.
"""

import contextlib
import fcntl
import select
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from holdfast_agent.core.failures import VirtualMachineFailed
from holdfast_agent.hypervisor.qmp import QmpConnection
from holdfast_agent.network.held_output import HELD_LIMIT_BYTES, HeldOutput
from holdfast_agent.network.output_signal import HeldOutputSignal

SOCKET_BUFFER_BYTES = 8 << 20
"""QEMU's main thread waits while `out` is full: enough for what a guest sends between drains."""
RECEIVE_BYTES = 1 << 18
FLUSH_TIMEOUT_S = 2.0
SO_SNDBUFFORCE = 32
WALL_PREFIX = "hfw-"
"""Of the names of walls: a wall in QEMU that nobody holds is what a dead holder left."""
SIOCOUTQ = 0x5411


@dataclass
class _Tap:
    """The plug of one NIC."""

    netdev_id: str
    held: HeldOutput
    out: socket.socket | None = None
    into: socket.socket | None = None
    pending: bytearray = field(default_factory=bytearray)
    """Released frames that QEMU has not taken yet."""

    @property
    def out_id(self) -> str:
        return f"hfo-{self.netdev_id}"

    @property
    def wall_id(self) -> str:
        return f"{WALL_PREFIX}{self.netdev_id}"

    @property
    def in_id(self) -> str:
        return f"hfi-{self.netdev_id}"


class FilterPlug:
    """Port `OutputPlug`: holds the output of the given netdevs of one QEMU."""

    name = "filter"

    def __init__(
        self, qmp: QmpConnection, netdev_ids: Sequence[str], *, limit_bytes: int = HELD_LIMIT_BYTES
    ) -> None:
        """Prepare; nothing is changed in QEMU before `install`."""
        self._qmp = qmp
        self._taps = [_Tap(netdev_id, HeldOutput(limit_bytes)) for netdev_id in netdev_ids]
        self._epoll = select.epoll()
        self._installed = False
        self._holding = False
        self.leftover_held = False
        """An earlier holder was holding when it went; nothing leaves until hold or release_all."""
        self.signal = HeldOutputSignal(self._epoll.fileno, self.drain)

    # --- setting up -------------------------------------------------------------------------------

    def install(self) -> None:
        """Set up, letting output flow; after an earlier holder's death it stays closed.

        Raises VirtualMachineFailed; what was added is then taken out, but a leftover wall stays.
        """
        assert not self._installed, "installed already"
        self._installed = True
        try:
            for tap in self._taps:
                self._install_one(tap)
        except VirtualMachineFailed:
            self.remove()
            raise
        self._qmp.attend(self._epoll.fileno(), self.drain)

    def _install_one(self, tap: _Tap) -> None:
        present = {entry["name"] for entry in self._qmp.execute("qom-list", {"path": "/objects"})}
        walled = tap.wall_id in present and self._status(tap.wall_id) == "on"
        self.leftover_held = self.leftover_held or walled
        for name in (tap.out_id, tap.in_id):
            self._delete(name, is_filter=name in present)
        if tap.wall_id not in present:
            self._add_chardev(tap.wall_id, {"type": "file", "data": {"out": "/dev/null"}})
            self._add_filter(tap.netdev_id, tap.wall_id, "off", {"position": "head"})
        tap.out = self._add_socket(tap.out_id)
        behind_wall = {"position": f"id={tap.wall_id}", "insert": "behind"}
        self._add_filter(tap.netdev_id, tap.out_id, "on" if walled else "off", behind_wall)
        tap.into = self._add_socket(tap.in_id)
        self._add_filter(tap.netdev_id, tap.in_id, "on", {"position": "head"}, direction="indev")
        self._epoll.register(tap.out, select.EPOLLIN)
        self._epoll.register(tap.into, 0)

    def _status(self, filter_id: str) -> str:
        path = {"path": f"/objects/{filter_id}", "property": "status"}
        return str(self._qmp.execute("qom-get", path))

    def _add_chardev(self, chardev_id: str, backend: dict[str, object]) -> None:
        with contextlib.suppress(VirtualMachineFailed):
            self._qmp.execute("chardev-remove", {"id": chardev_id})
        self._qmp.execute("chardev-add", {"id": chardev_id, "backend": backend})

    def _add_socket(self, chardev_id: str) -> socket.socket:
        """Give QEMU one end of a new socket pair as a chardev; returns the other."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            for end in (ours, theirs):
                end.settimeout(0)
                _enlarge(end)
            self._qmp.execute("getfd", {"fdname": chardev_id}, fds=(theirs.fileno(),))
            address = {"type": "fd", "data": {"str": chardev_id}}
            backend: dict[str, object] = {
                "type": "socket",
                "data": {"addr": address, "server": False},
            }
            try:
                self._add_chardev(chardev_id, backend)
            except VirtualMachineFailed:
                ours.close()
                raise
        return ours

    def _add_filter(
        self,
        netdev_id: str,
        filter_id: str,
        status: str,
        place: dict[str, str],
        *,
        direction: str = "outdev",
    ) -> None:
        self._qmp.execute(
            "object-add",
            {
                "qom-type": "filter-redirector",
                "id": filter_id,
                "netdev": netdev_id,
                "queue": "rx",
                direction: filter_id,
                "status": status,
                **place,
            },
        )

    def _delete(self, name: str, *, is_filter: bool = True) -> None:
        commands = [("object-del", name)] if is_filter else []
        for command, target in (*commands, ("chardev-remove", name)):
            with contextlib.suppress(VirtualMachineFailed):
                self._qmp.execute(command, {"id": target})

    # --- holding and releasing --------------------------------------------------------------------

    def hold(self) -> None:
        """From now on nothing leaves (INV-7): the first epoch begins."""
        assert self._installed, "install first"
        self._holding = True
        self._switch([("on", tap.out_id) for tap in self._taps])
        self._switch([("on", tap.wall_id) for tap in self._taps])
        self.leftover_held = False

    def close_epoch(self) -> None:
        """Close the current epoch and open the next; the guest stands still."""
        self._receive()
        for tap in self._taps:
            tap.held.close_epoch()

    def reopen_epoch(self) -> None:
        """Make the epoch closed last, if any is, part of the one that runs."""
        for tap in self._taps:
            tap.held.reopen_epoch()

    def release_one(self) -> None:
        """Let the closed epoch's output go; the open epoch's stays. Does not wait for QEMU."""
        for tap in self._taps:
            tap.pending += tap.held.take_closed()
            self._pump(tap)

    def release_all(self) -> None:
        """Let everything go and hold nothing more."""
        self._switch([("off", tap.wall_id) for tap in self._taps])
        self._switch([("off", tap.out_id) for tap in self._taps])
        self._holding = self.leftover_held = False
        self._receive()
        for tap in self._taps:
            tap.pending += tap.held.take_all()
            self._pump(tap)

    def _switch(self, changes: Sequence[tuple[str, str]]) -> None:
        tickets = [
            self._qmp.queue(
                "qom-set", {"path": f"/objects/{name}", "property": "status", "value": status}
            )
            for status, name in changes
        ]
        for ticket in tickets:
            self._qmp.wait(ticket)

    def held_bytes(self) -> int:
        """Bytes of output that wait, as far as known."""
        return sum(tap.held.held_bytes for tap in self._taps)

    def dropped_packets(self) -> int:
        """Packets dropped because too much was held."""
        return sum(tap.held.dropped_packets for tap in self._taps)

    def change_limit(self, limit_bytes: int) -> None:
        """Hold at most so much of each NIC from now on."""
        for tap in self._taps:
            tap.held.change_limit(limit_bytes)

    # --- the sockets ------------------------------------------------------------------------------

    def drain(self) -> int:
        """Take in what the guest sent, and go on with what QEMU could not take; never waits.

        Returns the bytes of output seen.
        """
        for tap in self._taps:
            if tap.pending:
                self._pump(tap)
        return self._receive()

    def _receive(self) -> int:
        total = 0
        for tap in self._taps:
            while tap.out is not None:
                try:
                    data = tap.out.recv(RECEIVE_BYTES)
                except BlockingIOError:
                    break
                except ConnectionResetError:
                    data = b""
                if not data:
                    self._lose(tap)
                    break
                tap.held.feed(data)
                total += len(data)
                if len(data) < RECEIVE_BYTES:
                    break
        return total

    def _pump(self, tap: _Tap) -> None:
        if tap.into is None:
            tap.pending.clear()
            return
        try:
            while tap.pending:
                sent = tap.into.send(tap.pending)
                del tap.pending[:sent]
        except BlockingIOError:
            self._epoll.modify(tap.into, select.EPOLLOUT)
            return
        except (BrokenPipeError, ConnectionResetError):
            self._lose(tap)
            return
        self._epoll.modify(tap.into, 0)

    def _lose(self, tap: _Tap) -> None:
        """QEMU closed its end, which it does when it ends: nothing will be sent any more."""
        for end in (tap.out, tap.into):
            if end is not None:
                with contextlib.suppress(OSError, ValueError):
                    self._epoll.unregister(end)
                end.close()
        tap.out = tap.into = None
        tap.pending.clear()

    def _settle(self) -> None:
        """Wait until QEMU has read what was released, so that removing `in` loses nothing."""
        deadline = time.monotonic() + FLUSH_TIMEOUT_S
        for tap in self._taps:
            while self._unread(tap) and time.monotonic() < deadline:
                time.sleep(0.0005)

    def _unread(self, tap: _Tap) -> bool:
        """Tell whether QEMU has still to read released frames; sends what it can."""
        self._pump(tap)
        return tap.into is not None and bool(tap.pending or _unread_bytes(tap.into))

    # --- taking down ------------------------------------------------------------------------------

    def remove(self) -> None:
        """Take everything out, after `release_all`. Idempotent.

        While output is held, the filters stay in QEMU, closed, and only our ends go.
        """
        if not self._installed:
            return
        if not (self._holding or self.leftover_held):
            self._settle()
            for tap in self._taps:
                for name in (tap.out_id, tap.in_id, tap.wall_id):
                    self._delete(name)
        self.close()

    def discard(self) -> None:
        """The VM is gone, and all that was in its QEMU: let go. Idempotent."""
        self.close()

    def close(self) -> None:
        """Let go without a word to QEMU: what is held is dropped, the wall stands. Idempotent."""
        self._installed = False
        if not self._epoll.closed:
            self._qmp.neglect(self._epoll.fileno())
            for tap in self._taps:
                self._lose(tap)
            self._epoll.close()


class UnbufferedPlug:
    """Port `OutputPlug` that holds nothing. UNSAFE: for measuring what holding costs."""

    name = "unbuffered"
    leftover_held = False

    def install(self) -> None:
        """Do nothing."""

    def hold(self) -> None:
        """Do nothing: output leaves at once."""

    def close_epoch(self) -> None:
        """Do nothing."""

    def reopen_epoch(self) -> None:
        """Do nothing."""

    def release_one(self) -> None:
        """Do nothing."""

    def release_all(self) -> None:
        """Do nothing."""

    def held_bytes(self) -> int:
        """Nothing ever waits."""
        return 0

    def dropped_packets(self) -> int:
        """Nothing is ever dropped."""
        return 0

    def change_limit(self, limit_bytes: int) -> None:
        """Do nothing."""

    def discard(self) -> None:
        """Do nothing."""

    def remove(self) -> None:
        """Do nothing."""


def _enlarge(end: socket.socket) -> None:
    try:
        end.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, SOCKET_BUFFER_BYTES)
    except PermissionError:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)


def _unread_bytes(end: socket.socket) -> int:
    """Return the bytes sent on `end` that its peer has not read (what they occupy)."""
    (count,) = struct.unpack("i", fcntl.ioctl(end, SIOCOUTQ, bytes(4)))
    return int(count)
