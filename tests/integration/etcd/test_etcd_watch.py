"""Watches of the etcd client: order, resumption, compaction, silent deaths, cancellation."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any

import pytest

from holdfast_controller.adapters.etcd import (
    DeletePrefix,
    EtcdClient,
    KeyValue,
    Put,
    WatchBatch,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from tests.integration.etcd.conftest import EtcdServer

pytestmark = pytest.mark.etcd
DEADLINE_SECONDS = 60.0
MEBIBYTE = 1024 * 1024


class View:
    """What a consumer knows that applies every batch; checks what every batch promises."""

    def __init__(self) -> None:
        self.state: dict[str, KeyValue] = {}
        self.revision = 0
        self.batches: list[WatchBatch] = []

    def apply(self, batch: WatchBatch) -> None:
        self.batches.append(batch)
        if batch.resynchronised:
            assert not batch.events
            self.state = {item.key: item for item in batch.snapshot}
        else:
            assert batch.events
            assert not batch.snapshot
            revisions = [item.mod_revision for _, item in batch.events]
            assert revisions == sorted(revisions)
            assert revisions[0] > self.revision
            assert revisions[-1] == batch.revision
            for kind, item in batch.events:
                if kind == "put":
                    self.state[item.key] = item
                else:
                    del self.state[item.key]
        self.revision = batch.revision

    async def follow(
        self, batches: AsyncGenerator[WatchBatch, None], until: Callable[[], bool]
    ) -> None:
        """Apply batches until the condition holds."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not until():
                self.apply(await anext(batches))

    @property
    def resynchronised(self) -> int:
        return sum(batch.resynchronised for batch in self.batches)


async def put(client: EtcdClient, key: str, value: object) -> int:
    result = await client.txn([], [Put(key, str(value).encode())])
    return result.revision


async def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.02)


def test_changes_come_in_order_from_the_revision_asked_for(
    etcd: EtcdServer, client_of: Any
) -> None:
    async def scene() -> None:
        async with client_of(etcd.endpoint) as client:
            await put(client, "/vm/a", 1)
            begin = await put(client, "/vm/a", 2)
            await put(client, "/other", 1)
            await client.txn([], [Put("/vm/b", b"3"), Put("/vm/c", b"3")])
            await client.txn([], [DeletePrefix("/vm/b")])
            async with contextlib.aclosing(client.watch("/vm/", from_revision=begin)) as batches:
                view = View()
                await view.follow(batches, lambda: view.revision >= begin + 3)
                last = await put(client, "/vm/a", 4)
                await view.follow(batches, lambda: view.revision >= last)
            told = [
                (kind, item.key, item.value, item.mod_revision - begin)
                for batch in view.batches
                for kind, item in batch.events
            ]
            assert told == [
                ("put", "/vm/a", b"2", 0),
                ("put", "/vm/b", b"3", 2),
                ("put", "/vm/c", b"3", 2),
                ("delete", "/vm/b", b"", 3),
                ("put", "/vm/a", b"4", 4),
            ]

    asyncio.run(scene())


def test_a_watch_after_a_list_misses_nothing_and_repeats_nothing(
    etcd: EtcdServer, client_of: Any
) -> None:
    async def scene() -> None:
        async with client_of(etcd.endpoint) as client:
            await put(client, "/vm/a", 1)
            _, revision = await client.list("/vm/")
            batches = client.watch("/vm/", from_revision=revision + 1)
            async with contextlib.aclosing(batches):
                first = asyncio.ensure_future(anext(batches))
                await until(lambda: etcd.open_watch_streams() == 1, "the watch is there")
                last = await put(client, "/vm/b", 2)
                batch = await first
            ((kind, item),) = batch.events
            assert (kind, item.key, batch.revision) == ("put", "/vm/b", last)

    asyncio.run(scene())


def test_a_watch_from_zero_begins_with_the_whole_state(etcd: EtcdServer, client_of: Any) -> None:
    async def scene() -> None:
        async with client_of(etcd.endpoint) as client:
            await put(client, "/vm/a", 1)
            revision = await put(client, "/elsewhere", 1)
            async with contextlib.aclosing(client.watch("/vm/", from_revision=0)) as batches:
                batch = await anext(batches)
                assert batch.resynchronised
                assert (batch.revision, batch.events) == (revision, ())
                assert [item.key for item in batch.snapshot] == ["/vm/a"]
                last = await put(client, "/vm/a", 2)
                batch = await anext(batches)
                assert not batch.resynchronised
                assert batch.revision == last

    asyncio.run(scene())


