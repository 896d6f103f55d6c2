"""The etcd client with TLS, client certificates, users and tokens."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from holdfast_controller.adapters.etcd import EtcdRefused, EtcdUnavailable, Put, absent, unchanged

if TYPE_CHECKING:
    from tests.integration.etcd.conftest import Certificates, EtcdServer

pytestmark = pytest.mark.etcd
USER = {"user": "holdfast", "password": "secret"}


def test_a_user_works_over_tls_within_its_rights(
    secure_etcd: EtcdServer, certificates: Certificates, client_of: Any
) -> None:
    async def scene() -> None:
        async with client_of(secure_etcd.endpoint, tls=certificates.client, **USER) as client:
            result = await client.txn([absent("/holdfast/a")], [Put("/holdfast/a", b"1")])
            assert result.succeeded
            assert (await client.get("/holdfast/a")).value == b"1"
            lease = await client.lease_grant(60)
            assert await client.lease_keep_alive(lease) > 0
            await client.lease_revoke(lease)
            async with contextlib.aclosing(
                client.watch("/holdfast/", from_revision=result.revision)
            ) as batches:
                assert (await anext(batches)).revision == result.revision

    asyncio.run(scene())


def test_what_a_user_may_not_do_is_refused(
    secure_etcd: EtcdServer, certificates: Certificates, client_of: Any
) -> None:
    async def scene() -> None:
        async with client_of(secure_etcd.endpoint, tls=certificates.client, **USER) as client:
            with pytest.raises(EtcdRefused, match="permission denied"):
                await client.get("/else")
            with pytest.raises(EtcdRefused, match="permission denied"):
                await client.txn([absent("/holdfast/a")], [Put("/else", b"1")])
            for revision in (0, 1):
                async with contextlib.aclosing(
                    client.watch("/", from_revision=revision)
                ) as batches:
                    with pytest.raises(EtcdRefused, match="permission denied"):
                        await anext(batches)
            assert await client.get("/holdfast/a") is None

    asyncio.run(scene())


def test_wrong_or_missing_passwords_are_refused(
    secure_etcd: EtcdServer, certificates: Certificates, client_of: Any
) -> None:
    async def scene() -> None:
        tls = certificates.client
        async with client_of(
            secure_etcd.endpoint, tls=tls, user="holdfast", password="wrong"
        ) as client:
            with pytest.raises(EtcdRefused, match="authentication failed"):
                await client.txn([absent("/holdfast/a")], [Put("/holdfast/a", b"1")])
            async with contextlib.aclosing(client.watch("/holdfast/", from_revision=1)) as batches:
                with pytest.raises(EtcdRefused, match="authentication failed"):
                    await anext(batches)
        # The certificate's name is no user, and no user is given.
        async with client_of(secure_etcd.endpoint, tls=tls) as client:
            with pytest.raises(EtcdRefused, match=r"permission denied|user name is empty"):
                await client.get("/holdfast/a")

    asyncio.run(scene())


def test_a_token_that_a_restart_made_invalid_is_renewed(
    secure_etcd: EtcdServer, certificates: Certificates, client_of: Any
) -> None:
    async def scene() -> None:
        async with client_of(
            secure_etcd.endpoint, tls=certificates.client, request_timeout_seconds=10.0, **USER
        ) as client:
            key = "/holdfast/a"
            before = await client.txn([absent(key)], [Put(key, b"1")])
            batches = client.watch(key, from_revision=before.revision + 1)
            async with contextlib.aclosing(batches):
                waiting = asyncio.ensure_future(anext(batches))
                for name in ("txn", "get", "lease", "watch"):
                    token = client._calls.tokens._token
                    assert token
                    # Only a token older than the last change to a key is gone after a restart:
                    # etcd replays what its log has behind that change.
                    await client.txn([], [Put("/holdfast/other", b"")])
                    secure_etcd.stop()
                    secure_etcd.start()
                    match name:
                        case "txn":
                            result = await client.txn(
                                [unchanged(key, before.revision)], [Put(key, b"2")]
                            )
                            assert result.succeeded
                            batch = await waiting
                            assert batch.revision == result.revision
                        case "get":
                            assert (await client.get(key)).value == b"2"
                        case "lease":
                            lease = await client.lease_grant(60)
                            assert await client.lease_keep_alive(lease) > 0
                        case _:
                            # Only the watch finds out; the writer is somebody else.
                            waiting = asyncio.ensure_future(anext(batches))
                            secure_etcd.etcdctl("put", key, "3", user="root:root")
                            ((_, item),) = (await waiting).events
                            assert item.value == b"3"
                    await client.get(key)
                    assert client._calls.tokens._token != token

    asyncio.run(scene())


def test_rights_given_meanwhile_are_used_without_a_restart(
    secure_etcd: EtcdServer, certificates: Certificates, client_of: Any
) -> None:
    async def scene() -> None:
        async with client_of(secure_etcd.endpoint, tls=certificates.client, **USER) as client:
            await client.get("/holdfast/a")
            secure_etcd.etcdctl(
                *("role", "grant-permission", "controller", "--prefix=true"),
                *("readwrite", "/more/"),
                user="root:root",
            )
            assert (await client.txn([absent("/more/a")], [Put("/more/a", b"1")])).succeeded

    asyncio.run(scene())


def test_a_user_at_a_store_without_users_is_no_error_and_may_be_needed_later(
    etcd: EtcdServer, client_of: Any
) -> None:
    async def scene() -> None:
        async with client_of(etcd.endpoint, user="root", password="root") as client:
            assert (await client.txn([absent("/a")], [Put("/a", b"1")])).succeeded
            etcd.etcdctl("user", "add", "root:root")
            etcd.etcdctl("user", "grant-role", "root", "root")
            etcd.etcdctl("auth", "enable")
            assert (await client.txn([absent("/b")], [Put("/b", b"1")])).succeeded
            assert client._calls.tokens._token

    asyncio.run(scene())


@pytest.mark.parametrize("which", ["distrusting", "anonymous"])
def test_without_mutual_trust_nothing_is_sent(
    secure_etcd: EtcdServer, certificates: Certificates, client_of: Any, which: str
) -> None:
    async def scene() -> None:
        tls = getattr(certificates, which)
        async with client_of(
            secure_etcd.endpoint, tls=tls, request_timeout_seconds=1.0, **USER
        ) as client:
            with pytest.raises(EtcdUnavailable) as failure:
                await client.txn([absent("/holdfast/a")], [Put("/holdfast/a", b"1")])
            assert not failure.value.maybe_applied
            if which == "distrusting":
                assert "certificate" in str(failure.value).lower()

    asyncio.run(scene())


def test_plain_text_towards_tls_is_unavailable(secure_etcd: EtcdServer, client_of: Any) -> None:
    async def scene() -> None:
        plain = f"127.0.0.1:{secure_etcd.client_port}"
        async with client_of(plain, request_timeout_seconds=1.0) as client:
            with pytest.raises(EtcdUnavailable) as failure:
                await client.txn([absent("/holdfast/a")], [Put("/holdfast/a", b"1")])
            assert not failure.value.maybe_applied

    asyncio.run(scene())
