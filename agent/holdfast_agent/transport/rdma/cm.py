"""RDMA CM as far as it is needed: its events, and ids that listen, ask, accept. Talks RDMA CM.

Nothing here waits but `CmChannel.next_event`, and there for no longer than it is told. Everything
must be closed: events first, else nothing they are about can be; then ids, then the channel.

Source: rdma_cm(7), rdma_connect(3).
"""

import contextlib
import errno
import ipaddress
import select
from dataclasses import dataclass
from enum import Enum
from typing import Any

from holdfast_agent.transport.rdma.binding import as_os_error, load, with_descriptor

RETRY_COUNT = 7
"""So often a lost packet is sent again; see `verbs.TIMEOUT_EXPONENT`."""


class CmKind(Enum):
    """What RDMA CM said, as far as it matters here."""

    ADDRESS_RESOLVED = "RDMA_CM_EVENT_ADDR_RESOLVED"
    ROUTE_RESOLVED = "RDMA_CM_EVENT_ROUTE_RESOLVED"
    CONNECT_REQUEST = "RDMA_CM_EVENT_CONNECT_REQUEST"
    CONNECT_RESPONSE = "RDMA_CM_EVENT_CONNECT_RESPONSE"
    ESTABLISHED = "RDMA_CM_EVENT_ESTABLISHED"
    REJECTED = "RDMA_CM_EVENT_REJECTED"
    DISCONNECTED = "RDMA_CM_EVENT_DISCONNECTED"
    DEVICE_REMOVAL = "RDMA_CM_EVENT_DEVICE_REMOVAL"
    OTHER = ""


class CmChannel:
    """What RDMA CM has to say about the connections that were made with it."""

    def __init__(self) -> None:
        """Open a channel. Raises RdmaMissing or OSError."""
        self._pyverbs = load()
        with as_os_error("opening RDMA CM"):
            self.raw, self._descriptor = with_descriptor(
                self._pyverbs.cmid.CMEventChannel, "/rdma_cm"
            )
        self._kinds: dict[int, CmKind] = {
            getattr(self._pyverbs.cm_enums, kind.value): kind
            for kind in CmKind
            if kind is not CmKind.OTHER
        }

    def fileno(self) -> int:
        """Return the descriptor that is readable when an event waits."""
        return self._descriptor

    def next_event(self, timeout_ms: float = 0) -> "CmEvent | None":
        """Return the next event, to be closed by the caller, or None if none came in time."""
        poller = select.poll()
        poller.register(self._descriptor, select.POLLIN)
        if not poller.poll(timeout_ms):
            return None
        with as_os_error("reading an event"):
            raw = self._pyverbs.cmid.CMEvent(self.raw)
        return CmEvent(raw, self._kinds.get(raw.event_type, CmKind.OTHER))

    def close(self) -> None:
        """Close it, after all that was made with it. Idempotent."""
        with contextlib.suppress(OSError), as_os_error("closing RDMA CM"):
            self.raw.close()


class CmEvent:
    """One event; `close` gives it back, without which nothing it is about can be closed."""

    def __init__(self, raw: Any, kind: CmKind) -> None:
        """Wrap it."""
        self.raw = raw
        self.kind = kind
        self.text: str = raw.event_str()
        self._is_open = True

    def private_data(self) -> bytes:
        """Return what the peer sent along; padded with zeros by the wire."""
        return bytes(self.raw.private_data or b"")

    def close(self) -> None:
        """Give it back. Idempotent."""
        if self._is_open:
            self._is_open = False
            with as_os_error("acknowledging an event"):
                self.raw.ack_cm_event()