def test_a_watch_goes_on_over_kills_and_restarts_of_etcd(etcd: EtcdServer, client_of: Any) -> None:
    async def scene() -> None:
        async with client_of(etcd.endpoint) as client, client_of(etcd.endpoint) as writer:
            view = View()
            written = 0
            async with contextlib.aclosing(client.watch("/n", from_revision=1)) as batches:
                for _ in range(3):
                    for _ in range(5):
                        written += 1
                        last = await put(writer, "/n", written)
                    await view.follow(batches, lambda: view.revision >= last)  # noqa: B023
                    etcd.restart()
                last = await put(writer, "/n", "end")
                await view.follow(batches, lambda: view.revision >= last)
            values = [item.value.decode() for batch in view.batches for _, item in batch.events]
            assert values == [*map(str, range(1, 16)), "end"]
            assert view.resynchronised == 0

    asyncio.run(scene())


def test_a_cut_watch_is_told_everything_that_happened_meanwhile(
    etcd: EtcdServer, client_of: Any, forwarding_to: Any
) -> None:
    async def scene() -> None:
        async with (
            forwarding_to(etcd) as forwarder,
            client_of(forwarder.endpoint) as client,
            client_of(etcd.endpoint) as writer,
        ):
            view = View()
            async with contextlib.aclosing(client.watch("/n", from_revision=1)) as batches:
                last = await put(writer, "/n", 0)
                await view.follow(batches, lambda: view.revision >= last)
                for i in range(1, 6):
                    await forwarder.cut()
                    await put(writer, "/n", f"{i} unseen")
                    last = await put(writer, "/n", i)
                    await forwarder.heal()
                    await view.follow(batches, lambda: view.revision >= last)  # noqa: B023
            values = [item.value.decode() for batch in view.batches for _, item in batch.events]
            assert values == ["0", *(f"{i}{end}" for i in range(1, 6) for end in (" unseen", ""))]
            assert view.resynchronised == 0

    asyncio.run(scene())


def test_a_compaction_behind_the_back_of_a_cut_watch_brings_the_whole_state(
    etcd: EtcdServer, client_of: Any, forwarding_to: Any
) -> None:
    async def scene() -> None:
        async with (
            forwarding_to(etcd) as forwarder,
            client_of(forwarder.endpoint) as client,
            client_of(etcd.endpoint) as writer,
        ):
            view = View()
            async with contextlib.aclosing(client.watch("/vm/", from_revision=1)) as batches:
                await put(writer, "/vm/gone", 1)
                last = await put(writer, "/vm/kept", 1)
                await view.follow(batches, lambda: view.revision >= last)
                await forwarder.cut()
                await writer.txn([], [DeletePrefix("/vm/gone")])
                await put(writer, "/vm/new", 1)
                last = await put(writer, "/vm/kept", 2)
                await writer.compact(last)
                await forwarder.heal()
                await view.follow(batches, lambda: view.revision >= last)
                assert view.resynchronised == 1
                assert {key: item.value for key, item in view.state.items()} == {
                    "/vm/kept": b"2",
                    "/vm/new": b"1",
                }
                last = await put(writer, "/vm/new", 2)
                await view.follow(batches, lambda: view.revision >= last)
                assert view.resynchronised == 1
                assert view.state["/vm/new"].value == b"2"

    asyncio.run(scene())


def test_a_deletion_at_the_very_revision_of_a_compaction_is_not_missed(
    etcd: EtcdServer, client_of: Any, forwarding_to: Any
) -> None:
    async def scene() -> None:
        async with (
            forwarding_to(etcd) as forwarder,
            client_of(forwarder.endpoint) as client,
            client_of(etcd.endpoint) as writer,
        ):
            view = View()
            async with contextlib.aclosing(client.watch("/vm/", from_revision=1)) as batches:
                last = await put(writer, "/vm/gone", 1)
                await view.follow(batches, lambda: view.revision >= last)
                await forwarder.cut()
                deleted = await writer.txn([], [DeletePrefix("/vm/gone")])
                await writer.compact(deleted.revision)
                await forwarder.heal()
                last = await put(writer, "/vm/new", 1)
                await view.follow(batches, lambda: view.revision >= last)
            assert set(view.state) == {"/vm/new"}

    asyncio.run(scene())


