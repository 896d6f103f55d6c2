"""The output plug in the kernel: each tap's output passes an IFB whose root qdisc is `plug`.

Talks rtnetlink and packet sockets; see `qdisc_links` for the path and `qdisc_netlink` for the
switching. One thread uses it; not thread-safe. Works with vhost and with any number of queues.

The qdisc keeps packets in one queue and three counts, which can be switched but not read:

    [ to release ][ last epoch ][ current epoch ]
    BUFFER              last epoch = current epoch; current epoch = 0
    RELEASE_ONE         to release += last epoch; last epoch = 0
    RELEASE_INDEFINITE  all of it goes, and all that comes

Counts that are lost are lost for good: a second BUFFER before RELEASE_ONE forgets the packets of
the older epoch, and from then on every release ends too early in the queue. So a queue whose counts
may not be what we believe is never counted on again: from the end of the epoch on, what the guest
sends goes to a fresh one (its *successor*), and the old queue, which then holds exactly what that
epoch and earlier ones left, is let go as a whole. It is so after an epoch that was reopened, after
a switch that failed, and with what an earlier holder left behind.

    INV-2  released <= acknowledged: an epoch's packets are never in a queue that is let go as a
           whole before that epoch is acknowledged, nor counted into an earlier one

The kernel switches without its queue's lock. Hence:

* BUFFER while the guest stands still, and holding begins by aiming the tap at a queue that was
  empty and closed, not by closing one through which packets flow;
* RELEASE_ONE when what was released before has left (`_Nic.released_bytes`): else the two updates
  of one count could meet, and a packet too many would leave.

When we die everything stays: the queue holds, and packets that find it full or gone are dropped.
Source: Linux 6.1, `net/sched/sch_plug.c`; `Remus` (NSDI 2008) section 3.3.
"""

import contextlib
import errno
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from holdfast_agent.core.failures import VirtualMachineFailed
from holdfast_agent.network.output_signal import HeldOutputSignal
from holdfast_agent.network.qdisc_links import Found, Ifb
from holdfast_agent.network.qdisc_netlink import (
    NO_STATISTICS,
    PlugAction,
    PlugStatistics,
    look_message,
    switch_message,
)

LOGGER = logging.getLogger(__name__)
NO_PLUG_OF_OURS = frozenset({errno.ENODEV, errno.ENOENT, errno.EEXIST, errno.EINVAL})
"""The interface, or its qdisc of our handle, is not there."""
LEAVE_SECONDS = 0.05
"""A released epoch leaves in microseconds a packet; one that takes longer is let go later."""
FLUSH_SECONDS = 1.0
RETRY_SECONDS = 0.005
"""A release that met the end of an earlier one in the kernel is repeated after this."""
POLL_SECONDS = 0.0002
FRESH_SECONDS = 0.001
"""Statistics younger than this are not asked for again."""


class Links(Protocol):
    """`qdisc_links.PlugLinks`, or what takes its place."""

    def find(self, tap: str) -> Found:
        """Return what an earlier holder left."""

    def prepare(self, tap: str) -> bool:
        """Give `tap` an ingress qdisc; return whether it is ours."""

    def make(self, tap: str, limit_bytes: int, *, is_ingress_ours: bool) -> Ifb:
        """Make an IFB whose plug holds."""

    def aim(self, tap: str, ifb: Ifb) -> None:
        """Let all that arrives on `tap` go to `ifb`."""

    def release(self, tap: str) -> None:
        """Let what arrives on `tap` go straight on."""

    def delete(self, ifb: Ifb) -> None:
        """Remove an IFB and drop what it holds."""

    def restore(self, tap: str) -> None:
        """Take the ingress qdisc of ours off."""

    def clear(self, tap: str) -> None:
        """Take out everything of ours."""

    def close(self) -> None:
        """Close the socket."""


class Switches(Protocol):
    """`qdisc_netlink.PlugSocket`, or what takes its place."""

    def exchange(self, messages: Sequence[bytes]) -> list[PlugStatistics]:
        """Send the messages together; return the statistics that answer each."""

    def close(self) -> None:
        """Close the socket."""


