"""The token that stands for user and password in every request. Talks gRPC.

Etcd's simple tokens live in a member's memory: they end with its restart and after five idle
minutes. JWTs end with any change to users or roles. So a token is fetched when first needed, and
again when etcd says that it does not know it. It is asked of the member that will be asked next: a
member that lags behind may not know a token that another one gave out.
"""

import asyncio

import grpc.aio

from holdfast_controller.adapters.etcd.endpoints import Endpoint
from holdfast_controller.adapters.etcd.errors import AUTH_NOT_ENABLED
from holdfast_controller.adapters.etcd.proto import rpc_pb2

_AUTHENTICATE = "/etcdserverpb.Auth/Authenticate"


class Tokens:
    """Fetches and remembers the token of one user."""

    def __init__(self, user: str | None, password: str | None) -> None:
        """Remember who we are; without a user no token is ever sent."""
        if (user is None) != (password is None):
            raise ValueError("etcd needs user and password, or neither")
        self._user = user or ""
        self._password = password or ""
        self._token: str | None = None
        self._fetching = asyncio.Lock()

    @property
    def can_renew(self) -> bool:
        """Whether there is a user to authenticate as."""
        return bool(self._user)

    async def current(self, endpoint: Endpoint, timeout_seconds: float) -> str:
        """Return the token, fetched if need be; empty when none is needed.

        One fetch at a time: a password check costs etcd a tenth of a second of CPU. Raises
        TimeoutError and AioRpcError; then there is no token.
        """
        if not self._user:
            return ""
        async with asyncio.timeout(timeout_seconds), self._fetching:
            if self._token is None:
                self._token = await self._fetch(endpoint, timeout_seconds)
            return self._token

    async def _fetch(self, endpoint: Endpoint, timeout_seconds: float) -> str:
        ask = endpoint.channel.unary_unary(
            _AUTHENTICATE,
            request_serializer=rpc_pb2.AuthenticateRequest.SerializeToString,
            response_deserializer=rpc_pb2.AuthenticateResponse.FromString,
        )
        request = rpc_pb2.AuthenticateRequest(name=self._user, password=self._password)
        try:
            answer = await ask(request, timeout=timeout_seconds)
        except grpc.aio.AioRpcError as error:
            if error.details() == AUTH_NOT_ENABLED:
                return ""
            raise
        return answer.token

    def discard(self, token: str) -> None:
        """Forget a token that etcd did not take, unless it was replaced meanwhile."""
        if self._token == token:
            self._token = None
