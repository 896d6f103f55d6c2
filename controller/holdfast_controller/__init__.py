"""The control plane: keeps protections in etcd, decides claims, picks backup hosts.

Start at `main`. `core/` is pure planning; `adapters/` is etcd; `http/` the REST API; `loop` ties
the planner to the store.
"""