class Senses(Protocol):
    """`packet_sense.PacketSense`, or what takes its place."""

    def fileno(self) -> int:
        """Return a descriptor that is readable when packets, or the time to look, have come."""

    def open(self, taps: Iterable[str]) -> None:
        """Begin to watch the taps."""

    def drain(self) -> bool:
        """Take in what has come; return whether there was anything."""

    def rest(self) -> None:
        """Output is known to wait: look again a little later, whatever comes."""

    def listen(self) -> None:
        """Say so when the next packet comes."""

    def close(self) -> None:
        """Close everything."""


@dataclass
class _Nic:
    """The plug of one NIC."""

    tap: str
    is_ingress_ours: bool = False
    current: Ifb | None = None
    """Takes what the guest sends; None: it goes straight on."""
    spare: Ifb | None = None
    """Empty, holding, and nothing is aimed at it."""
    predecessors: list[Ifb] = field(default_factory=list)
    """Hold what is older than all in `current`, oldest first; let go as a whole."""
    is_counted: bool = False
    """The counts of `current` in the kernel are what we believe."""
    is_marked: bool = False
    """BUFFER was sent to `current` for the epoch that is closed."""
    marked: PlugStatistics = NO_STATISTICS
    """`current` at that BUFFER."""
    released_bytes: int = 0
    """Of all that entered `current`, so much has been let go."""
    seen_bytes: int = 0
    """Of all that entered `current`, so much was told by the signal or closed."""
    last: PlugStatistics = NO_STATISTICS
    dropped_before: int = 0
    """Dropped by predecessors that are gone."""
    buffer_message: bytes = b""
    release_message: bytes = b""
    look_message: bytes = b""
    """To `current`, made beforehand: a pause waits for them."""

    def ifbs(self) -> list[Ifb]:
        """Return all IFBs, those that may hold packets oldest first."""
        young = [ifb for ifb in (self.current, self.spare) if ifb is not None]
        return [*self.predecessors, *young]


