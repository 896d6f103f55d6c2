"""Everything that the campaign does to a lab, and how likely each is. Start at `FAULTS`.

A fault is a function that is told the scene and one VM; it breaks something near this VM, says what
it breaks before it does, and leaves a way to mend it with the scene. It may find nothing to break
(no backup at the moment): then it returns False and nothing happened.
"""

import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from tests.chaos.scene import AGENT, QEMU, UNLIMITED, WORKER, Scene

from holdfast_api.errors import HoldfastError
from holdfast_api.words import Phase
from holdfast_lab import control_plane
from holdfast_lab.errors import LabRefused

FROZEN_SECONDS_MAX = 120.0
"""The campaign thaws earlier; this is for a campaign that dies."""

Do = Callable[[Scene, str], bool]
Hosts = Callable[[Scene, str], list[str]]


@dataclass(frozen=True)
class Fault:
    """One thing that can go wrong, and how often beside the others."""

    name: str
    weight: float
    do: Do


# --- which hosts a fault is about -----------------------------------------------------------------


def primary_of(scene: Scene, vm: str) -> list[str]:
    """Return the host that runs the VM, if that is known and it has power."""
    now = scene.protection(vm)
    return [h for h in scene.hosts if now is not None and h == now.primary]


def backup_of(scene: Scene, vm: str) -> list[str]:
    """Return the host of its backup, if there is one."""
    now = scene.protection(vm)
    return [h for h in scene.hosts if now is not None and h == now.backup]


def pair_of(scene: Scene, vm: str) -> list[str]:
    """Return primary and backup, in either order; nothing if one of them is missing."""
    pair = [*primary_of(scene, vm), *backup_of(scene, vm)]
    scene.random.shuffle(pair)
    return pair if len(pair) == 2 else []


def any_host(scene: Scene, vm: str) -> list[str]:
    """Return any host, whatever it does."""
    del vm
    return [scene.random.choice(scene.hosts)] if scene.hosts else []


# --- hosts ----------------------------------------------------------------------------------------


def lose_power(which: Hosts, scene: Scene, vm: str) -> bool:
    """All processes of these hosts are gone at once, and nothing leaves them any more."""
    hosts = which(scene, vm)
    for host in hosts:
        scene.act(f"{host} loses power", host, destroys=True)
        scene.lab.kill(host)
        scene.to_mend(f"power for {host}", partial(scene.lab.revive, host))
    return bool(hosts)


def stand_still(which: Hosts, scene: Scene, vm: str) -> bool:
    """Nothing on these hosts runs for a while: processes, QEMUs, all."""
    hosts = which(scene, vm)
    for host in hosts:
        pids = scene.pids(host, AGENT) + scene.pids(host, WORKER) + scene.pids(host, QEMU)
        scene.act(f"{host} stands still", host)
        scene.signal(pids, signal.SIGSTOP)
        scene.to_mend(f"{host} runs again", partial(scene.signal, pids, signal.SIGCONT))
    return bool(hosts)


def fill_disk(which: Hosts, scene: Scene, vm: str) -> bool:
    """Nobody on these hosts can write to a file."""
    hosts = which(scene, vm)
    for host in hosts:
        scene.act(f"the disk of {host} is full", host)
        scene.limit_files(host, 0)
        scene.to_mend(f"{host} has room again", partial(scene.limit_files, host, UNLIMITED))
    return bool(hosts)


def stop_clock(which: Hosts, scene: Scene, vm: str) -> bool:
    """For the agent and the workers of these hosts no time passes; then it jumps."""
    hosts = which(scene, vm)
    for host in hosts:
        scene.act(f"the clock of {host} stops", host)
        scene.lab.stop_clock(host)
        scene.to_mend(f"the clock of {host} runs", partial(scene.lab.run_clock, host))
    return bool(hosts)


# --- processes ------------------------------------------------------------------------------------