@dataclass
class CmId:
    """One end of a connection to be, or what listens for them."""

    raw: Any
    channel: CmChannel

    @property
    def has_immediate(self) -> bool:
        """Whether its device can send immediate data: InfiniBand and RoCE can, iWARP not."""
        pyverbs = load()
        name = self.raw.context.name
        with as_os_error("listing devices"):
            devices = pyverbs.device.get_device_list()
        kinds = {_text(device.name): device.transport_type for device in devices}
        return bool(kinds.get(_text(name)) != pyverbs.enums.IBV_TRANSPORT_IWARP)

    @classmethod
    def new(cls, channel: CmChannel) -> "CmId":
        """Return one that is bound to nothing yet."""
        with as_os_error("making a connection id"):
            return cls(load().cmid.CMID(creator=channel.raw), channel)

    def listen(self, address: str, port: int) -> None:
        """Listen at our `address`. Raises OSError, EADDRINUSE among others."""
        check_address(address)
        pyverbs = load()
        with as_os_error(f"listening at {address} port {port}"):
            info = pyverbs.cmid.AddrInfo(
                src=address,
                src_service=str(port),
                port_space=pyverbs.cm_enums.RDMA_PS_TCP,
                flags=pyverbs.cm_enums.RAI_PASSIVE,
            )
            try:
                self.raw.bind_addr(info)
                self.raw.listen(1)
            finally:
                info.close()

    def requested_by(self, event: CmEvent) -> "CmId":
        """Return the id of a connection that `event` asks for."""
        with as_os_error("taking a request"):
            raw = load().cmid.CMID(creator=event.raw, listen_id=self.raw)
        return CmId(raw, self.channel)

    def resolve_address(self, source: str, address: str, port: int, timeout_ms: int) -> None:
        """Begin to find the peer from our address `source`."""
        check_address(source)
        pyverbs = load()
        with as_os_error(f"finding {address} from {source}"):
            info = pyverbs.cmid.AddrInfo(
                src=source,
                dst=address,
                dst_service=str(port),
                port_space=pyverbs.cm_enums.RDMA_PS_TCP,
            )
            try:
                self.raw.resolve_addr(info, timeout_ms)
            finally:
                info.close()

    def resolve_route(self, timeout_ms: int) -> None:
        """Begin to find the way to the peer."""
        with as_os_error("finding the way"):
            self.raw.resolve_route(timeout_ms)

    def connect(self, queue_pair_number: int, private_data: bytes) -> None:
        """Ask the peer for a connection."""
        with as_os_error("connecting"):
            self.raw.connect(self._parameters(queue_pair_number, private_data))

    def accept(self, queue_pair_number: int, private_data: bytes) -> None:
        """Grant the connection that was asked for."""
        with as_os_error("accepting"):
            self.raw.accept(self._parameters(queue_pair_number, private_data))

    def reject(self) -> None:
        """Refuse the connection that was asked for."""
        with as_os_error("refusing"):
            self.raw.reject()

    def establish(self) -> None:
        """Tell the peer that its answer came."""
        with as_os_error("confirming"):
            self.raw.establish()

    def disconnect(self) -> None:
        """Tell the peer that this is the end, if it can be told."""
        with contextlib.suppress(OSError), as_os_error("disconnecting"):
            self.raw.disconnect()

    def close(self) -> None:
        """Close it, after its queue pair and events. Idempotent."""
        with contextlib.suppress(OSError), as_os_error("closing a connection id"):
            self.raw.close()

    def _parameters(self, queue_pair_number: int, private_data: bytes) -> Any:
        # No receiver-not-ready retries: credits leave no room for that, so one is a fault.
        parameters = load().cmid.ConnParam(
            retry=RETRY_COUNT, rnr_retry=0, qp_num=queue_pair_number, data_len=len(private_data)
        )
        parameters.set_private_data(private_data)
        return parameters


def check_address(address: str) -> None:
    """Raise OSError unless it is the address of one interface.

    RDMA CM binds to a loopback or wildcard address without any device, and pyverbs 44 then follows
    a null pointer.
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError as error:
        raise OSError(
            errno.EINVAL, f"RDMA: {address!r} is no address: write it in digits"
        ) from error
    if parsed.is_loopback or parsed.is_unspecified:
        raise OSError(errno.EADDRNOTAVAIL, f"RDMA: {address} is no address of an RDMA device")


def _text(name: "bytes | str") -> str:
    return name.decode() if isinstance(name, bytes) else name
