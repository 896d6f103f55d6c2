"""How two workers come together by RDMA CM: listen, ask, check, accept. Talks RDMA CM.

The backup listens on its RDMA address for one connection, and only while one is opened. It offers
address, port and a token over the connection the two already have (`moving`). The primary asks with
the token in the request's private data; whoever brings another token is refused, and after a few of
those nobody is heard any more. Private data, the same both ways:

| offset | size | field                                                          |
|--------|------|----------------------------------------------------------------|
| 0      | 4    | magic `HFRD`                                                   |
| 4      | 2    | version, 1                                                     |
| 6      | 2    | flags: 1 = words travel as immediate data                      |
| 8      | 16   | token                                                          |
| 24     | 8    | address of the ring that the sender lends to the receiver      |
| 32     | 4    | its key                                                        |
| 36     | 4    | its size                                                       |
| 40     | 2    | how many notices may be outstanding                            |

Receive requests are posted before the peer can know of the queue pair. Everything has a deadline.
Errors are OSError; RdmaMissing when this host can not do RDMA at all.

Source: rdma_connect(3), rdma_accept(3): 56 and 196 bytes of private data are let through.
"""

import contextlib
import errno
import hmac
import random
import secrets
import struct
import time
from dataclasses import dataclass, field

from holdfast_agent.core.payloads import RdmaOffer
from holdfast_agent.core.ring import RingShape
from holdfast_agent.transport.rdma.cm import CmChannel, CmEvent, CmId, CmKind
from holdfast_agent.transport.rdma.link import OwnRing, PeerRing
from holdfast_agent.transport.rdma.stream import RdmaStream
from holdfast_agent.transport.rdma.verbs import CompletionQueue, QueuePair, Region

PRIVATE_DATA = struct.Struct("<4sHH16sQIIH")
MAGIC = b"HFRD"
VERSION = 1
FLAG_IMMEDIATE = 1
TOKEN_SIZE_BYTES = 16
PORTS = range(20_000, 60_000)
PORT_TRIES = 16
REFUSALS_MAX = 4
BACKUP_SHAPE = RingShape(size_bytes=16 << 20, notice_limit=60)
PRIMARY_SHAPE = RingShape(size_bytes=256 << 10, notice_limit=60)
"""What a backup says is small."""


@dataclass
class VerbsLink:
    """Port `link.Link`: what RDMA CM brought together. Owns all of it."""

    channel: CmChannel
    id: CmId
    queue_pair: QueuePair
    has_immediate: bool
    others: list[CmId] = field(default_factory=list)
    """The listener and those it refused: they share its device, and are closed after it."""

    @property
    def sends(self) -> CompletionQueue:
        """Where finished writes and sends are found."""
        return self.queue_pair.sends

    @property
    def receives(self) -> CompletionQueue:
        """Where words that came are found."""
        return self.queue_pair.receives

    def __post_init__(self) -> None:
        """Hand the queue pair's verbs through."""
        self.write = self.queue_pair.write
        self.send = self.queue_pair.send
        self.receive = self.queue_pair.receive

    def hang_up_fileno(self) -> int:
        """Return RDMA CM's descriptor."""
        return self.channel.fileno()

    def hang_up(self) -> OSError | None:
        """Read what RDMA CM says."""
        while (event := self.channel.next_event()) is not None:
            with contextlib.closing(event):
                if event.kind is CmKind.DISCONNECTED:
                    return OSError(errno.ECONNRESET, "RDMA: the peer hung up")
                if event.kind is CmKind.DEVICE_REMOVAL:
                    return OSError(errno.ENODEV, "RDMA: the device is gone")
        return None

    def register(self, address: int, size_bytes: int) -> Region:
        """Let the NIC read this memory."""
        return Region(self.id, address, size_bytes)

    def close(self) -> None:
        """Tell the peer, and destroy everything."""
        self.id.disconnect()
        self.queue_pair.close()
        self.id.close()
        for other in self.others:
            other.close()
        self.channel.close()


