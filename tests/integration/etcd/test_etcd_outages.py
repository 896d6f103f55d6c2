"""The etcd client while etcd is dead, frozen, restarted or without a leader."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from typing import TYPE_CHECKING, Any

import pytest

from holdfast_controller.adapters.etcd import (
    EtcdClient,
    EtcdUnavailable,
    Put,
    TxnResult,
    absent,
    unchanged,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.etcd.conftest import EtcdCluster, EtcdServer

pytestmark = pytest.mark.etcd
DEADLINE_SECONDS = 60.0


@pytest.fixture
def dead_endpoint() -> Iterator[str]:
    """An address at which nobody listens; it stays reserved."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{reserved.getsockname()[1]}"


@pytest.fixture
def hung_endpoint() -> Iterator[str]:
    """An address that takes connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


async def settle(
    client: EtcdClient, key: str, known: int, value: bytes
) -> tuple[TxnResult, list[EtcdUnavailable]]:
    """Repeat one compare-and-swap until etcd decides; also return the failures on the way."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    failures: list[EtcdUnavailable] = []
    compare = unchanged(key, known) if known else absent(key)
    while True:
        try:
            return await client.txn([compare], [Put(key, value)]), failures
        except EtcdUnavailable as error:
            failures.append(error)
            if time.monotonic() > deadline:
                raise


def test_where_nobody_listens_a_write_is_known_not_to_be_applied(
    dead_endpoint: str, client_of: Any
) -> None:
    async def scene() -> None:
        async with client_of(dead_endpoint, request_timeout_seconds=0.5) as client:
            with pytest.raises(EtcdUnavailable, match="refused") as failure:
                await client.txn([absent("/a")], [Put("/a", b"1")])
            assert not failure.value.maybe_applied
            assert list(failure.value.reasons) == [dead_endpoint]
            with pytest.raises(EtcdUnavailable) as failure:
                await client.get("/a")
            assert not failure.value.maybe_applied
            with pytest.raises(EtcdUnavailable):
                await client.status()

    asyncio.run(scene())


def test_dead_and_hung_members_are_passed_over_and_the_good_one_is_remembered(
    etcd: EtcdServer, dead_endpoint: str, hung_endpoint: str, client_of: Any
) -> None:
    async def scene() -> None:
        endpoints = (dead_endpoint, hung_endpoint, etcd.endpoint)
        async with client_of(*endpoints, request_timeout_seconds=3.0) as client:
            assert (await client.txn([absent("/a")], [Put("/a", b"1")])).succeeded
            assert client._endpoints.preferred.name == f"127.0.0.1:{etcd.client_port}"
            assert (await client.get("/a")).value == b"1"
            assert client._endpoints.preferred.name == f"127.0.0.1:{etcd.client_port}"
            assert await client.lease_grant(5) > 0

    asyncio.run(scene())


def test_a_write_to_a_frozen_etcd_may_be_applied_and_a_read_may_not(
    etcd: EtcdServer, client_of: Any
) -> None:
    async def scene() -> None:
        async with client_of(etcd.endpoint, request_timeout_seconds=0.5) as client:
            await client.txn([absent("/a")], [Put("/a", b"1")])
            etcd.freeze()
            with pytest.raises(EtcdUnavailable) as failure:
                await client.txn([absent("/b")], [Put("/b", b"1")])
            assert failure.value.maybe_applied
            with pytest.raises(EtcdUnavailable) as failure:
                await client.get("/a")
            assert not failure.value.maybe_applied
            with pytest.raises(EtcdUnavailable) as failure:
                await client.lease_grant(5)
            assert failure.value.maybe_applied
            with pytest.raises(EtcdUnavailable):
                await client.lease_keep_alive(1)
            with pytest.raises(EtcdUnavailable):
                await client.status()
            etcd.thaw()
            result, _ = await settle(client, "/c", 0, b"1")
            assert result.succeeded

    asyncio.run(scene())


def test_a_write_that_never_got_a_connection_is_known_not_to_be_applied(
    etcd: EtcdServer, client_of: Any
) -> None:
    async def scene() -> None:
        async with client_of(etcd.endpoint, request_timeout_seconds=0.5) as client:
            etcd.freeze()
            with pytest.raises(EtcdUnavailable) as failure:
                await client.txn([absent("/b")], [Put("/b", b"1")])
            assert not failure.value.maybe_applied
            etcd.thaw()

    asyncio.run(scene())


