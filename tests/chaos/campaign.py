"""One campaign: episodes of faults in a lab, each followed by a demand that all is well again.

Makes and removes a lab with four hosts, three controllers and three members of etcd, and a witness
of its network. Everything that is chosen follows from the seed; what comes of it depends on the
machine, which is why the timeline is part of the report.

An episode begins with every VM protected. One to four faults are made within two seconds, they last
a while, everything is mended, and then every VM must be protected again, with its clients served
over the connections they always had. Only a VM whose both hosts were hurt may be lost; then the
control plane must say so, its address must stay silent, and another VM takes its place.
"""

import time
from random import Random

from tests.chaos.clients import RecordedVm
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.report import Episode, Report, Say
from tests.chaos.scene import Scene, until
from tests.chaos.witness import Witness

from holdfast_api.errors import HoldfastError
from holdfast_api.records import Event
from holdfast_api.words import EventKind, Phase
from holdfast_lab.errors import LabError
from holdfast_lab.lab import Lab
from holdfast_lab.vm import VmOptions

HOSTS, CONTROLLERS, MEMBERS = 4, 3, 3
VMS = 2
OPTIONS = VmOptions(memory_mb=128, graphics=False, dirty_mb=8, dirty_pps=300)
WELL_SECONDS = 150.0
"""Until all is well again: TTLs, a store that elects, seeding, TCP's own patience in the guest."""
LOSS_SECONDS = 60.0
BETWEEN_SECONDS_MAX = 1.0
LASTING_SECONDS_MAX = 6.0
FAULTS_AT_ONCE = (1, 1, 1, 1, 1, 1, 2, 2, 2, 3, 4)
SHORT_SECONDS = 0.6
EVENTS_AT_ONCE_MAX = 100_000


