"""Certificates of a whole cluster: exchanged under a protected VM, and in the wrong place."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest

from holdfast_api import pki
from holdfast_api.records import Policy
from holdfast_api.words import EventKind

pytestmark = [pytest.mark.qemu, pytest.mark.netns, pytest.mark.etcd]


def test_an_authority_is_exchanged_under_a_protected_vm(cluster: Any) -> None:
    folder = cluster.lab.folder.authority
    protection = cluster.protect(Policy(keepalive_misses=60))  # no failover by a busy machine
    client = cluster.counting()
    cluster.goes_on(client)
    pki.rotate_authority(folder)
    for host in cluster.lab.state.hosts:
        pki.issue(folder, host, renew=True)
    assert pki.retire_authorities(folder) == 1
    cluster.goes_on(client)
    assert cluster.protection().generation == protection.generation  # what stood goes on
    cluster.lab.kill(protection.backup)
    cluster.wait_for(  # the new ones are used
        "another host backs it up",
        lambda: cluster.protection().backup not in (None, protection.backup),
    )
    cluster.wait_protected(primary=protection.primary)
    cluster.goes_on(client)


def test_a_host_with_anothers_certificate_backs_up_nothing_until_it_has_its_own(
    make_cluster: Callable[..., Any],
) -> None:
    cluster = make_cluster(2)
    folder = cluster.lab.folder.authority
    wrong = pki.issue(folder, "h9")
    for name in (pki.HOST_FILE, pki.HOST_KEY_FILE):
        shutil.copy(wrong / name, folder / "hosts" / "h2" / name)
    cluster.run_vm()
    client = cluster.counting()
    cluster.client.protect("vm", policy=Policy())
    cluster.wait_for(
        "the wrong name is said",
        lambda: any(
            "answers h9 by its certificate, and not h2" in event.message
            for event in cluster.events(EventKind.BACKUP_DROPPED)
        ),
    )
    cluster.goes_on(client)
    pki.issue(folder, "h2", renew=True)
    assert cluster.wait_protected(primary="h1").backup == "h2"
    cluster.goes_on(client)
