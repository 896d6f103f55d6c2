"""A watch of the etcd client beside an event loop that is busy with requests."""

import asyncio
import contextlib
import threading
import time
from typing import Any

import pytest
from tests.integration.etcd.conftest import EtcdServer
from tests.integration.etcd.test_etcd_watch import View, put

pytestmark = pytest.mark.etcd


def test_a_watch_keeps_up_while_each_turn_of_the_event_loop_is_long(
    etcd: EtcdServer, client_of: Any
) -> None:
    changes = 200

    def write_all() -> None:
        async def body() -> None:
            async with client_of(etcd.endpoint) as writer:
                for number in range(changes):
                    await put(writer, "/busy", number)

        asyncio.run(body())

    async def scene() -> None:
        async with client_of(etcd.endpoint) as client:
            view, turns = View(), 0
            async with contextlib.aclosing(client.watch("/", from_revision=0)) as batches:
                view.apply(await anext(batches))
                writer = threading.Thread(target=write_all)
                writer.start()
                following = asyncio.create_task(
                    view.follow(
                        batches, lambda: bool(view.state) and view.state["/busy"].version == changes
                    )
                )
                while not following.done():
                    turns += not writer.is_alive()
                    time.sleep(0.02)  # noqa: ASYNC251 - as hundreds of requests would
                    await asyncio.sleep(0)
                writer.join()
                await following
            # Whoever takes turns to read needs some for each change.
            assert turns < changes / 4

    asyncio.run(scene())
