"""The guest: boots, serves Redis, rewrites memory, shuts itself down."""

from pathlib import Path

import pytest

from holdfast_lab import processes
from holdfast_lab.clients import REDIS_PORT, CountingClient, RedisConnection
from holdfast_lab.errors import LabError, LabRefused
from holdfast_lab.lab import Lab
from holdfast_lab.processes import Process
from holdfast_lab.vm import VmOptions

from .conftest import eventually

pytestmark = [pytest.mark.netns, pytest.mark.qemu, pytest.mark.etcd]


def written_bytes(process: Process) -> int:
    """Return how much memory of a process is resident and its own or shared."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def test_a_small_guest_counts_and_shuts_itself_down(lab: Lab) -> None:
    lab.run_vm("redis", "h1", VmOptions(memory_mb=128))
    service = lab.state.processes["vm redis on h1"]
    with pytest.raises(LabRefused, match="runs already"):
        lab.run_vm("redis", "h2")
    client = CountingClient(lab.redis("redis"))
    client.start()
    assert client.wait_for_count(200, 60)
    seen = client.stop()
    assert (seen.wrong, seen.fault) == ([], None)
    lab.power_off_vm("redis")
    assert eventually(lambda: not processes.is_alive(service))
    assert not lab.network.has_interface("h1", "redis-1n0"), "its tap is left"
    lab.run_vm("redis", "h2", wait=False)
    assert lab.network.has_interface("h2", "redis-2n0")


def test_a_guest_with_everything_serves_on_both_nics_and_rewrites_memory(lab: Lab) -> None:
    options = VmOptions(
        memory_mb=256, vcpus=2, shared_memory=True, nics=2, dirty_mb=100, dirty_pps=2000
    )
    vm = lab.run_vm("all", "h2", options)
    for address in vm.addresses:
        with RedisConnection(lab.connect(address, REDIS_PORT)) as redis:
            assert redis.command("SET", "where", address) == "OK"
            assert redis.command("GET", "where") == address
    service = lab.state.processes["vm all on h2"]
    assert eventually(lambda: written_bytes(service) > 100 << 20)
    lab.kill("h2")
    assert not processes.is_alive(service)


def test_memory_above_the_gap_below_four_gibibytes_is_the_guests_too(lab: Lab) -> None:
    lab.run_vm("large", "h1", VmOptions(memory_mb=3584))
    with lab.redis("large") as redis:
        facts = str(redis.command("INFO", "memory"))
    total = int(facts.split("total_system_memory:")[1].split(maxsplit=1)[0])
    assert total > 3300 << 20


def test_a_qemu_that_refuses_to_start_is_named_with_its_reason(lab: Lab) -> None:
    with lab.folder.change() as state:
        state.accelerator = "nonsense"
    with pytest.raises(LabError, match=r"vm bad on h1 ended by itself(.|\n)*nonsense"):
        lab.run_vm("bad", "h1")