class QdiscPlug:
    """Port `OutputPlug`: holds the output of the given taps of one QEMU."""

    name = "qdisc"

    def __init__(
        self,
        taps: Sequence[str],
        *,
        limit_bytes: int,
        links: Links,
        switches: Switches,
        sense: Senses,
        wait: Callable[[float], None] = time.sleep,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; nothing is changed before `install`. Owns links, switches and sense."""
        self._nics = [_Nic(tap) for tap in taps]
        self._limit_bytes = limit_bytes
        self._links = links
        self._switches = switches
        self._sense = sense
        self._wait = wait
        self._now = now
        self._installed = False
        self._holding = False
        self._epoch_closed = False
        self._looked_at = float("-inf")
        self.leftover_held = False
        """An earlier holder was holding when it went; nothing leaves until hold or release_all."""
        self.signal = HeldOutputSignal(self._sense.fileno, self.drain)

    # --- setting up -------------------------------------------------------------------------------

    def install(self) -> None:
        """Set up, letting output flow; after an earlier holder's death it stays closed.

        Raises VirtualMachineFailed; what was added is then taken out, but leftovers stay as they
        are.
        """
        assert not self._installed, "installed already"
        self._installed = True
        try:
            for nic in self._nics:
                found = self._links.find(nic.tap)
                nic.predecessors = list(found.older)
                nic.current = found.aimed
                for ifb in found.younger:
                    self._links.delete(ifb)
                self.leftover_held = self.leftover_held or found.aimed is not None
            for nic in self._nics:
                nic.is_ingress_ours = self._links.prepare(nic.tap)
                nic.spare = self._make(nic)
        except BaseException:
            self._withdraw()
            raise

    def _make(self, nic: _Nic) -> Ifb:
        return self._links.make(nic.tap, self._limit_bytes, is_ingress_ours=nic.is_ingress_ours)

    def _withdraw(self) -> None:
        """Undo an installation that failed; where something is held, it stays held."""
        for nic in self._nics:
            if nic.spare is not None:
                self._links.delete(nic.spare)
                nic.spare = None
            if nic.current is None and nic.is_ingress_ours:
                self._links.restore(nic.tap)
        self.close()

    # --- holding and releasing --------------------------------------------------------------------

    def hold(self) -> None:
        """From now on nothing leaves (INV-7): the first epoch begins.

        What an earlier holder left belongs to it. Raises VirtualMachineFailed.
        """
        assert self._installed, "install first"
        self._holding = True
        self._epoch_closed = False
        self._sense.open(nic.tap for nic in self._nics)
        for nic in self._nics:
            self._succeed(nic)
        self.leftover_held = False

    def close_epoch(self) -> None:
        """Close the current epoch and open the next; the guest stands still.

        Raises VirtualMachineFailed: the epoch is to be reopened.
        """
        assert self._holding, "captured before output was held (INV-7)"
        assert not self._epoch_closed, "a second epoch was closed before the first was released"
        self._epoch_closed = True
        marking = [nic for nic in self._nics if nic.is_counted]
        for nic in self._nics:
            nic.is_marked = nic.is_counted
        try:
            answers = self._switches.exchange([nic.buffer_message for nic in marking])
        except OSError as error:
            raise VirtualMachineFailed(f"the epoch's output is not closed off: {error}") from error
        for nic, statistics in zip(marking, answers, strict=True):
            nic.marked = statistics
            nic.seen_bytes = statistics.entered_bytes
        if len(marking) < len(self._nics):
            for nic in self._nics:
                if not nic.is_counted:
                    self._succeed(nic)

    def reopen_epoch(self) -> None:
        """Make the epoch closed last, if it was not released, part of the one that runs.

        A BUFFER cannot be taken back: the queue that got one is let go as a whole later.
        """
        for nic in self._nics:
            if nic.is_marked:
                nic.is_counted = False
        self._epoch_closed = False

    def release_one(self) -> None:
        """Let the closed epoch's output go; the open epoch's stays. Raises nothing.

        What cannot be let go now leaves with a later epoch.
        """
        assert self._epoch_closed, "no epoch is closed"
        self._epoch_closed = False
        ready = []
        for nic in self._nics:
            is_marked, nic.is_marked = nic.is_marked, False
            try:
                has_left = self._let_go(nic, LEAVE_SECONDS) and self._has_left(nic)
            except (OSError, VirtualMachineFailed) as error:
                self._distrust([nic], error)
                continue
            if is_marked and not has_left:
                nic.is_counted = False
            elif is_marked and nic.marked.held_packets:
                nic.released_bytes = nic.marked.entered_bytes
                ready.append(nic)
        try:
            self._switches.exchange([nic.release_message for nic in ready])
        except OSError as error:
            self._distrust(ready, error)
        self._sense.listen()

    def release_all(self) -> None:
        """Let everything go and hold nothing more. Raises VirtualMachineFailed.

        Packets keep their order: what was held has left before the tap goes its straight way.
        """
        self._epoch_closed = False
        self._sense.open(())
        try:
            for nic in self._nics:
                nic.is_counted = nic.is_marked = False
                if nic.current is not None:
                    nic.predecessors.append(nic.current)
                    nic.current = None
                self._let_go(nic, FLUSH_SECONDS, delete=False)
                self._links.release(nic.tap)
        except OSError as error:
            raise VirtualMachineFailed(f"held output cannot be let go: {error}") from error
        self._holding = self.leftover_held = False

    def _succeed(self, nic: _Nic) -> None:
        """Begin a fresh queue; what the old one holds is older than all in it."""
        fresh = nic.spare if nic.spare is not None else self._make(nic)
        nic.spare = fresh
        self._links.aim(nic.tap, fresh)
        nic.spare = None
        if nic.current is not None:
            nic.predecessors.append(nic.current)
        nic.current = fresh
        nic.buffer_message = switch_message(fresh.index, PlugAction.BUFFER)
        nic.release_message = switch_message(fresh.index, PlugAction.RELEASE_ONE)
        nic.look_message = look_message(fresh.index)
        nic.is_counted = True
        nic.released_bytes = nic.seen_bytes = 0
        nic.dropped_before += nic.last.dropped_packets
        nic.last = NO_STATISTICS

    def _let_go(self, nic: _Nic, seconds: float, *, delete: bool = True) -> bool:
        """Let go what the predecessors hold, oldest first; return whether all of it has left.

        A release can meet the end of an earlier one in the kernel and be lost: it is repeated.
        """
        deadline = self._now() + seconds
        for ifb in tuple(nic.predecessors):
            repeat_at = float("-inf")
            while True:
                if self._now() >= repeat_at:
                    repeat_at = self._now() + RETRY_SECONDS
                    action = switch_message(ifb.index, PlugAction.RELEASE_INDEFINITE)
                    statistics = self._ask(action)
                else:
                    statistics = self._ask(look_message(ifb.index))
                if not statistics.held_packets:
                    break
                if self._now() > deadline:
                    LOGGER.warning("%s: held output of %s leaves slowly", ifb.name, nic.tap)
                    return False
                self._wait(POLL_SECONDS)
            if delete:
                self._links.delete(ifb)
                nic.predecessors.remove(ifb)
        return True

    def _ask(self, message: bytes) -> PlugStatistics:
        """Send one message to a queue; one that somebody took away or replaced holds nothing."""
        try:
            (statistics,) = self._switches.exchange([message])
        except OSError as error:
            if error.errno not in NO_PLUG_OF_OURS:
                raise
            LOGGER.warning("a plug was taken away by somebody: %s", error)
            return NO_STATISTICS
        return statistics

    def _has_left(self, nic: _Nic) -> bool:
        """Tell whether what was released before has left the queue; waits a little for it."""
        if nic.current is None or nic.marked.sent_bytes >= nic.released_bytes:
            return True
        deadline = self._now() + LEAVE_SECONDS
        while True:
            (statistics,) = self._switches.exchange([nic.look_message])
            if statistics.sent_bytes >= nic.released_bytes:
                return True
            if self._now() > deadline:
                LOGGER.warning("released output of %s leaves slowly", nic.tap)
                return False
            self._wait(POLL_SECONDS)

    def _distrust(self, nics: Iterable[_Nic], error: Exception) -> None:
        for nic in nics:
            LOGGER.warning("output of %s was not released, it leaves later: %s", nic.tap, error)
            nic.is_counted = False

    # --- what is held -----------------------------------------------------------------------------

    def change_limit(self, limit_bytes: int) -> None:
        """Hold at most so much of each NIC from now on."""
        if limit_bytes == self._limit_bytes:
            return
        self._limit_bytes = limit_bytes
        ifbs = [ifb for nic in self._nics for ifb in nic.ifbs()]
        try:
            self._switches.exchange(
                [switch_message(ifb.index, PlugAction.LIMIT, limit_bytes) for ifb in ifbs]
            )
        except OSError as error:
            LOGGER.warning("the limit of held output was not changed: %s", error)

    def held_bytes(self) -> int:
        """Bytes of output that wait, as of a moment ago; 0 while nothing is held."""
        if not self._holding:
            return 0
        if self._now() - self._looked_at >= FRESH_SECONDS:
            self._look()
        return sum(nic.last.held_bytes for nic in self._nics)

    def dropped_packets(self) -> int:
        """Packets dropped because too much was held, as of the last look."""
        return sum(nic.dropped_before + nic.last.dropped_packets for nic in self._nics)

    def drain(self) -> int:
        """Return the bytes of output that came since the last time or the epoch's end."""
        if not self._sense.drain() or not self._holding:
            return 0
        self._look()
        grown_bytes = 0
        for nic in self._nics:
            grown_bytes += max(0, nic.last.entered_bytes - nic.seen_bytes)
            nic.seen_bytes = nic.last.entered_bytes
        if grown_bytes:
            self._sense.rest()
        else:
            self._sense.listen()
        return grown_bytes

    def _look(self) -> None:
        self._looked_at = self._now()
        nics = [nic for nic in self._nics if nic.current is not None]
        try:
            answers = self._switches.exchange([nic.look_message for nic in nics])
        except OSError as error:
            LOGGER.warning("what is held is unknown: %s", error)
            return
        for nic, statistics in zip(nics, answers, strict=True):
            nic.last = statistics

    # --- taking down ------------------------------------------------------------------------------

    def remove(self) -> None:
        """Take everything out, after `release_all`. Idempotent.

        While output is held everything stays, closed, and only our sockets go.
        """
        if not self._installed:
            return
        if not (self._holding or self.leftover_held):
            for nic in self._nics:
                with contextlib.suppress(OSError):  # what was on its way leaves first
                    self._let_go(nic, LEAVE_SECONDS)
                for ifb in nic.ifbs():
                    self._links.delete(ifb)
                nic.current, nic.spare, nic.predecessors = None, None, []
                if nic.is_ingress_ours:
                    self._links.restore(nic.tap)
        self.close()

    def discard(self) -> None:
        """The VM is gone: drop what is held and take everything out. Idempotent."""
        if not self._installed:
            return
        for nic in self._nics:
            self._links.clear(nic.tap)
        self.close()

    def close(self) -> None:
        """Let go without a word to the kernel: what is held stays held. Idempotent."""
        self._installed = False
        self._sense.close()
        self._switches.close()
        self._links.close()
