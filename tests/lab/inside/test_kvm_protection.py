"""Whole protections of KVM guests, in a lab of hosts inside one booted host.

The booted host emulates SVM, so its guests run under real KVM: page faults, in-kernel interrupt
controllers and clocks, and vhost are what they are on a hypervisor.
"""

import os
import subprocess
from collections.abc import Callable, Iterator

import pytest
from tests.integration.whole.conftest import Cluster

from holdfast_api.records import Policy
from holdfast_api.words import EventKind
from holdfast_lab.lab import Lab
from holdfast_lab.vm import VmOptions

SLOWER = 8
"""Times as long to wait for everything: Python is that much slower in here."""
PATIENT = Policy(interval_ms=200, keepalive_ms=500, keepalive_misses=10)
GUEST = VmOptions(memory_mb=128, vcpus=2, graphics=False, cpu="max,cx16=off")
TRACKER = "pagemap-scan" if os.uname().release >= "6.7" else "soft-dirty"


class SlowCluster(Cluster):
    """A cluster that is waited for longer."""

    def wait_for(self, what: str, probe: Callable[[], bool], seconds: float = 60.0) -> None:
        super().wait_for(what, probe, seconds * SLOWER)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("HOLDFAST_LAB_PATIENCE", str(SLOWER))
    # A heartbeat that takes longer than it may is a host that is gone.
    monkeypatch.setenv("HOLDFAST_CONTROLLER_HEARTBEAT_TTL_SECONDS", "120")
    subprocess.run(["modprobe", "-a", "kvm_amd", "tun", "bridge", "veth"], check=True)
    with Lab.up(2, "kvm", accelerator="kvm") as lab:
        cluster = SlowCluster(lab)
        try:
            yield cluster
        finally:
            cluster.close()


def test_a_kvm_guest_of_two_cpus_survives_its_host(cluster: Cluster) -> None:
    cluster.run_vm("h1", GUEST)
    facts = cluster.client.vm("vm").facts
    assert facts is not None
    assert facts.accelerator == "kvm"
    cluster.protect(PATIENT)
    client = cluster.counting()
    cluster.goes_on(client)
    cluster.lab.kill("h1")
    cluster.wait_primary("h2")
    cluster.goes_on(client)
    assert len(cluster.events(EventKind.FAILED_OVER)) == 1