@dataclass(frozen=True)
class Introduction:
    """The private data of one side."""

    token: bytes
    ring: PeerRing
    has_immediate: bool

    def encode(self) -> bytes:
        """Return the bytes."""
        return PRIVATE_DATA.pack(
            MAGIC,
            VERSION,
            FLAG_IMMEDIATE if self.has_immediate else 0,
            self.token,
            self.ring.address,
            self.ring.key,
            self.ring.shape.size_bytes,
            self.ring.shape.notice_limit,
        )

    @classmethod
    def decode(cls, data: bytes) -> "Introduction":
        """Return what a peer sent along. Raises OSError when it is no introduction."""
        if len(data) < PRIVATE_DATA.size:
            raise OSError(errno.EPROTO, f"RDMA: {len(data)} bytes of private data")
        magic, version, flags, token, address, key, size_bytes, notice_limit = (
            PRIVATE_DATA.unpack_from(data)
        )
        if magic != MAGIC or version != VERSION:
            raise OSError(errno.EPROTO, f"RDMA: private data of {magic!r} version {version}")
        shape = RingShape(size_bytes, notice_limit)
        if (fault := shape.fault()) is not None:
            raise OSError(errno.EPROTO, f"RDMA: the peer lends {fault}")
        return cls(token, PeerRing(address, key, shape), bool(flags & FLAG_IMMEDIATE))


class _Half:
    """Our half of a connection that is being made: queue pair and ring."""

    def __init__(self, cm_id: CmId, shape: RingShape, token: bytes) -> None:
        """Set up everything that can be before the peer is known. Leaves nothing on OSError."""
        self._id = cm_id
        self._token = token
        self.ring = OwnRing(shape)
        with contextlib.ExitStack() as undo:
            undo.callback(self.ring.close)
            self.has_immediate = cm_id.has_immediate
            memory, bounce = self.ring.memory, self.ring.bounce
            self.ring.region = Region(cm_id, self.ring.address, memory.nbytes, remote_write=True)
            self.ring.bounce_region = Region(cm_id, int(bounce.ctypes.data), bounce.nbytes)
            self.queue_pair = QueuePair(cm_id, self.ring.depths)
            undo.callback(self.queue_pair.close)
            self.queue_pair.to_initialised()
            self.ring.post_receives(self.queue_pair)
            undo.pop_all()

    def introduction(self) -> bytes:
        """Return the private data that tells the peer of our ring."""
        assert self.ring.region is not None
        ring = PeerRing(self.ring.address, self.ring.region.remote_key, self.ring.shape)
        return Introduction(self._token, ring, self.has_immediate).encode()

    def meet(self, peer: Introduction) -> None:
        """Get ready for this peer. iWARP's connection manager does that by itself."""
        if peer.has_immediate != self.has_immediate:
            raise OSError(errno.EPROTO, "RDMA: one side has immediate data, the other has not")
        if self.has_immediate:
            self.queue_pair.to_ready()

    def close(self) -> None:
        """Undo it."""
        self.queue_pair.close()
        self.ring.close()


