"""The network between hosts, controllers and the store: slow, cut one way or both, breaking.

`Network` says whether and when something from one party arrives at another. `SimulatedSocket` is
one end of a TCP connection between two hosts: bytes arrive in order and once, or the connection
breaks; what is sent into a cut waits, as TCP repeats it. Faults at the level of frames, which TCP
itself does not make, are made here too: a piece that comes twice, a piece of an earlier connection,
a bit that flips. Production frames must refuse all of them.
"""

import errno
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from tests.scenarios.simulation import MS
from tests.simulation.kernel import Kernel

from holdfast_agent.transport.stream import Readiness

ROOM_BYTES = 192 * 1024
REPLAYED_PIECES = 6
RESET_NOTICED_NS = 20 * MS


class Network:
    """Who reaches whom, and how fast."""

    def __init__(self, kernel: Kernel, happened: Counter[str]) -> None:
        self.kernel = kernel
        self.happened = happened
        self.blocked: Counter[tuple[str, str]] = Counter()
        self.powered_off: set[str] = set()
        self.slow: dict[str, float] = {}
        self.sockets: list[SimulatedSocket] = []
        self.old_pieces: dict[tuple[str, str], deque[bytes]] = {}
        self._healed: list[Callable[[], None]] = []

    def passes(self, source: str, target: str) -> bool:
        if source in self.powered_off or target in self.powered_off:
            return False
        return not self.blocked[source, target]

    def latency_ns(self, source: str, target: str) -> int:
        factor = max(self.slow.get(source, 1.0), self.slow.get(target, 1.0))
        return int(self.kernel.between_ns(MS // 20, 2 * MS) * factor)

    def block(self, source: str, target: str) -> None:
        self.blocked[source, target] += 1

    def unblock(self, source: str, target: str) -> None:
        self.blocked[source, target] -= 1
        if not self.blocked[source, target]:
            for end in self.live_sockets():
                if (end.host, end.other.host) == (source, target):
                    end.push()

    def live_sockets(self) -> "list[SimulatedSocket]":
        self.sockets = [end for end in self.sockets if not end.is_over]
        return self.sockets

    def connect(self, source: str, target: str) -> "tuple[SimulatedSocket, SimulatedSocket]":
        near, far = SimulatedSocket(self, source), SimulatedSocket(self, target)
        near.other, far.other = far, near
        self.sockets += [near, far]
        return near, far

    def power_off(self, host: str) -> None:
        """Everything of this host is gone; its peers hear nothing."""
        self.powered_off.add(host)
        for end in self.live_sockets():
            if end.host == host:
                end.vanish()

    def power_on(self, host: str) -> None:
        """Whoever still talks to a connection of before is told that there is none."""
        self.powered_off.discard(host)
        for end in self.live_sockets():
            if end.other.host == host and end.other.is_over:
                self.kernel.after(RESET_NOTICED_NS, end.reset)


@dataclass(frozen=True)
class End:
    """The end of a stream: nothing more comes."""

    is_reset: bool = False


@dataclass(eq=False)
class SimulatedSocket:
    """One end of a connection; a `transport.stream.Stream`."""

    network: Network
    host: str
    on_arrival: Callable[[], None] = lambda: None
    is_over: bool = False
    """Closed here, or gone with its host."""
    arrived: deque[bytes | End] = field(default_factory=deque)
    under_way: deque[tuple[int, bytes | End]] = field(default_factory=deque)
    under_way_bytes: int = 0
    damage: str = ""
    """What happens to the next piece that arrives at the other end."""

    def __post_init__(self) -> None:
        kernel = self.network.kernel
        self.other: SimulatedSocket
        self.readable = kernel.descriptor(lambda: bool(self.arrived))
        self.writable = kernel.descriptor(lambda: self.under_way_bytes < ROOM_BYTES)

    # --- the wire ---------------------------------------------------------------------------------

    def push(self) -> None:
        """Let arrive what is due."""
        now_ns = self.network.kernel.now_ns
        while self.under_way and self.under_way[0][0] <= now_ns:
            if not self.network.passes(self.host, self.other.host):
                return
            piece = self.under_way.popleft()[1]
            if isinstance(piece, bytes):
                self.under_way_bytes -= len(piece)
            self._deliver(piece)

    def _send(self, piece: bytes | End) -> None:
        kernel = self.network.kernel
        due_ns = kernel.now_ns + self.network.latency_ns(self.host, self.other.host)
        if self.under_way:
            due_ns = max(due_ns, self.under_way[-1][0])
        self.under_way.append((due_ns, piece))
        if isinstance(piece, bytes):
            self.under_way_bytes += len(piece)
        kernel.at(due_ns, self.push)

    def _deliver(self, piece: bytes | End) -> None:
        other = self.other
        if other.is_over:
            if isinstance(piece, bytes) and other.host not in self.network.powered_off:
                self.network.happened["bytes that arrive at nobody"] += 1
                self.network.kernel.after(RESET_NOTICED_NS, self.reset)
            return
        for part in self._damaged(piece):
            other.arrived.append(part)
        other.on_arrival()

    def _damaged(self, piece: bytes | End) -> Sequence[bytes | End]:
        if isinstance(piece, End):
            return (piece,)
        pieces = self.network.old_pieces.setdefault((self.host, self.other.host), deque(maxlen=64))
        damage, self.damage = self.damage, ""
        if damage == "doubled":
            self.network.happened["frame doubled"] += 1
            return (piece, piece)
        if damage == "flipped":
            self.network.happened["bit flipped"] += 1
            place = self.network.kernel.random.randrange(len(piece))
            return (piece[:place] + bytes([piece[place] ^ 1]) + piece[place + 1 :],)
        if damage == "replayed":
            old = list(pieces)[:REPLAYED_PIECES]
            self.network.happened["old frames replayed"] += bool(old)
            return (*old, piece)
        pieces.append(piece)
        return (piece,)

    def reset(self) -> None:
        """The connection breaks here: what waits to be read is lost."""
        if not self.is_over:
            self.arrived.clear()
            self.arrived.append(End(is_reset=True))
            self.on_arrival()

    def vanish(self) -> None:
        self.is_over = True
        self.under_way.clear()

    def hang_up(self) -> None:
        """The process that has this end is dead: the kernel closes for it."""
        self.close()

    # --- what production code uses ----------------------------------------------------------------

    def fileno(self) -> int:
        return self.readable

    def send(self, views: Iterable[memoryview]) -> int:
        assert not self.is_over, "sent on a closed connection"
        if self.arrived and isinstance(self.arrived[-1], End) and self.arrived[-1].is_reset:
            raise ConnectionResetError(errno.ECONNRESET, "the connection is broken")
        if self.under_way_bytes >= ROOM_BYTES:
            raise BlockingIOError
        data = b"".join(views)
        self._send(data)
        return len(data)

    def receive_into(self, target: memoryview) -> int:
        if not self.arrived:
            raise BlockingIOError
        piece = self.arrived[0]
        if isinstance(piece, End):
            if piece.is_reset:
                raise ConnectionResetError(errno.ECONNRESET, "the connection is broken")
            return 0
        count = min(len(target), len(piece))
        target[:count] = piece[:count]
        if count == len(piece):
            self.arrived.popleft()
        else:
            self.arrived[0] = piece[count:]
        return count

    def wait(self, *, readable: bool, writable: bool, timeout_ms: float) -> Readiness:
        kernel = self.network.kernel
        watched = [*([self.readable] if readable else []), *([self.writable] if writable else [])]
        if timeout_ms:
            ready = kernel.wait(watched, int(timeout_ms * MS))
        else:
            ready = frozenset(number for number in watched if kernel.is_ready(number))
        return Readiness(self.readable in ready, self.writable in ready)

    def limit_silence(self, silence_limit_seconds: float) -> None:
        """There is nothing to tune."""

    def end_sending(self) -> None:
        self._send(End())

    def close(self) -> None:
        if not self.is_over:
            self._send(End())
            self.is_over = True
