"""Our own small etcd v3 client; `docs/adr/0002-own-etcd-client.md` says why."""

from holdfast_controller.adapters.etcd.client import EtcdClient
from holdfast_controller.adapters.etcd.errors import (
    Compacted,
    EtcdError,
    EtcdOutOfSpace,
    EtcdRefused,
    EtcdUnavailable,
)
from holdfast_controller.adapters.etcd.values import (
    ChangeKind,
    Compare,
    Delete,
    DeletePrefix,
    KeyValue,
    Put,
    StoreStatus,
    TlsFiles,
    TxnResult,
    WatchBatch,
    Write,
    absent,
    unchanged,
)

__all__ = [
    "ChangeKind",
    "Compacted",
    "Compare",
    "Delete",
    "DeletePrefix",
    "EtcdClient",
    "EtcdError",
    "EtcdOutOfSpace",
    "EtcdRefused",
    "EtcdUnavailable",
    "KeyValue",
    "Put",
    "StoreStatus",
    "TlsFiles",
    "TxnResult",
    "WatchBatch",
    "Write",
    "absent",
    "unchanged",
]
