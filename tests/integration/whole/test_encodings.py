"""A guest is protected in every encoding in turn while it runs, and then its host dies."""

from typing import Any

import pytest

from holdfast_api.messages import PolicyPatch
from holdfast_api.records import EncodingPolicy, Policy

pytestmark = [pytest.mark.qemu, pytest.mark.netns, pytest.mark.etcd]

WAYS: tuple[EncodingPolicy, ...] = ("delta", "zstd", "none", "delta-zstd")
KEYS = 40


def test_a_guest_survives_its_host_however_its_checkpoints_were_encoded(cluster: Any) -> None:
    cluster.protect(Policy(encoding="delta-zstd"))
    client = cluster.counting()
    redis = cluster.lab.redis("vm", timeout_seconds=60)
    for way in WAYS:
        cluster.client.change("vm", PolicyPatch(encoding=way))
        cluster.wait_for(
            f"its primary sends {way}",
            lambda way=way: (
                (report := cluster.protection().primary_report) and report.encoding == way
            ),
        )
        for number in range(KEYS):
            redis.command("SET", f"key{number}", f"{way} {number} " * 100)
        cluster.goes_on(client)
    counters = cluster.protection().primary_report.counters
    assert counters["delta_pages"] > 0
    assert counters["encoded_bytes"] < counters["content_bytes"]
    generation, backup = cluster.protection().generation, cluster.protection().backup
    assert generation == 2, "frames were refused"
    cluster.lab.kill("h1")
    cluster.wait_primary(backup)
    for number in range(KEYS):
        assert redis.command("GET", f"key{number}") == f"{WAYS[-1]} {number} " * 100
    redis.close()
    cluster.goes_on(client)
