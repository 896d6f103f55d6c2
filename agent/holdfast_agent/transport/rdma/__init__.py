"""RDMA between two workers: the same frames as over TCP, moved by RDMA WRITE.

Read `stream` first: it is the port `Stream` over one reliable-connected queue pair. `core.ring`
keeps its credits, `opening` brings two sides together by RDMA CM, `moving` is the short talk on
the TCP connection by which both decide to use it. `verbs` and `cm` give pyverbs types, and only
`binding` imports it.
"""
