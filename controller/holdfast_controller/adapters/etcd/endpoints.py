"""The etcd members we may talk to, one gRPC channel each, and which of them to try first.

Talks gRPC. Channels are made at first use, inside the running event loop; `Endpoints` owns them.

Before anything of the caller's is sent, `Endpoint.connect` makes sure of a live connection with a
harmless question. So "not connected" is proof that a request was not sent, without reading meaning
into the wording of gRPC's errors; what fails after that may have been received.

gRPC's own retries are off: they would repeat a write behind our back. Its proxies are off: etcd is
spoken to directly, whatever the environment says.
"""

import urllib.parse
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import grpc.aio

from holdfast_controller.adapters.etcd.proto import rpc_pb2
from holdfast_controller.adapters.etcd.reader import StreamReader
from holdfast_controller.adapters.etcd.renewals import Renewals
from holdfast_controller.adapters.etcd.values import TlsFiles

MESSAGE_LIMIT_BYTES = 16 * 1024 * 1024
"""Of one answer. Etcd takes requests of up to 1.5 MiB, so a single key always fits."""

_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    # Two clients in one process must not share a connection: closing is then exact.
    ("grpc.use_local_subchannel_pool", 1),
    # Etcd closes connections that are pinged more often than every 5 s, or without a call.
    ("grpc.keepalive_time_ms", 10_000),
    # Also sets TCP_USER_TIMEOUT: data that nobody acknowledges ends the connection after this.
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # gRPC's name for the time one connection attempt may take; its own default is 20 s.
    ("grpc.min_reconnect_backoff_ms", 2_000),
)
_STATUS = "/etcdserverpb.Maintenance/Status"
_NO_ANSWER = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
    }
)


class NotConnected(Exception):  # noqa: N818 - internal, caught where the next endpoint is chosen
    """There is no live connection to an endpoint; nothing was sent."""


@dataclass(frozen=True)
class Address:
    """Where a member listens."""

    target: str
    tls: bool


def parse_endpoint(text: str, *, tls: bool) -> Address:
    """Read `host:port`, `http://host:port` or `https://host:port`.

    Raises ValueError for anything else, and when the scheme contradicts `tls`.
    """
    parts = urllib.parse.urlsplit(text if "://" in text else f"//{text}")
    try:
        port = parts.port
    except ValueError as error:
        raise ValueError(f"etcd endpoint {text!r}: {error}") from error
    if parts.scheme not in {"", "http", "https"} or not parts.hostname or port is None:
        raise ValueError(f"etcd endpoint {text!r} is not host:port or http(s)://host:port")
    if parts.path not in {"", "/"} or parts.query or parts.fragment or parts.username:
        raise ValueError(f"etcd endpoint {text!r}: nothing may follow or precede host and port")
    if parts.scheme == "http" and tls:
        raise ValueError(f"etcd endpoint {text!r} is http:// but TLS files are given; use https://")
    if parts.scheme == "https" and not tls:
        raise ValueError(f"etcd endpoint {text!r} is https:// but no TLS authority is given")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return Address(f"{host}:{port}", tls)


def load_credentials(files: TlsFiles) -> grpc.ChannelCredentials:
    """Read the PEM files. Raises OSError if one can not be read, ValueError if half is given."""
    if (files.certificate is None) != (files.key is None):
        raise ValueError("TLS towards etcd needs certificate and key, or neither")
    return grpc.ssl_channel_credentials(
        root_certificates=files.authority.read_bytes(),
        private_key=files.key.read_bytes() if files.key else None,
        certificate_chain=files.certificate.read_bytes() if files.certificate else None,
    )


class Endpoint:
    """One member and the channel to it."""

    def __init__(self, address: Address, credentials: grpc.ChannelCredentials | None) -> None:
        """Remember where it is; connects at first use."""
        self.name = address.target
        self._credentials = credentials
        self._channel: grpc.aio.Channel | None = None
        self._renewals: Renewals | None = None
        self._streams: weakref.WeakSet[StreamReader] = weakref.WeakSet()
        self._closed = False

    @property
    def channel(self) -> grpc.aio.Channel:
        """The channel, made at first use; needs a running event loop.

        Raises NotConnected after `close`.
        """
        if self._closed:
            raise NotConnected("the client is closed")
        if self._channel is None:
            options = list(_OPTIONS)
            if self._credentials is None:
                self._channel = grpc.aio.insecure_channel(self.name, options)
            else:
                self._channel = grpc.aio.secure_channel(self.name, self._credentials, options)
        return self._channel

    def renewals(self, metadata: tuple[tuple[str, str], ...]) -> Renewals:
        """Return the stream over which leases are renewed. Raises NotConnected."""
        known = self._renewals
        if known is None or known.is_over or known.metadata != metadata:
            known = self._renewals = Renewals(self.channel, metadata)
        return known

    def open_stream(self, metadata: tuple[tuple[str, str], ...]) -> StreamReader:
        """Begin a watch's stream; `close` of this endpoint ends it. Raises NotConnected."""
        if self._closed:
            raise NotConnected("the client is closed")
        options = list(_OPTIONS)
        if self._credentials is None:
            channel = grpc.insecure_channel(self.name, options)
        else:
            channel = grpc.secure_channel(self.name, self._credentials, options)
        stream = StreamReader(channel, metadata)
        self._streams.add(stream)
        return stream

    async def connect(self, timeout_seconds: float) -> None:
        """Return when there is a live connection.

        Raises NotConnected, with the reason in words, when there is none within the timeout.
        """
        if self.channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.READY:
            return
        ask = self.channel.unary_unary(
            _STATUS,
            request_serializer=rpc_pb2.StatusRequest.SerializeToString,
            response_deserializer=rpc_pb2.StatusResponse.FromString,
        )
        try:
            await ask(rpc_pb2.StatusRequest(), timeout=timeout_seconds)
        except grpc.aio.AioRpcError as error:
            # Any other code was said by a server at the far end of a connection.
            if error.code() in _NO_ANSWER:
                raise NotConnected(error.details() or error.code().name) from error

    async def close(self) -> None:
        """Close the channel, for good; its calls end as cancelled."""
        self._closed = True
        if self._renewals is not None:
            await self._renewals.close()
        for stream in tuple(self._streams):
            await stream.close()
        if self._channel is not None:
            channel, self._channel = self._channel, None
            await channel.close()


class Endpoints:
    """All members, the good one first."""

    def __init__(self, endpoints: Sequence[str], tls: TlsFiles | None) -> None:
        """Parse the endpoints and read the TLS files.

        Raises ValueError and OSError for configuration that can not work.
        """
        addresses = [parse_endpoint(text, tls=tls is not None) for text in endpoints]
        if not addresses:
            raise ValueError("no etcd endpoint is given")
        credentials = load_credentials(tls) if tls else None
        self._endpoints = [Endpoint(address, credentials) for address in addresses]
        self._preferred = 0

    def __len__(self) -> int:
        """Count the members."""
        return len(self._endpoints)

    @property
    def preferred(self) -> Endpoint:
        """The member that answered last, or the next one to try."""
        return self._endpoints[self._preferred]

    def pass_over(self, endpoint: Endpoint) -> None:
        """Try another one next, unless somebody else already decided so."""
        if self.preferred is endpoint:
            self._preferred = (self._preferred + 1) % len(self._endpoints)

    async def close(self) -> None:
        """Close every channel."""
        for endpoint in self._endpoints:
            await endpoint.close()