def test_a_write_whose_answer_is_lost_may_be_applied_and_the_same_write_again_tells(
    etcd: EtcdServer, client_of: Any, forwarding_to: Any
) -> None:
    async def scene() -> None:
        async with (
            forwarding_to(etcd) as forwarder,
            client_of(forwarder.endpoint, request_timeout_seconds=0.5) as client,
            client_of(etcd.endpoint) as witness,
        ):
            await client.status()
            forwarder.freeze(answers_only=True)
            with pytest.raises(EtcdUnavailable) as failure:
                await client.txn([absent("/claim")], [Put("/claim", b"mine")])
            assert failure.value.maybe_applied
            assert (await witness.get("/claim")).value == b"mine"
            await forwarder.heal()
            again, _ = await settle(client, "/claim", 0, b"mine")
            assert not again.succeeded
            (current,) = again.current
            assert current is not None
            assert current.value == b"mine"
            assert current.version == 1

    asyncio.run(scene())


def test_a_write_whose_answer_is_lost_is_not_sent_to_another_member(
    etcd: EtcdServer, client_of: Any, forwarding_to: Any
) -> None:
    async def scene() -> None:
        async with (
            forwarding_to(etcd) as forwarder,
            client_of(forwarder.endpoint, etcd.endpoint, request_timeout_seconds=1.0) as client,
        ):
            await client.status()
            forwarder.freeze(answers_only=True)
            with pytest.raises(EtcdUnavailable) as failure:
                await client.txn([], [Put("/count", b"1")])
            assert failure.value.maybe_applied
            # The other member works, and would have taken it a second time.
            assert (await client.get("/count")).version == 1

    asyncio.run(scene())


def test_the_same_client_works_again_after_etcd_was_killed_and_restarted(
    etcd: EtcdServer, client_of: Any
) -> None:
    async def scene() -> None:
        async with client_of(etcd.endpoint, request_timeout_seconds=0.5) as client:
            before = await client.txn([absent("/a")], [Put("/a", b"1")])
            etcd.kill()
            with pytest.raises(EtcdUnavailable):
                await client.get("/a")
            etcd.start()
            result, _ = await settle(client, "/a", before.revision, b"2")
            assert result.succeeded
            assert (await client.get("/a")).value == b"2"

    asyncio.run(scene())


def test_a_member_without_a_leader_takes_no_write_and_says_so_at_once(
    cluster: EtcdCluster, client_of: Any
) -> None:
    async def scene() -> None:
        alone, *others = cluster.members
        async with client_of(alone.endpoint, request_timeout_seconds=1.0) as client:
            await client.txn([absent("/a")], [Put("/a", b"1")])
            for other in others:
                other.kill()
            result: EtcdUnavailable | None = None
            deadline = time.monotonic() + DEADLINE_SECONDS
            while result is None or "no leader" not in str(result):
                assert time.monotonic() < deadline
                with pytest.raises(EtcdUnavailable) as failure:
                    await client.txn([absent("/b")], [Put("/b", b"1")])
                result = failure.value
            assert not result.maybe_applied
            assert (await client.status()).leader == 0
            others[0].launch()
            settled, _ = await settle(client, "/c", 0, b"1")
            assert settled.succeeded
            assert (await client.status()).leader != 0

    asyncio.run(scene())


def test_no_acknowledged_write_is_lost_or_repeated_while_leaders_are_killed(
    cluster: EtcdCluster, client_of: Any
) -> None:
    async def scene() -> None:
        async with client_of(*cluster.endpoints, request_timeout_seconds=1.5) as client:
            count = 0
            revision = 0
            for kill in range(3):
                for step in range(20):
                    if step == 5:
                        victim = cluster.leader()
                        victim.kill()
                    count += 1
                    value = str(count).encode()
                    result, failures = await settle(client, "/counter", revision, value)
                    if result.succeeded:
                        revision = result.revision
                    else:
                        # Only an attempt that was said to be unknown may have got through.
                        assert any(failure.maybe_applied for failure in failures)
                        (current,) = result.current
                        assert current is not None
                        assert current.value == value
                        revision = current.mod_revision
                victim.start()
                assert (await client.get("/counter")).value == value, f"after kill {kill}"
            assert (await client.get("/counter")).version == count

    asyncio.run(scene())


def test_a_cancelled_call_ends_at_once_and_the_client_goes_on(
    etcd: EtcdServer, client_of: Any
) -> None:
    async def scene() -> None:
        async with client_of(etcd.endpoint, request_timeout_seconds=30.0) as client:
            await client.get("/a")
            etcd.freeze()
            calls = [
                asyncio.ensure_future(client.get("/a")),
                asyncio.ensure_future(client.txn([], [Put("/a", b"1")])),
                asyncio.ensure_future(client.lease_keep_alive(1)),
            ]
            await asyncio.sleep(0)
            for call in calls:
                call.cancel()
            for call in calls:
                with pytest.raises(asyncio.CancelledError):
                    await call
            etcd.thaw()
            await client.status()

    asyncio.run(scene())


