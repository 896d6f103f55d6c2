"""Reads, transactions and leases of the etcd client against a real etcd."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from typing import TYPE_CHECKING, Any

import pytest

from holdfast_controller.adapters.etcd import (
    Delete,
    DeletePrefix,
    EtcdOutOfSpace,
    EtcdRefused,
    Put,
    absent,
    unchanged,
)
from holdfast_controller.adapters.etcd.endpoints import Endpoint, parse_endpoint

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Iterator

    from tests.integration.etcd.conftest import EtcdServer

pytestmark = pytest.mark.etcd
MEBIBYTE = 1024 * 1024


async def _until_one_fails(calls: Iterator[Awaitable[object]]) -> None:
    for call in itertools.islice(calls, 1000):
        await call


def test_a_key_that_was_put_is_read_back(etcd: EtcdServer, client_of: Any) -> None:
    async def scene() -> None:
        async with client_of(etcd.endpoint) as client:
            assert await client.get("/a") is None
            result = await client.txn([absent("/a")], [Put("/a", b"one")])
            assert result.succeeded
            assert result.current == ()
            read = await client.get("/a")
            assert read.value == b"one"
            assert (read.mod_revision, read.create_revision) == (result.revision, result.revision)
            assert (read.version, read.lease) == (1, 0)

    asyncio.run(scene())


def test_a_failed_transaction_changes_nothing_and_shows_what_is_there(
    etcd: EtcdServer, client_of: Any
) -> None:
    async def scene() -> None:
        async with client_of(etcd.endpoint) as client:
            first = await client.txn([], [Put("/a", b"one"), Put("/b", b"two")])
            second = await client.txn([unchanged("/a", first.revision)], [Put("/a", b"three")])
            assert second.succeeded
            refused = await client.txn(
                [unchanged("/a", first.revision), absent("/c"), absent("/b")],
                [Put("/a", b"four"), Put("/c", b"five"), Delete("/b")],
            )
            assert not refused.succeeded
            assert refused.revision == second.revision
            a, c, b = refused.current
            assert (a.value, a.mod_revision, a.version) == (b"three", second.revision, 2)
            assert c is None
            assert b.value == b"two"
            assert (await client.get("/a")).value == b"three"
            assert await client.get("/c") is None
            assert (await client.get("/b")).value == b"two"

    asyncio.run(scene())


def test_of_two_racing_clients_exactly_one_wins(etcd: EtcdServer, client_of: Any) -> None:
    async def scene() -> None:
        async with client_of(etcd.endpoint) as one, client_of(etcd.endpoint) as two:
            before = await one.txn([absent("/claim")], [Put("/claim", b"0")])
            revision = before.revision
            for _ in range(100):
                results = await asyncio.gather(
                    one.txn([unchanged("/claim", revision)], [Put("/claim", b"one")]),
                    two.txn([unchanged("/claim", revision)], [Put("/claim", b"two")]),
                )
                assert sorted(result.succeeded for result in results) == [False, True]
                winner = b"one" if results[0].succeeded else b"two"
                (loser,) = [result for result in results if not result.succeeded]
                assert loser.current[0].value == winner
                revision = loser.current[0].mod_revision

    asyncio.run(scene())


def test_a_prefix_is_listed_whole_and_sorted_over_many_pages(
    etcd: EtcdServer, client_of: Any
) -> None:
    async def scene() -> None:
        async with client_of(etcd.endpoint) as client:
            names = [f"/vm/{i:05}" for i in range(1300)]
            for i in range(0, len(names), 100):
                await client.txn([], [Put(name, name.encode()) for name in names[i : i + 100]])
            last = await client.txn([], [Put("/vm0", b"behind"), Put("/v", b"before")])
            found, revision = await client.list("/vm/")
            assert [item.key for item in found] == names
            assert [item.value.decode() for item in found] == names
            assert revision == last.revision
            some, _ = await client.list("/vm/", limit=700)
            assert [item.key for item in some] == names[:700]
            everything, _ = await client.list("")
            assert len(everything) == 1302

    asyncio.run(scene())


def test_a_list_larger_than_a_message_is_read_in_smaller_pages(
    etcd: EtcdServer, client_of: Any
) -> None:
    async def scene() -> None:
        async with client_of(etcd.endpoint, request_timeout_seconds=30.0) as client:
            for i in range(24):
                await client.txn([], [Put(f"/big/{i:02}", bytes([i]) * MEBIBYTE)])
            found, _ = await client.list("/big/")
            assert [(item.value[0], len(item.value)) for item in found] == [
                (i, MEBIBYTE) for i in range(24)
            ]

    asyncio.run(scene())


def test_all_pages_of_a_list_are_of_one_revision(etcd: EtcdServer, client_of: Any) -> None:
    async def scene() -> None:
        async with client_of(etcd.endpoint) as client, client_of(etcd.endpoint) as other:
            names = [f"/vm/{i:05}" for i in range(1600)]
            for i in range(0, len(names), 100):
                await client.txn([], [Put(name, b"0") for name in names[i : i + 100]])

            async def keep_writing() -> None:
                for i in range(10**9):
                    value = str(i).encode()
                    await other.txn([], [Put(names[0], value), Put(names[-1], value)])

            writing = asyncio.ensure_future(keep_writing())
            seen: set[int] = set()
            while len(seen) < 10:
                found, revision = await client.list("/vm/")
                assert len(found) == len(names)
                assert found[0].value == found[-1].value
                assert found[0].mod_revision <= revision
                seen.add(revision)
            writing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await writing

    asyncio.run(scene())


def test_a_list_survives_compaction_between_its_pages(etcd: EtcdServer, client_of: Any) -> None:
    async def scene() -> None:
        async with client_of(etcd.endpoint) as client, client_of(etcd.endpoint) as other:
            names = [f"/vm/{i:05}" for i in range(1600)]
            for i in range(0, len(names), 100):
                await client.txn([], [Put(name, b"0") for name in names[i : i + 100]])
            unary = client._calls.unary
            pages = 0

            async def compacting_after_the_first_page(method: Any, request: Any) -> Any:
                nonlocal pages
                answer = await unary(method, request)
                pages += 1
                if pages == 1:
                    changed = await other.txn([], [Put(names[-1], b"1")])
                    await other.compact(changed.revision)
                return answer

            client._calls.unary = compacting_after_the_first_page
            found, revision = await client.list("/vm/")
            assert len(found) == len(names)
            assert found[-1].value == b"1"
            assert found[-1].mod_revision == revision

    asyncio.run(scene())


def test_deleting_a_prefix_deletes_what_begins_with_it_and_nothing_else(
    etcd: EtcdServer, client_of: Any
) -> None:
    async def scene() -> None:
        async with client_of(etcd.endpoint) as client:
            await client.txn([], [Put(key, b"") for key in ("/a", "/a/1", "/a/2", "/a0", "/b")])
            await client.txn([], [DeletePrefix("/a/")])
            assert [item.key for item in (await client.list(""))[0]] == ["/a", "/a0", "/b"]
            await client.txn([], [Delete("/a")])
            assert [item.key for item in (await client.list(""))[0]] == ["/a0", "/b"]

    asyncio.run(scene())


def test_a_request_that_etcd_finds_wrong_is_refused_and_changes_nothing(
    etcd: EtcdServer, client_of: Any
) -> None:
    async def scene() -> None:
        async with client_of(etcd.endpoint) as client:
            with pytest.raises(EtcdRefused, match="duplicate key"):
                await client.txn([], [Put("/a", b"1"), Put("/a", b"2")])
            with pytest.raises(EtcdRefused, match="too large"):
                await client.txn([], [Put("/a", b"x" * (MEBIBYTE * 8 // 5))])
            with pytest.raises(EtcdRefused, match="larger than max"):
                await client.txn([], [Put("/a", b"x" * (MEBIBYTE * 3))])
            with pytest.raises(EtcdRefused, match="lease not found"):
                await client.txn([], [Put("/b", b"1"), Put("/a", b"1", lease=12345)])
            with pytest.raises(EtcdRefused, match="future revision"):
                await client.compact(10**9)
            assert await client.list("") == ((), 1)

    asyncio.run(scene())


def test_a_store_without_space_refuses_puts_and_says_so(make_etcd: Any, client_of: Any) -> None:
    etcd = make_etcd("small", "--quota-backend-bytes", str(2 * MEBIBYTE))
    etcd.start()

    async def scene() -> None:
        async with client_of(etcd.endpoint, request_timeout_seconds=30.0) as client:
            fill = (client.txn([], [Put(f"/{i}", b"x" * 400_000)]) for i in itertools.count())
            with pytest.raises(EtcdOutOfSpace, match="space exceeded"):
                await _until_one_fails(fill)
            assert (await client.get("/0")).version == 1
            assert any("NOSPACE" in problem for problem in (await client.status()).problems)

    asyncio.run(scene())


def test_a_stray_key_that_is_not_text_makes_the_round_trip(
    etcd: EtcdServer, client_of: Any
) -> None:
    async def scene() -> None:
        async with client_of(etcd.endpoint) as client:
            strange = b"/vm/\xff\xfe".decode("utf-8", "surrogateescape")
            await client.txn([absent(strange)], [Put(strange, b"1")])
            ((item,), _) = await client.list("/vm/")
            assert item.key == strange
            assert await client.get(item.key) == item

    asyncio.run(scene())


def test_keys_go_with_their_lease_and_a_lost_lease_has_no_time_left(
    etcd: EtcdServer, client_of: Any
) -> None:
    async def scene() -> None:
        async with client_of(etcd.endpoint) as client:
            lease = await client.lease_grant(2)
            put = await client.txn([], [Put("/leader", b"me", lease=lease)])
            assert (await client.get("/leader")).lease == lease
            assert await client.lease_keep_alive(lease) >= 2
            async with contextlib.aclosing(
                client.watch("/leader", from_revision=put.revision + 1)
            ) as batches:
                batch = await anext(batches)
            ((kind, item),) = batch.events
            assert (kind, item.key) == ("delete", "/leader")
            assert await client.lease_keep_alive(lease) == 0
            with pytest.raises(EtcdRefused, match="lease not found"):
                await client.txn([], [Put("/leader", b"me", lease=lease)])

    asyncio.run(scene())


def test_a_revoked_lease_takes_its_keys_along_and_may_be_revoked_again(
    etcd: EtcdServer, client_of: Any
) -> None:
    async def scene() -> None:
        async with client_of(etcd.endpoint) as client:
            lease = await client.lease_grant(600)
            assert await client.lease_keep_alive(lease) > 500
            await client.txn([], [Put("/leader", b"me", lease=lease)])
            await client.lease_revoke(lease)
            assert await client.get("/leader") is None
            await client.lease_revoke(lease)
            assert await client.lease_keep_alive(lease) == 0

    asyncio.run(scene())


def test_history_may_be_compacted_twice(etcd: EtcdServer, client_of: Any) -> None:
    async def scene() -> None:
        async with client_of(etcd.endpoint) as client:
            for i in range(5):
                result = await client.txn([], [Put("/a", str(i).encode())])
            await client.compact(result.revision)
            await client.compact(result.revision)
            await client.compact(result.revision - 1)
            assert (await client.get("/a")).value == b"4"

    asyncio.run(scene())


def test_the_status_names_version_leader_and_size(etcd: EtcdServer, client_of: Any) -> None:
    async def scene() -> None:
        async with client_of(etcd.endpoint) as client:
            result = await client.txn([], [Put("/a", b"1")])
            status = await client.status()
            assert status.version.startswith("3.")
            assert status.leader != 0
            assert status.database_size_bytes > 0
            assert status.revision == result.revision
            assert status.problems == ()
            assert status.endpoint == f"127.0.0.1:{etcd.client_port}"

    asyncio.run(scene())


def test_many_leases_are_renewed_at_once_and_each_gets_its_own_answer(
    etcd: EtcdServer, client_of: Any
) -> None:
    async def scene() -> None:
        async with client_of(etcd.endpoint) as client:
            leases = [await client.lease_grant(100 + number) for number in range(20)]
            for lease in leases[::4]:
                await client.lease_revoke(lease)
            expected = [0 if n % 4 == 0 else 100 + n for n in range(20)]
            assert await asyncio.gather(*map(client.lease_keep_alive, leases)) == expected
            twice = await asyncio.gather(*[client.lease_keep_alive(leases[1]) for _ in range(4)])
            assert twice == [101] * 4

    asyncio.run(scene())


def test_a_renewal_given_up_before_it_was_asked_takes_no_answer_of_a_later_one(
    etcd: EtcdServer, client_of: Any
) -> None:
    async def scene() -> None:
        endpoint = Endpoint(parse_endpoint(etcd.endpoint, tls=False), None)
        async with client_of(etcd.endpoint) as client, closing(endpoint):
            first, second = await client.lease_grant(100), await client.lease_grant(200)
            renewals = endpoint.renewals(())
            # The first one is being sent; the second one waits for that, and gives up.
            sent = asyncio.create_task(renewals.renew(first, 60))
            waiting = asyncio.create_task(renewals.renew(second, 60))
            await asyncio.sleep(0)
            waiting.cancel()
            assert await sent == 100
            assert await renewals.renew(second, 5) == 200
            assert endpoint.renewals(()) is renewals, "the stream goes on"

    asyncio.run(scene())


def test_a_renewal_that_nobody_waits_for_any_more_takes_no_other_with_it(
    etcd: EtcdServer, client_of: Any
) -> None:
    async def scene() -> None:
        async with client_of(etcd.endpoint) as client:
            first, second = await client.lease_grant(100), await client.lease_grant(200)
            for turns in range(12):
                given_up = asyncio.create_task(client.lease_keep_alive(first))
                others = [asyncio.create_task(client.lease_keep_alive(second)) for _ in range(2)]
                for _ in range(turns):
                    await asyncio.sleep(0)
                given_up.cancel()
                assert await asyncio.gather(*others) == [200, 200]
                await asyncio.wait([given_up])
            assert await client.lease_keep_alive(first) == 100

    asyncio.run(scene())


@contextlib.asynccontextmanager
async def closing(endpoint: Endpoint) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await endpoint.close()
