"""Several Holdfast hosts on one machine, each in a network namespace of its own.

Needs root, iproute2, QEMU and etcd. Everything it makes it removes.
"""