def test_closing_the_client_ends_calls_under_way_as_unavailable(
    etcd: EtcdServer, client_of: Any
) -> None:
    async def scene() -> None:
        async with client_of(etcd.endpoint, request_timeout_seconds=30.0) as client:
            await client.get("/a")
            etcd.freeze()
            read = asyncio.ensure_future(client.get("/a"))
            write = asyncio.ensure_future(client.txn([], [Put("/a", b"1")]))
            renewal = asyncio.ensure_future(client.lease_keep_alive(1))
            done, _ = await asyncio.wait([read, write, renewal], timeout=0.2)
            assert not done
            await client.close()
            for call in (read, write, renewal):
                with pytest.raises(EtcdUnavailable, match="closed") as failure:
                    await call
                assert failure.value.maybe_applied == (call is not read)
            with pytest.raises(EtcdUnavailable, match="closed"):
                await client.get("/a")
            etcd.thaw()

    asyncio.run(scene())


def test_many_calls_at_once_share_an_outage_without_harm(
    etcd: EtcdServer, dead_endpoint: str, client_of: Any
) -> None:
    async def scene() -> None:
        async with client_of(dead_endpoint, etcd.endpoint, request_timeout_seconds=10.0) as client:
            results = await asyncio.gather(
                *(client.txn([absent(f"/{i}")], [Put(f"/{i}", b"1")]) for i in range(200))
            )
            assert all(result.succeeded for result in results)
            etcd.kill()
            etcd.launch()
            found = await asyncio.gather(*(client.get(f"/{i}") for i in range(200)))
            assert all(item.version == 1 for item in found)

    asyncio.run(scene())


def test_a_watch_leaves_a_member_that_lost_the_cluster(
    cluster: EtcdCluster, client_of: Any
) -> None:
    async def scene() -> None:
        first, *others = cluster.members
        async with (
            client_of(*cluster.endpoints, watch_idle_seconds=0.5) as client,
            client_of(*cluster.endpoints, request_timeout_seconds=20.0) as writer,
        ):
            before = await writer.txn([], [Put("/n", b"1")])
            async with contextlib.aclosing(client.watch("/n", from_revision=1)) as batches:
                assert (await anext(batches)).revision == before.revision
                # The member that serves the watch stays alive, but alone.
                for other in others:
                    other.freeze()
                waiting = asyncio.ensure_future(anext(batches))
                deadline = time.monotonic() + DEADLINE_SECONDS
                while first.open_watch_streams():
                    assert time.monotonic() < deadline
                    assert not waiting.done()
                    await asyncio.sleep(0.05)
                for other in others:
                    other.thaw()
                for member in cluster.members:
                    member.wait_healthy()
                after, _ = await settle(client, "/n", before.revision, b"2")
                assert after.succeeded
                batch = await waiting
                assert (batch.revision, batch.resynchronised) == (after.revision, False)

    asyncio.run(scene())


def test_renewals_fail_in_time_while_a_member_hangs_and_go_on_when_it_answers_again(
    etcd: EtcdServer, client_of: Any
) -> None:
    async def scene() -> None:
        async with client_of(etcd.endpoint, request_timeout_seconds=0.5) as client:
            leases = [await client.lease_grant(600) for _ in range(3)]
            assert await asyncio.gather(*map(client.lease_keep_alive, leases)) == [600] * 3
            etcd.freeze()
            try:
                hung = [client.lease_keep_alive(lease) for lease in leases]
                failed = await asyncio.gather(*hung, return_exceptions=True)
            finally:
                etcd.thaw()
            assert [type(each) for each in failed] == [EtcdUnavailable] * 3
            await eventually_renewed(client, leases[0])
            assert await asyncio.gather(*map(client.lease_keep_alive, leases)) == [600] * 3

    asyncio.run(scene())


async def eventually_renewed(client: EtcdClient, lease: int) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                assert await client.lease_keep_alive(lease)
            except EtcdUnavailable:
                continue
            return


def test_renewals_under_way_end_when_the_client_is_closed(etcd: EtcdServer, client_of: Any) -> None:
    async def scene() -> None:
        async with client_of(etcd.endpoint) as client:
            lease = await client.lease_grant(600)
            assert await client.lease_keep_alive(lease)
            etcd.freeze()
            try:
                renewal = asyncio.create_task(client.lease_keep_alive(lease))
                for _ in range(20):
                    await asyncio.sleep(0)
                await client.close()
                with pytest.raises(EtcdUnavailable):
                    await renewal
            finally:
                etcd.thaw()

    asyncio.run(scene())
