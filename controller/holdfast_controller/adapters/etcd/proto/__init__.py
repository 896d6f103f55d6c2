"""The messages of etcd's v3 API that we use, and the modules generated from them.

`kv.proto` and `rpc.proto` are written by hand; the `_pb2` files come out of `../generate.sh` and
are never edited. On the wire only field numbers, types and the service paths count, so names are
ours where etcd's would be unclear.
"""
