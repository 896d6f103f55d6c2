"""Control planes of three etcd members and three controllers, each on a machine of its own."""

from collections.abc import Iterator

import pytest
from tests.integration.replicated.plane import Plane, lab_name
from tests.integration.whole.conftest import Cluster

from holdfast_lab.lab import Lab

CONTROL_PLANE = ("etcd", "controller")


@pytest.fixture(scope="module")
def standing_plane() -> Iterator[Plane]:
    """A control plane without agents, for all tests of a file."""
    with Lab.up(1, lab_name("rp"), controllers=3, etcd=3, components=CONTROL_PLANE) as lab:
        plane = Plane(lab)
        yield plane
        plane.close()


@pytest.fixture
def plane(standing_plane: Plane) -> Iterator[Plane]:
    """The same, whole at the start and mended at the end of the test."""
    standing_plane.wait_ready()
    yield standing_plane
    standing_plane.mend()


class Stand:
    """A protected VM under a counting client, on three hosts, with a replicated control plane."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.plane = Plane(lab)
        self.cluster = Cluster(lab)
        self.cluster.run_vm()
        self.cluster.protect()
        self.client = self.cluster.counting(rest_seconds=0.02)
        """Counts over one connection, which lives through all tests of a file. Not as fast as it
        can: three members and three controllers need the processor, too."""

    def close(self) -> None:
        self.cluster.close()
        self.plane.close()


@pytest.fixture(scope="module")
def standing_stand() -> Iterator[Stand]:
    """Three hosts, a VM that is protected, for all tests of a file."""
    with Lab.up(3, lab_name("rs"), controllers=3, etcd=3) as lab:
        made = Stand(lab)
        yield made
        made.close()


@pytest.fixture
def stand(standing_stand: Stand) -> Iterator[Stand]:
    """The same, whole and protected at the start, mended at the end of the test."""
    standing_stand.cluster.wait_protected()
    yield standing_stand
    for host, powered in standing_stand.lab.state.hosts.items():
        if not powered:
            standing_stand.lab.revive(host)
    standing_stand.plane.mend()
    standing_stand.lab.wait_for_hosts(*standing_stand.lab.state.hosts)
