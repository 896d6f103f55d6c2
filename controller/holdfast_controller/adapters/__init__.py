"""Contact with the outside: the etcd client and the store built on it."""
