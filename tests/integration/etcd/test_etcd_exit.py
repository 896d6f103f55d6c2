"""What a process that used the etcd client leaves behind: nothing, not even a warning."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.integration.etcd.conftest import EtcdServer

pytestmark = pytest.mark.etcd

# Every way to leave a watch and a client, in one process with warnings as errors.
PROGRAM = """
import asyncio, contextlib, sys, threading
from holdfast_controller.adapters.etcd import EtcdClient, EtcdUnavailable, Put, absent

async def properly(endpoint):
    client = EtcdClient([endpoint])
    async with contextlib.aclosing(client.watch("/", from_revision=0)) as batches:
        await anext(batches)
        await client.txn([], [Put("/a", b"1")])
        await anext(batches)
    await client.lease_keep_alive(await client.lease_grant(5))
    await client.close()

async def cancelled(endpoint):
    client = EtcdClient([endpoint])
    async def consume():
        async for batch in client.watch("/", from_revision=0):
            pass
    tasks = [asyncio.ensure_future(consume()) for _ in range(3)]
    await asyncio.wait(tasks, timeout=0.3)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await client.close()

async def dropped(endpoint):
    client = EtcdClient([endpoint])
    async for batch in client.watch("/", from_revision=0):
        break
    await client.close()

async def unreachable(endpoint):
    client = EtcdClient(["127.0.0.1:9"], request_timeout_seconds=0.3)
    with contextlib.suppress(EtcdUnavailable):
        await client.get("/")
    await client.close()

async def forgotten(endpoint):
    client = EtcdClient([endpoint])
    asyncio.ensure_future(anext(client.watch("/x", from_revision=1)))
    await client.get("/")
    await asyncio.sleep(0.1)

for way in (properly, cancelled, dropped, unreachable, forgotten):
    asyncio.run(way(sys.argv[1]))
print("alive:", [each.name for each in threading.enumerate() if not each.daemon])
"""


def test_a_process_that_used_the_client_ends_without_a_word(etcd: EtcdServer) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", PROGRAM, etcd.endpoint],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "alive: ['MainThread']\n"
