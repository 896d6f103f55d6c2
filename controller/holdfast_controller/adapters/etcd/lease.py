"""Leases: grant, keep alive, revoke. Talks gRPC.

All three may be repeated. A grant names its own id, so that a second one finds the first instead
of leaving an orphan; revoking what is gone is done. Keeping alive is a stream in etcd's API
(`renewals.py`).
"""

import secrets

from holdfast_controller.adapters.etcd.calls import AttemptFailed, Calls, Kind, Metadata, Method
from holdfast_controller.adapters.etcd.endpoints import Endpoint
from holdfast_controller.adapters.etcd.errors import (
    LEASE_EXISTS,
    LEASE_NOT_FOUND,
    EtcdRefused,
    Verdict,
)
from holdfast_controller.adapters.etcd.proto import rpc_pb2
from holdfast_controller.adapters.etcd.renewals import RenewalsEnded

_GRANT = Method(
    "/etcdserverpb.Lease/LeaseGrant",
    rpc_pb2.LeaseGrantRequest,
    rpc_pb2.LeaseGrantResponse,
    Kind.REPEATABLE_WRITE,
)
_REVOKE = Method(
    "/etcdserverpb.Lease/LeaseRevoke",
    rpc_pb2.LeaseRevokeRequest,
    rpc_pb2.LeaseRevokeResponse,
    Kind.REPEATABLE_WRITE,
)


async def grant(calls: Calls, ttl_seconds: int) -> int:
    """Make a lease and return its id. Etcd may grant more seconds than asked, never fewer."""
    # Positive and not 0: 0 means "no lease".
    lease = secrets.randbits(62) + 1
    try:
        await calls.unary(
            _GRANT, rpc_pb2.LeaseGrantRequest(lease_id=lease, ttl_seconds=ttl_seconds)
        )
    except EtcdRefused as error:
        # 62 random bits: it is our own, from an attempt whose answer was lost.
        if error.reason != LEASE_EXISTS:
            raise
    return lease


async def revoke(calls: Calls, lease: int) -> None:
    """End a lease and delete its keys; one that is gone already is no error."""
    try:
        await calls.unary(_REVOKE, rpc_pb2.LeaseRevokeRequest(lease_id=lease))
    except EtcdRefused as error:
        if error.reason != LEASE_NOT_FOUND:
            raise


async def keep_alive(calls: Calls, lease: int) -> int:
    """Renew a lease; return the seconds it now has, 0 if it is lost."""

    async def perform(endpoint: Endpoint, metadata: Metadata, timeout_seconds: float) -> int:
        try:
            return await endpoint.renewals(metadata).renew(lease, timeout_seconds)
        except RenewalsEnded as error:
            raise AttemptFailed(Verdict.UNKNOWN, str(error)) from error

    return await calls.run("LeaseKeepAlive", Kind.REPEATABLE_WRITE, perform)