class RdmaListener:
    """The backup's side until its primary has come."""

    def __init__(self, address: str) -> None:
        """Listen at our RDMA `address`. Raises RdmaMissing or OSError."""
        self._token = secrets.token_bytes(TOKEN_SIZE_BYTES)
        self._channel = CmChannel()
        self._others: list[CmId] = []
        self._half: _Half | None = None
        self._id: CmId | None = None
        self._peer: Introduction | None = None
        try:
            self._listener, port = _listen(self._channel, address)
        except BaseException:
            self._channel.close()
            raise
        self.offer = RdmaOffer(address=address, port=port, token=self._token.hex())

    def fileno(self) -> int:
        """Return the descriptor whose readability means: `advance`."""
        return self._channel.fileno()

    def advance(self) -> RdmaStream | None:
        """Take in what RDMA CM says; return the stream once the primary has come. Never waits.

        The stream owns everything then. Raises OSError when nothing will come of it.
        """
        while (event := self._channel.next_event()) is not None:
            with contextlib.closing(event):
                if event.kind is CmKind.CONNECT_REQUEST:
                    self._requested(event)
                elif event.kind is CmKind.ESTABLISHED and self._half is not None:
                    return self._stream()
                elif event.kind in (CmKind.DISCONNECTED, CmKind.DEVICE_REMOVAL):
                    raise OSError(errno.ECONNRESET, f"RDMA: {event.text}")
        return None

    def close(self) -> None:
        """Give it up. Not after a stream was returned. Idempotent."""
        if self._half is not None:
            self._half.close()
        if self._id is not None:
            self._id.close()
        for other in [*self._others, self._listener]:
            other.close()
        self._channel.close()

    def _requested(self, event: CmEvent) -> None:
        requested = self._listener.requested_by(event)
        try:
            peer = Introduction.decode(event.private_data())
            if not hmac.compare_digest(peer.token, self._token):
                raise OSError(errno.EACCES, "RDMA: the token is another one")  # noqa: TRY301
            if self._half is not None:
                raise OSError(errno.EBUSY, "RDMA: it has come already")  # noqa: TRY301
        except OSError as error:
            self._others.append(requested)
            requested.reject()
            if len(self._others) > REFUSALS_MAX:
                raise OSError(errno.EACCES, f"RDMA: {len(self._others)} refused") from error
            return
        self._id, self._peer = requested, peer
        self._half = _Half(requested, BACKUP_SHAPE, self._token)
        self._half.meet(peer)
        requested.accept(self._half.queue_pair.number, self._half.introduction())

    def _stream(self) -> RdmaStream:
        assert self._half is not None
        assert self._id is not None
        assert self._peer is not None
        link = VerbsLink(
            self._channel,
            self._id,
            self._half.queue_pair,
            self._half.has_immediate,
            [*self._others, self._listener],
        )
        return RdmaStream(link, self._half.ring, self._peer.ring)


def connect(source: str, offer: RdmaOffer, timeout_seconds: float) -> RdmaStream:
    """Return a stream to the backup that made `offer`, from our RDMA address `source`.

    Raises RdmaMissing, or OSError also when it is not there in time; nothing is left then.
    """
    deadline = time.monotonic() + timeout_seconds
    with contextlib.ExitStack() as undo:
        channel = CmChannel()
        undo.callback(channel.close)
        cm_id = CmId.new(channel)
        undo.callback(cm_id.close)
        timeout_ms = max(1, int(timeout_seconds * 1000))
        cm_id.resolve_address(source, offer.address, offer.port, timeout_ms)
        _expect(channel, deadline, CmKind.ADDRESS_RESOLVED).close()
        cm_id.resolve_route(timeout_ms)
        _expect(channel, deadline, CmKind.ROUTE_RESOLVED).close()
        token = bytes.fromhex(offer.token)
        half = _Half(cm_id, PRIMARY_SHAPE, token)
        undo.callback(half.close)
        cm_id.connect(half.queue_pair.number, half.introduction())
        # InfiniBand's manager leaves the queue pair to us, iWARP's has it connected already.
        answer = CmKind.CONNECT_RESPONSE if half.has_immediate else CmKind.ESTABLISHED
        with contextlib.closing(_expect(channel, deadline, answer)) as event:
            peer = Introduction.decode(event.private_data())
        if not hmac.compare_digest(peer.token, token):
            raise OSError(errno.EACCES, "RDMA: it is not the backup that answers")
        half.meet(peer)
        if half.has_immediate:
            cm_id.establish()
        link = VerbsLink(channel, cm_id, half.queue_pair, half.has_immediate)
        stream = RdmaStream(link, half.ring, peer.ring)
        undo.pop_all()
    return stream


def _listen(channel: CmChannel, address: str) -> tuple[CmId, int]:
    """Return an id that listens at a free port; pyverbs can not say which one port 0 became."""
    for port in random.sample(PORTS, PORT_TRIES):
        listener = CmId.new(channel)
        try:
            listener.listen(address, port)
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return listener, port
    raise OSError(errno.EADDRINUSE, f"RDMA: none of {PORT_TRIES} ports at {address} is free")


def _expect(channel: CmChannel, deadline: float, kind: CmKind) -> CmEvent:
    """Return the next event, which must be `kind`; the caller closes it. Raises OSError."""
    event = channel.next_event(max(0.0, deadline - time.monotonic()) * 1000)
    if event is None:
        raise OSError(errno.ETIMEDOUT, "RDMA: no answer in time")
    if event.kind is not kind:
        with contextlib.closing(event):
            raise OSError(errno.ECONNREFUSED, f"RDMA: {event.text}")
    return event
