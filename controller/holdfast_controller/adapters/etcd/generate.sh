#!/bin/sh
# Regenerate proto/*_pb2.py and *_pb2.pyi from proto/*.proto with the Python of $PYTHON (default:
# python3), which needs grpcio-tools from the dev group. The include path is the folder above the
# package, so that generated imports name the package in full. The stubs leave a generic type open
# (grpcio-tools 1.85), which strict type checking refuses: it is filled in here.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
cd "$root"
"${PYTHON:-python3}" -m grpc_tools.protoc -I . --python_out=. --pyi_out=. \
    holdfast_controller/adapters/etcd/proto/kv.proto \
    holdfast_controller/adapters/etcd/proto/rpc.proto
sed -i 's/, _Mapping\]/, _Mapping[str, object]]/g' holdfast_controller/adapters/etcd/proto/*_pb2.pyi
