"""Etcd's quota is used up: all is readable, nothing can be decided, and it is said why."""

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.controller.conftest import Controller, Etcd, Scene, eventually, ok, problem

from holdfast_controller.adapters.etcd import DeletePrefix, EtcdClient, EtcdOutOfSpace, Put
from holdfast_lab.paths import find_tool

pytestmark = pytest.mark.etcd

QUOTA_BYTES = 4 * 1024 * 1024
FILLER_BYTES = 256 * 1024


@pytest.fixture
def small_etcd(tmp_path: Path) -> Iterator[Etcd]:
    """A store that is soon full."""
    server = Etcd(tmp_path)
    server.command += ["--quota-backend-bytes", str(QUOTA_BYTES)]
    try:
        server.start()
        yield server
    finally:
        server.end()


def fill(etcd: Etcd) -> None:
    async def body() -> None:
        client = EtcdClient([etcd.endpoint])
        try:
            for number in range(2 * QUOTA_BYTES // FILLER_BYTES):
                await client.txn([], [Put(f"filler/{number}", b"x" * FILLER_BYTES)])
        finally:
            await client.close()

    with pytest.raises(EtcdOutOfSpace):
        asyncio.run(body())


def make_room(etcd: Etcd) -> None:
    """Do what an operator does."""

    async def body() -> None:
        client = EtcdClient([etcd.endpoint])
        try:
            done = await client.txn([], [DeletePrefix("filler/")])
            await client.compact(done.revision)
        finally:
            await client.close()

    asyncio.run(body())
    for words in (["defrag"], ["alarm", "disarm"]):
        subprocess.run(
            [find_tool("etcdctl"), f"--endpoints=http://{etcd.endpoint}", *words],
            check=True,
            capture_output=True,
            timeout=60,
        )


def test_a_full_store_is_readable_decides_nothing_says_why_and_recovers(
    small_etcd: Etcd, tmp_path: Path
) -> None:
    controller = Controller(tmp_path, small_etcd, "controller", heartbeat_ttl_seconds=60)
    try:
        controller.start()
        scene = Scene(controller)
        one, two = scene.host("one"), scene.host("two")
        generation = scene.become_protected(one)["generation"]
        fill(small_etcd)
        controller.wait_not_ready()
        eventually("it says why", lambda: "quota" in controller.get("/readyz").text)
        said = problem(controller.get("/readyz"), 503, "store-unavailable")
        assert "alarm" in said["detail"], "what to do about it"
        for _ in range(3):
            assert controller.protection(scene.vm)["generation"] == generation
            hosts = ok(controller.get("/v1/hosts"))["hosts"]
            assert {host["host"] for host in hosts if host["alive"]} >= {one.name, two.name}
            for refused in (
                two.claim(scene.vm, generation),
                one.try_beat(),
                controller.put("/v1/policies/p", {}),
            ):
                detail = problem(refused, 503, "store-unavailable")["detail"]
                assert "space exceeded" in detail
        assert "holdfast_store_reachable 1.0" in controller.get("/metrics").text
        assert "Traceback" not in controller.text()
        make_room(small_etcd)
        controller.wait_ready()
        verdict = ok(two.claim(scene.vm, generation))
        assert (verdict["won"], verdict["record"]["generation"]) == (True, generation + 1)
        assert len(controller.events(scene.vm, "FailedOver")) == 1
    finally:
        controller.close()
