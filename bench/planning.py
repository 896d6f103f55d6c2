"""How long one pass of the planner takes over 1,000 hosts and 10,000 protections. Pure.

Situations go from "nothing to do" to "a tenth of the hosts is dead and every claim is won". What a
host and a VM look like here, `control_plane` uses too.

    python -m bench.planning [--hosts 1000] [--protections 10000]
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

from holdfast_api.records import HostFacts, HostSettings, Policy, ProtectionRecord, VmFacts
from holdfast_api.words import HostId, Phase, Role, VmId
from holdfast_controller.core.planner import ChangeProtection, plan
from holdfast_controller.core.view import HeartbeatView, Held, HostView, ProtectionView, View

GIBIBYTE = 1024**3
RACKS = 20
PASSES = 5
RECORD_REVISION = 10

# --- hosts and VMs ----------------------------------------------------------------------------


def host_name(number: int) -> HostId:
    """Return a host's name; sorted as they are numbered."""
    return f"h{number:04d}"


def facts_of(number: int) -> HostFacts:
    """Return what a host says of itself."""
    return HostFacts(
        peer_address=f"10.0.{number // 250}.{number % 250}:7600",
        memory_total_bytes=256 * GIBIBYTE,
        memory_available_bytes=(64 + number % 7) * GIBIBYTE,
        qemu_version="7.2.22",
        machine_types=("pc-q35-7.2", "pc-i440fx-7.2"),
        accelerators=("kvm", "tcg"),
        trackers=("pagemap-scan",),
        bridges=("br0",),
        agent_version="0.1.0",
    )


def vm_of(vm: VmId) -> VmFacts:
    """Return what a host says of a VM."""
    return VmFacts(
        vm=vm,
        running=True,
        memory_bytes=2 * GIBIBYTE,
        vcpus=2,
        machine_type="pc-q35-7.2",
        qemu_version="7.2.22",
        accelerator="kvm",
        bridges=("br0",),
        pid=4711,
    )


def pair_of(vm_number: int, host_count: int) -> tuple[int, int]:
    """Return the numbers of a VM's primary and backup; all hosts get as many of each."""
    primary = vm_number % host_count
    distance = 1 + (vm_number // host_count) * 97 % (host_count - 1)
    return primary, (primary + distance) % host_count


def record_of(vm: VmId, primary: HostId, backup: HostId | None) -> ProtectionRecord:
    """Return a protection that is as well as can be, or has lost its backup."""
    return ProtectionRecord(
        vm=vm,
        generation=3,
        phase=Phase.UNPROTECTED if backup is None else Phase.PROTECTED,
        primary=primary,
        backup=backup,
        policy=Policy(),
        unprotected_since=1.0 if backup is None else None,
    )


# --- planning -------------------------------------------------------------------------------------


def view_of(host_count: int, vm_count: int, *, unprotected: int = 0) -> View:
    """Return a world of protected VMs, the first `unprotected` of which have lost their backup."""
    vms: list[dict[VmId, VmFacts]] = [{} for _ in range(host_count)]
    held: list[dict[VmId, Held]] = [{} for _ in range(host_count)]
    protections = {}
    for number in range(vm_count):
        vm = f"vm{number:05d}"
        primary, backup = pair_of(number, host_count)
        vms[primary][vm] = vm_of(vm)
        held[primary][vm] = Held(vm, 3, Role.PRIMARY)
        alone = number < unprotected
        if not alone:
            held[backup][vm] = Held(vm, 3, Role.BACKUP)
        record = record_of(vm, host_name(primary), None if alone else host_name(backup))
        protections[vm] = ProtectionView(record, RECORD_REVISION)
    hosts = {}
    for number in range(host_count):
        name = host_name(number)
        hosts[name] = HostView(
            host=name,
            settings=HostSettings(labels={"rack": f"r{number % RACKS}"}),
            settings_revision=5,
            present=True,
            heartbeat=HeartbeatView(20, facts_of(number), vms[number], {}, held[number]),
        )
    return View(revision=20, now_seconds=0.0, hosts=hosts, protections=protections)


def without_heartbeats(view: View, dead: Sequence[HostId]) -> View:
    """Return the same world after the leases of `dead` have expired."""
    gone = {name: replace(view.hosts[name], heartbeat=None) for name in dead}
    return replace(view, hosts=dict(view.hosts) | gone)


def claimed(view: View, dead: Sequence[HostId]) -> View:
    """Return the same world after every living side that lost its peer to `dead` has claimed."""
    lost, protections, hosts = set(dead), dict(view.protections), dict(view.hosts)
    for vm, known in view.protections.items():
        record = known.record
        sides = (record.primary, record.backup)
        living = [side for side in sides if side is not None and side not in lost]
        if len(living) != 1:
            continue
        winner = hosts[living[0]]
        assert winner.heartbeat is not None
        reported = dict(winner.heartbeat.vms) | {vm: vm_of(vm)}
        hosts[winner.host] = replace(winner, heartbeat=replace(winner.heartbeat, vms=reported))
        protections[vm] = ProtectionView(record_of(vm, winner.host, None), RECORD_REVISION)
    return replace(view, hosts=hosts, protections=protections)


def planning(host_count: int = 1000, vm_count: int = 10_000) -> None:
    """Print how long one pass takes in each situation."""
    print(f"{host_count} hosts, {vm_count} protections; one pass of the planner, {PASSES} runs")
    steady = view_of(host_count, vm_count)
    dead = [host_name(number) for number in range(0, host_count, 10)]
    silent = without_heartbeats(steady, dead)
    tenth = vm_count // 10
    situations = {
        "nothing to do": steady,
        f"{tenth} need a backup at once": view_of(host_count, vm_count, unprotected=tenth),
        f"{len(dead)} hosts fell silent": silent,
        f"{len(dead)} hosts are dead, all claims are won": claimed(silent, dead),
    }
    for name, view in situations.items():
        seconds = []
        for _ in range(PASSES):
            begun = time.perf_counter()
            planned = plan(view)
            seconds.append(time.perf_counter() - begun)
        changes = sum(isinstance(step, ChangeProtection) for step in planned.steps)
        print(
            f"  {name:45s} median {statistics.median(seconds) * 1000:7.1f} ms, "
            f"max {max(seconds) * 1000:7.1f} ms; {len(planned.steps)} steps, "
            f"{changes} of them change a protection"
        )


def main() -> None:
    """Measure, with other sizes if asked for."""
    parser = argparse.ArgumentParser(description="passes of the planner")
    parser.add_argument("--hosts", type=int, default=1000)
    parser.add_argument("--protections", type=int, default=10_000)
    options = parser.parse_args()
    planning(options.hosts, options.protections)


if __name__ == "__main__":
    main()