def kill_process(which: Hosts, program: str, scene: Scene, vm: str) -> bool:
    """A worker or a QEMU of the VM dies."""
    hosts = which(scene, vm)
    backup = backup_of(scene, vm)
    found = [(host, pid) for host in hosts for pid in scene.pids(host, program, vm)]
    for host, pid in found:
        # A primary's worker holds nothing; a backup's holds the checkpoint.
        destroys = program == QEMU or [host] == backup
        scene.act(f"{program} of {vm} on {host} is killed", host, vm=vm, destroys=destroys)
        scene.signal([pid], signal.SIGKILL)
    return bool(found)


def freeze_process(which: Hosts, program: str, scene: Scene, vm: str) -> bool:
    """A worker or a QEMU of the VM stands still for a while."""
    hosts = which(scene, vm)
    found = [(host, pid) for host in hosts for pid in scene.pids(host, program, vm)]
    for host, pid in found:
        scene.act(f"{program} of {vm} on {host} is frozen", host, vm=vm)
        scene.signal([pid], signal.SIGSTOP)
        scene.to_mend(f"it is thawed on {host}", partial(scene.signal, [pid], signal.SIGCONT))
    return bool(found)


def kill_agent(which: Hosts, scene: Scene, vm: str) -> bool:
    """The agent of these hosts dies; what it started lives on."""
    return _kill_services(scene, [f"agent {host}" for host in which(scene, vm)])


def freeze_agent(which: Hosts, scene: Scene, vm: str) -> bool:
    """The agent of these hosts stands still for a while."""
    return _freeze_services(scene, [f"agent {host}" for host in which(scene, vm)])


# --- the control plane ----------------------------------------------------------------------------


def kill_some(kind: str, count: int, scene: Scene, vm: str) -> bool:
    """So many controllers or members of etcd die."""
    del vm
    return _kill_services(scene, scene.random.sample(scene.services(kind), count))


def freeze_some(kind: str, count: int, scene: Scene, vm: str) -> bool:
    """So many controllers or members of etcd stand still for a while."""
    del vm
    return _freeze_services(scene, scene.random.sample(scene.services(kind), count))


def _kill_services(scene: Scene, services: Iterable[str]) -> bool:
    done = False
    for service in services:
        try:
            scene.act(f"{service} is killed", *_host_of(service))
            scene.lab.kill(service)
        except LabRefused:  # it is dead already
            continue
        scene.to_mend(f"{service} is started", partial(scene.lab.start, service))
        done = True
    return done


def _freeze_services(scene: Scene, services: Iterable[str]) -> bool:
    done = False
    for service in services:
        try:
            scene.act(f"{service} is frozen", *_host_of(service))
            scene.lab.freeze(service, seconds=FROZEN_SECONDS_MAX)
        except LabRefused:
            continue
        scene.to_mend(f"{service} is thawed", partial(scene.lab.thaw, service))
        done = True
    return done


def _host_of(service: str) -> list[str]:
    """A host without its agent is slow to claim, and may be given up as a backup."""
    kind, _, host = service.partition(" ")
    return [host] if kind == "agent" else []


# --- the network ----------------------------------------------------------------------------------


def cut_pair(one_way: bool, scene: Scene, vm: str) -> bool:
    """Primary and backup do not hear each other any more, or one does not hear the other."""
    pair = pair_of(scene, vm)
    if not pair:
        return False
    scene.act(f"cut {pair[0]} {'to' if one_way else 'and'} {pair[1]}", *pair)
    scene.lab.cut(*pair, one_way=one_way)
    scene.to_mend("the cut is healed", scene.lab.heal)
    return True


def cut_from_control(which: Hosts, one_way: bool, scene: Scene, vm: str) -> bool:
    """Hosts and the whole control plane do not hear each other any more."""
    hosts = which(scene, vm)
    for host in hosts:
        ends = [host, "control"]
        scene.random.shuffle(ends)
        scene.act(f"cut {ends[0]} {'to' if one_way else 'and'} {ends[1]}", host)
        scene.lab.cut(*ends, one_way=one_way)
        scene.to_mend("the cut is healed", scene.lab.heal)
    return bool(hosts)


def isolate(which: Hosts, scene: Scene, vm: str) -> bool:
    """A host hears nobody of Holdfast any more; the guests' own network is whole."""
    hosts = which(scene, vm)
    for host in hosts:
        scene.act(f"{host} is cut off from all", host)
        for other in [*scene.lab.state.hosts, "control"]:
            if other != host:
                scene.lab.cut(host, other)
        scene.to_mend("the cuts are healed", scene.lab.heal)
    return bool(hosts)