def test_a_watch_from_a_compacted_revision_begins_with_the_whole_state(
    etcd: EtcdServer, client_of: Any
) -> None:
    async def scene() -> None:
        async with client_of(etcd.endpoint) as client:
            for i in range(5):
                last = await put(client, "/n", i)
            await client.compact(last)
            async with contextlib.aclosing(client.watch("/n", from_revision=2)) as batches:
                batch = await anext(batches)
            assert batch.resynchronised
            assert [item.value for item in batch.snapshot] == [b"4"]
            # What was compacted was known already: no reason to list anew.
            async with contextlib.aclosing(client.watch("/n", from_revision=last + 1)) as batches:
                first = asyncio.ensure_future(anext(batches))
                await until(lambda: etcd.open_watch_streams() == 1, "the watch is there")
                await put(client, "/n", 5)
                assert not (await first).resynchronised

    asyncio.run(scene())


def test_a_store_that_lost_its_history_brings_the_whole_state(
    etcd: EtcdServer, client_of: Any
) -> None:
    async def scene() -> None:
        async with client_of(etcd.endpoint) as client, client_of(etcd.endpoint) as writer:
            view = View()
            async with contextlib.aclosing(client.watch("/n", from_revision=1)) as batches:
                for i in range(10):
                    last = await put(writer, f"/n{i}", i)
                await view.follow(batches, lambda: view.revision >= last)
                etcd.kill()
                etcd.forget_everything()
                etcd.start()
                await put(writer, "/n/other", 1)
                await view.follow(batches, lambda: view.resynchronised > 0)
                await view.follow(batches, lambda: "/n/other" in view.state)
                assert set(view.state) == {"/n/other"}
                assert view.revision == 2

    asyncio.run(scene())


def test_a_silently_dead_stream_is_noticed_and_another_member_asked(
    etcd: EtcdServer, client_of: Any, forwarding_to: Any
) -> None:
    async def scene() -> None:
        async with (
            forwarding_to(etcd) as forwarder,
            client_of(
                forwarder.endpoint,
                etcd.endpoint,
                watch_idle_seconds=0.2,
                request_timeout_seconds=1.0,
            ) as client,
            client_of(etcd.endpoint) as writer,
        ):
            view = View()
            async with contextlib.aclosing(client.watch("/n", from_revision=1)) as batches:
                last = await put(writer, "/n", 1)
                await view.follow(batches, lambda: view.revision >= last)
                forwarder.freeze()
                last = await put(writer, "/n", 2)
                await view.follow(batches, lambda: view.revision >= last)
            assert client._endpoints.preferred.name == f"127.0.0.1:{etcd.client_port}"
            assert view.resynchronised == 0

    asyncio.run(scene())


def test_a_watch_outlives_a_frozen_etcd(etcd: EtcdServer, client_of: Any) -> None:
    async def scene() -> None:
        async with client_of(
            etcd.endpoint, watch_idle_seconds=0.1, request_timeout_seconds=0.3
        ) as client:
            view = View()
            async with contextlib.aclosing(client.watch("/n", from_revision=1)) as batches:
                last = await put(client, "/n", 1)
                await view.follow(batches, lambda: view.revision >= last)
                etcd.freeze()
                waiting = asyncio.ensure_future(anext(batches))
                # Longer than the watch believes in the stream.
                done, _ = await asyncio.wait([waiting], timeout=1.0)
                assert not done
                etcd.thaw()
                async with client_of(etcd.endpoint, request_timeout_seconds=30.0) as writer:
                    last = await put(writer, "/n", 2)
                view.apply(await waiting)
                await view.follow(batches, lambda: view.revision >= last)
            assert view.resynchronised == 0

    asyncio.run(scene())


def test_an_idle_watch_keeps_its_stream(etcd: EtcdServer, client_of: Any) -> None:
    async def scene() -> None:
        labels = 'grpc_method="Watch",grpc_service="etcdserverpb.Watch",grpc_type="bidi_stream"'
        asked = f"grpc_server_msg_received_total{{{labels}}}"
        started = f"grpc_server_started_total{{{labels}}}"
        async with client_of(etcd.endpoint, watch_idle_seconds=0.05) as client:
            _, revision = await client.list("/n")
            batches = client.watch("/n", from_revision=revision + 1)
            async with contextlib.aclosing(batches):
                waiting = asyncio.ensure_future(anext(batches))
                await until(lambda: etcd.metric(asked) > 20, "twenty signs of life")
                assert not waiting.done()
                assert etcd.metric(started) == 1
                last = await put(client, "/n", 1)
                assert (await waiting).revision == last

    asyncio.run(scene())