class Campaign:
    """A lab under fire."""

    def __init__(self, lab: Lab, witness: Witness, seed: int, report: Report, say: Say) -> None:
        """Own nothing but the clients; lab and witness are the caller's."""
        self.lab = lab
        self.witness = witness
        self.report = report
        self.scene = Scene(lab, Random(seed))
        self.vms: list[RecordedVm] = []
        self._random = Random(f"{seed} episodes")
        self._seed = seed
        self._say = say
        self._started = 0
        self._seen_position = 0

    def run(self, seconds: float) -> None:
        """Let episode follow episode for so long; stops early when something is not well."""
        try:
            for _ in range(VMS):
                self._start_vm()
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline and not self.report.violations:
                self._episode()
                self._testify()
        finally:
            self._end()

    # --- an episode -------------------------------------------------------------------------------

    def _episode(self) -> None:
        episode = Episode(len(self.report.episodes) + 1)
        self.report.episodes.append(episode)
        self.scene.begin([vm.name for vm in self.vms])
        try:
            for fault in self._choose():
                vm = self._random.choice(self.vms).name
                pause_seconds = self._random.uniform(0, BETWEEN_SECONDS_MAX)
                if fault.do(self.scene, vm):
                    episode.faults.append(fault.name)
                self._let_pass(pause_seconds)
            self._let_pass(self._lasting_seconds())
        finally:
            self.scene.mend()
            episode.timeline = self.scene.said
        mended = time.monotonic()
        is_well = until(WELL_SECONDS, lambda: self._is_settled(mended))
        episode.settled_seconds = time.monotonic() - mended
        self._judge(episode, mended, is_well=is_well)
        self._say(str(episode))

    def _let_pass(self, seconds: float) -> None:
        """Let faults last; a connection that broke already ends the waiting."""
        until(seconds, lambda: any(vm.faults() for vm in self.vms))

    def _choose(self) -> list[Fault]:
        weights = [fault.weight for fault in FAULTS]
        count = self._random.choice(FAULTS_AT_ONCE)
        return self._random.choices(FAULTS, weights, k=count)

    def _lasting_seconds(self) -> float:
        """Return how long faults last: mostly shorter than any patience, or longer than it."""
        if self._random.random() < 0.3:
            return self._random.uniform(0, SHORT_SECONDS)
        return self._random.uniform(SHORT_SECONDS, LASTING_SECONDS_MAX)

    # --- what must be true afterwards -------------------------------------------------------------

    def _is_settled(self, since: float) -> bool:
        """Tell whether the lab is whole and each VM is protected and served, or known as lost."""
        if self.scene.dead_services():
            return False
        alive = {host.host for host in self.scene.api.hosts().hosts if host.alive}
        return alive >= set(self.lab.state.hosts) and all(
            self._is_well(vm, since) or self._is_lost(vm) for vm in self.vms
        )

    def _is_well(self, vm: RecordedVm, since: float) -> bool:
        now = self.scene.api.protection(vm.name)
        return (
            now.phase is Phase.PROTECTED
            and now.primary_report is not None
            and now.backup_report is not None
            and self.scene.count_qemus(vm.name) == 2
            and (vm.all_answered_since(since) or bool(vm.faults()))
        )

    def _is_lost(self, vm: RecordedVm) -> bool:
        return self.scene.api.protection(vm.name).phase is Phase.ENDED

    def _judge(self, episode: Episode, mended: float, *, is_well: bool) -> None:
        events = self._new_events()
        for vm in list(self.vms):
            broken = vm.faults()
            if not is_well and not self._is_lost(vm):
                self._violated(f"{vm.name} was not well again: {self._why(vm, mended)}")
            elif self._is_lost(vm):
                self._lose(episode, vm, events)
            elif broken:
                self._violated(f"{vm.name} lives, but connections ended: {broken}")
        for event in events:
            self._note_failover(episode, event)
        self.report.note_windows(events)

    def _lose(self, episode: Episode, vm: RecordedVm, events: list[Event]) -> None:
        """Check that a VM may be lost and that it is said; put another in its place."""
        if not self.scene.standings[vm.name].may_be_lost:
            self._violated(f"{vm.name} was lost, and one of its hosts was never hurt")
        if not any(e.vm == vm.name and e.kind is EventKind.VM_LOST for e in events):
            self._violated(f"{vm.name} was lost, and no event says so")
        self.witness.declare_lost(vm.address)
        if not until(LOSS_SECONDS, lambda: self.scene.count_qemus(vm.name) == 0):
            self._violated(f"{vm.name} is lost, and a QEMU of it is still there")
        episode.lost.append(vm.name)
        self._close(vm)
        self.scene.api.unprotect(vm.name)
        self._start_vm()

    def _note_failover(self, episode: Episode, event: Event) -> None:
        running_ns = event.evidence.get("running_at_monotonic_ns")
        if event.kind is not EventKind.PROMOTED or not isinstance(running_ns, int):
            return
        vm = next((vm for vm in self.vms if vm.name == event.vm), None)
        stall = None if vm is None else vm.stall_seconds(running_ns / 1e9)
        episode.failovers += 1
        # A host whose clock stopped does not know when it began to run the guest.
        if stall is not None and not any("clock" in name for name in episode.faults):
            episode.stalls.append(stall)
            self.report.note_stall(stall, alone=len(episode.faults) == 1)

    def _new_events(self) -> list[Event]:
        events = []
        for event in self.scene.api.events(self._seen_position):
            events.append(event)
            if len(events) == EVENTS_AT_ONCE_MAX:
                break
        self._seen_position = max((e.position for e in events), default=self._seen_position)
        return events

    def _testify(self) -> None:
        """Take over what the witness saw so far."""
        for violation in self.witness.read().violations:
            self._violated(f"on the wire: {violation}")

    def _violated(self, text: str) -> None:
        if text not in self.report.violations:
            self.report.violations.append(text)
            self._say(f"VIOLATED: {text}")

    def _why(self, vm: RecordedVm, since: float) -> str:
        try:
            now = self.scene.api.protection(vm.name)
        except HoldfastError as error:
            return f"nobody says how it stands: {error}"
        return (
            f"{now.phase} on {now.primary} with {now.backup}, generation {now.generation} "
            f"({now.reason}); QEMUs: {self.scene.count_qemus(vm.name)}; clients served: "
            f"{vm.all_answered_since(since)}; connections ended: {vm.faults()}; "
            f"dead: {self.scene.dead_services()}"
        )

    # --- VMs --------------------------------------------------------------------------------------

    def _start_vm(self) -> None:
        """Start a VM, protect it, and let its clients begin. Raises LabError."""
        self._started += 1
        name = f"redis{self._started:03}"
        state = self.lab.run_vm(name, self._random.choice(self.scene.hosts), OPTIONS)
        self.witness.name_guest(state.addresses[0], name)
        if not until(WELL_SECONDS, lambda: self.scene.api.vm(name).host is not None):
            raise LabError(f"no controller hears of {name}")
        self.scene.api.protect(name)
        vm = RecordedVm(self.lab, name, self._seed)
        self.vms.append(vm)
        began = time.monotonic()
        if not until(WELL_SECONDS, lambda: self._is_well(vm, began)):
            raise LabError(f"{name} is not protected: {self._why(vm, began)}")
        self.report.vms += 1

    def _close(self, vm: RecordedVm) -> None:
        """End a VM's clients and hold what they saw against a counter."""
        vm.close()
        self.vms.remove(vm)
        self.report.operations += vm.count()
        for contradiction in vm.contradictions():
            self._violated(f"clients of {vm.name}: {contradiction}")

    def _end(self) -> None:
        for vm in list(self.vms):
            self._close(vm)
        self.scene.close()