def isolate_member(kind: str, scene: Scene, vm: str) -> bool:
    """A controller or a member of etcd hears nobody any more."""
    del vm
    member = scene.random.choice(scene.services(kind))
    state = scene.lab.state
    scene.act(f"{member} is cut off from all")
    for other in [*control_plane.all_names(state), *state.hosts]:
        if other != member:
            scene.lab.cut(member, other)
    scene.to_mend("the cuts are healed", scene.lab.heal)
    return True


# --- the operator ---------------------------------------------------------------------------------


def switch_over(scene: Scene, vm: str) -> bool:
    """Somebody asks for a planned switchover."""
    now = scene.protection(vm)
    if now is None or now.phase is not Phase.PROTECTED or now.backup is None:
        return False
    scene.act(f"switchover of {vm}", now.primary, now.backup, vm=vm)
    try:
        scene.api.switchover(vm)
    except HoldfastError as refusal:
        scene.said.append(f"it was refused: {refusal}")
    return True


def _fault(name: str, weight: float, do: Callable[..., bool], *words: object) -> Fault:
    return Fault(name, weight, partial(do, *words))


ETCD, CONTROLLER = control_plane.ETCD, control_plane.CONTROLLER
FAULTS = (
    _fault("power of the primary", 14, lose_power, primary_of),
    _fault("power of the backup", 2, lose_power, backup_of),
    _fault("power of both", 0.7, lose_power, pair_of),
    _fault("QEMU of the primary killed", 7, kill_process, primary_of, QEMU),
    _fault("QEMU of the backup killed", 1.5, kill_process, backup_of, QEMU),
    _fault("worker of the primary killed", 4, kill_process, primary_of, WORKER),
    _fault("worker of the backup killed", 1.5, kill_process, backup_of, WORKER),
    _fault("worker of the primary frozen", 4, freeze_process, primary_of, WORKER),
    _fault("worker of the backup frozen", 1.5, freeze_process, backup_of, WORKER),
    _fault("QEMU of the primary frozen", 3, freeze_process, primary_of, QEMU),
    _fault("QEMU of the backup frozen", 1, freeze_process, backup_of, QEMU),
    _fault("agent killed", 2, kill_agent, any_host),
    _fault("agent of the backup killed", 1, kill_agent, backup_of),
    _fault("agent frozen", 2, freeze_agent, any_host),
    _fault("host of the primary stands still", 3, stand_still, primary_of),
    _fault("host of the backup stands still", 1, stand_still, backup_of),
    _fault("disk full", 1, fill_disk, any_host),
    _fault("clock of the primary stopped", 1.5, stop_clock, primary_of),
    _fault("clock of the backup stopped", 1.5, stop_clock, backup_of),
    _fault("controller killed", 2, kill_some, CONTROLLER, 1),
    _fault("controller frozen", 2, freeze_some, CONTROLLER, 1),
    _fault("two controllers frozen", 0.7, freeze_some, CONTROLLER, 2),
    _fault("member of etcd killed", 2, kill_some, ETCD, 1),
    _fault("member of etcd frozen", 2, freeze_some, ETCD, 1),
    _fault("two members of etcd killed", 0.7, kill_some, ETCD, 2),
    _fault("two members of etcd frozen", 0.7, freeze_some, ETCD, 2),
    _fault("member of etcd cut off", 1, isolate_member, ETCD),
    _fault("controller cut off", 1, isolate_member, CONTROLLER),
    _fault("pair cut", 3, cut_pair, False),
    _fault("pair cut one way", 2, cut_pair, True),
    _fault("primary cut from control", 1, cut_from_control, primary_of, False),
    _fault("primary cut from control one way", 0.7, cut_from_control, primary_of, True),
    _fault("backup cut from control", 1, cut_from_control, backup_of, False),
    _fault("primary cut off", 3, isolate, primary_of),
    _fault("backup cut off", 1, isolate, backup_of),
    _fault("switchover", 1, switch_over),
)