def test_a_large_backlog_comes_in_parts_of_whole_revisions(
    etcd: EtcdServer, client_of: Any
) -> None:
    async def scene() -> None:
        async with client_of(etcd.endpoint, request_timeout_seconds=30.0) as client:
            for i in range(24):
                half = bytes([i]) * (MEBIBYTE // 2)
                last = await client.txn([], [Put("/n/a", half), Put("/n/b", half)])
            view = View()
            async with contextlib.aclosing(client.watch("/n/", from_revision=1)) as batches:
                await view.follow(batches, lambda: view.revision >= last.revision)
            told = [item.value[0] for batch in view.batches for _, item in batch.events]
            assert told == [i for i in range(24) for _ in range(2)]
            assert all(len(batch.events) % 2 == 0 for batch in view.batches)
            assert len(view.batches) > 1

    asyncio.run(scene())


def test_the_deletion_of_a_large_prefix_is_one_batch(etcd: EtcdServer, client_of: Any) -> None:
    async def scene() -> None:
        async with client_of(etcd.endpoint, request_timeout_seconds=30.0) as client:
            pad = "x" * 200
            names = [f"/n/{i:05}{pad}" for i in range(12_800)]
            for i in range(0, len(names), 128):
                filled = await client.txn([], [Put(name, b"") for name in names[i : i + 128]])
            deleted = await client.txn([], [DeletePrefix("/n/")])
            async with contextlib.aclosing(
                client.watch("/n/", from_revision=filled.revision + 1)
            ) as batches:
                batch = await anext(batches)
            assert batch.revision == deleted.revision
            assert [item.key for _, item in batch.events] == names
            assert {kind for kind, _ in batch.events} == {"delete"}

    asyncio.run(scene())


def test_a_consumer_that_is_busy_for_long_is_told_everything(
    etcd: EtcdServer, client_of: Any
) -> None:
    async def scene() -> None:
        async with (
            client_of(etcd.endpoint, watch_idle_seconds=0.1) as client,
            client_of(etcd.endpoint, request_timeout_seconds=30.0) as writer,
        ):
            view = View()
            async with contextlib.aclosing(client.watch("/n", from_revision=1)) as batches:
                last = await put(writer, "/n", "first")
                await view.follow(batches, lambda: view.revision >= last)
                for _ in range(60):
                    result = await writer.txn([], [Put("/n", b"x" * MEBIBYTE)])
                await view.follow(batches, lambda: view.revision >= result.revision)
            assert sum(len(batch.events) for batch in view.batches) == 61

    asyncio.run(scene())


def test_a_watch_can_be_cancelled_at_any_moment(
    etcd: EtcdServer, client_of: Any, forwarding_to: Any
) -> None:
    async def scene() -> None:
        async def consume(client: EtcdClient, view: View) -> None:
            async with contextlib.aclosing(client.watch("/n", from_revision=0)) as batches:
                async for batch in batches:
                    view.apply(batch)

        async with client_of(etcd.endpoint, watch_idle_seconds=0.01) as client:
            await put(client, "/n", 1)
            for turns in range(60):
                task = asyncio.ensure_future(consume(client, View()))
                for _ in range(turns):
                    await asyncio.sleep(0)
                await asyncio.sleep(0.0005 * turns)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            await until(lambda: etcd.open_watch_streams() == 0, "etcd has no stream left")
        async with forwarding_to(etcd) as forwarder, client_of(forwarder.endpoint) as client:
            for state in ("frozen", "cut"):
                await (forwarder.cut() if state == "cut" else forwarder.heal())
                forwarder.freeze()
                task = asyncio.ensure_future(consume(client, View()))
                done, _ = await asyncio.wait([task], timeout=0.3)
                assert not done
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

    asyncio.run(scene())


def test_closing_the_client_ends_its_watches(
    etcd: EtcdServer, client_of: Any, forwarding_to: Any
) -> None:
    async def scene() -> None:
        async def consume(client: EtcdClient) -> list[WatchBatch]:
            return [batch async for batch in client.watch("/n", from_revision=0)]

        async with forwarding_to(etcd) as forwarder:
            for state in ("working", "frozen", "cut"):
                async with client_of(forwarder.endpoint) as client:
                    task = asyncio.ensure_future(consume(client))
                    await until(lambda: etcd.open_watch_streams() == 1, "the watch is there")
                    if state == "cut":
                        await forwarder.cut()
                    if state == "frozen":
                        forwarder.freeze()
                    await asyncio.wait([task], timeout=0.3)
                    await client.close()
                    async with asyncio.timeout(DEADLINE_SECONDS):
                        assert len(await task) == 1
                await forwarder.cut()
                await forwarder.heal()
                await until(lambda: etcd.open_watch_streams() == 0, "no stream is left")

    asyncio.run(scene())
