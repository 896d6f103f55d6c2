"""The rules, held at every step, with the number each has in docs/invariants.md.

Most rules are about a moment: something leaves, is acknowledged, is promoted, is written in the
store. They are asked there, before anything else can happen. `after_step` looks at all that lives.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from tests.scenarios.guest import Packet
from tests.simulation.guest import History
from tests.simulation.kernel import Kernel, RuleBroken
from tests.simulation.qemu import Qemu, Qemus

from holdfast_agent.checkpoint.primary import CAPTURE_FAILURES_MAX
from holdfast_agent.core.memory_map import PageRows
from holdfast_api import transitions
from holdfast_api.records import Event, ProtectionRecord
from holdfast_api.words import ClaimReason, EventKind, Phase, Role
from holdfast_controller.adapters.etcd import KeyValue
from holdfast_controller.adapters.keys import Kind, split_key

if TYPE_CHECKING:
    from tests.simulation.worker import Worker

Pair = tuple[str, int]
"""A VM and a generation."""


@dataclass
class Generation:
    """What both sides did in one generation of one VM."""

    acknowledged: int = 0
    acknowledger: object = None
    stood: dict[int, PageRows] = field(default_factory=dict)
    """Memory of the primary as each of its last checkpoints has it."""
    speakers: set[str] = field(default_factory=set)
    claimants: set[str] = field(default_factory=set)


class Rules:
    """All that must hold, and the counts of what happened."""

    def __init__(self, kernel: Kernel, qemus: Qemus, histories: dict[str, History]) -> None:
        self.kernel = kernel
        self.totals: Counter[str] = Counter()
        self.records: dict[str, ProtectionRecord] = {}
        self.incarnations: dict[str, int] = {}
        self.lost: set[tuple[str, int]] = set()
        """VM and incarnation of whatever was said to be lost or ended."""
        self._qemus = qemus
        self._histories = histories
        self._generations: dict[Pair, Generation] = {}

    def generation(self, vm: str, number: int) -> Generation:
        return self._generations.setdefault((vm, number), Generation())

    # --- the store --------------------------------------------------------------------------------

    def store_changed(self, before: KeyValue | None, after: KeyValue) -> None:
        found = split_key(after.key)
        if found is None:
            return
        if found[0] is Kind.EVENTS:
            self._event(Event.model_validate_json(after.value))
        elif found[0] is Kind.PROTECTIONS:
            was = None if before is None else ProtectionRecord.model_validate_json(before.value)
            self._record_changed(was, ProtectionRecord.model_validate_json(after.value))

    def _event(self, event: Event) -> None:
        names = {
            EventKind.CLAIM_LOST: "losses",
            EventKind.PROMOTED: "promotions told",
            EventKind.VM_DESTROYED: "VMs destroyed",
            EventKind.SWITCHOVER_REQUESTED: "switchovers wanted",
            EventKind.BACKUP_DROPPED: "backups dropped",
        }
        if event.kind in names:
            self.totals[names[event.kind]] += 1
        self.kernel.log("event", f"{event.kind}: {event.message}")

    def _record_changed(self, was: ProtectionRecord | None, now: ProtectionRecord) -> None:
        self.records[now.vm] = now
        text = f"{now.vm} g{now.generation} {now.phase}, primary {now.primary}"
        self.kernel.log("store", text + (f", backup {now.backup}" if now.backup else ""))
        if was is None:
            return
        if now.generation < was.generation:
            raise RuleBroken(f"a generation went back: {was} -> {now}")
        roles = (now.primary, now.backup) != (was.primary, was.backup)
        if roles and now.generation == was.generation:
            raise RuleBroken(f"INV-4: roles changed within a generation: {was} -> {now}")
        if now.claimed != was.claimed and now.claimed is not None:
            self._claim_won(was, now)
        if now.phase is not was.phase:
            self._phase_changed(was, now)

    def _claim_won(self, was: ProtectionRecord, now: ProtectionRecord) -> None:
        assert now.claimed is not None
        role = was.role_of(now.claimed.host)
        if role is Role.NONE or now.claimed.generation != was.generation + 1:
            raise RuleBroken(f"INV-4: {now.claimed} won from {was}")
        if role is Role.BACKUP and was.phase is not Phase.PROTECTED:
            raise RuleBroken(f"INV-7: a backup won while {was.phase}")
        self.totals["wins"] += 1
        if role is Role.BACKUP:
            planned = now.claimed.reason == ClaimReason.HANDOVER
            self.totals["switchovers" if planned else "failovers"] += 1

    def _phase_changed(self, was: ProtectionRecord, now: ProtectionRecord) -> None:
        if now.phase is Phase.PROTECTED:
            self.totals["protected"] += 1
            self.totals["re-protections"] += was.generation > 2
            self._must_be_plugged(now)
        if now.phase is Phase.ENDED:
            self.totals["VMs ended or lost"] += 1
            self._must_be_gone(now)
        if now.phase is Phase.RETIRED:
            self.totals["retired"] += 1

    def _must_be_plugged(self, record: ProtectionRecord) -> None:
        if not self.generation(record.vm, record.generation).acknowledged:
            raise RuleBroken(f"INV-7: {record.vm} is protected without a checkpoint")
        for qemu in self._qemus.on(record.primary, record.vm):
            if not qemu.is_standby and not qemu.plug.is_holding:
                raise RuleBroken(f"INV-7: {record.vm} is protected and its output flows")

    def _must_be_gone(self, record: ProtectionRecord) -> None:
        for qemu in self._qemus.on(record.primary, record.vm):
            if not qemu.is_standby and not qemu.vm.has_shut_down:
                raise RuleBroken(f"{record.vm} is said to be lost and lives on {record.primary}")
        if any(q.vm_name == record.vm and not q.is_managed for q in self._qemus.alive()):
            return  # an operator started it elsewhere; the record never was about that one
        self.lost.add((record.vm, self.incarnations[record.vm]))

    # --- output -----------------------------------------------------------------------------------

    def watch_qemu(self, qemu: Qemu) -> None:
        qemu.plug.on_leave = lambda packet: self._left(qemu, packet)
        qemu.vm.on_kill = lambda: self.product_ends(qemu)

    def watch_primary(self, worker: "Worker", qemu: Qemu) -> None:
        """From now on this worker captures and releases."""
        qemu.is_managed = True
        pair = (worker.vm_name, worker.generation)
        qemu.plug.on_release_one = lambda epoch: self._releases(qemu, pair, epoch)
        qemu.plug.on_release_all = lambda: self._releases_all(qemu, pair)

    def _releases_all(self, qemu: Qemu, pair: Pair) -> None:
        record = self.records[qemu.vm_name]
        if record.primary != qemu.host or record.generation <= pair[1]:
            raise RuleBroken(f"INV-4: {qemu.host} goes on alone from {pair} without it: {record}")

    def _releases(self, qemu: Qemu, pair: Pair, epoch: int) -> None:
        generation = self.generation(*pair)
        if epoch > generation.acknowledged:
            raise RuleBroken(
                f"INV-2: {qemu.host} releases epoch {epoch} of {pair}, acknowledged is "
                f"{generation.acknowledged}"
            )
        self._speaks(qemu.host, pair)

    def _speaks(self, host: str, pair: Pair) -> None:
        speakers = self.generation(*pair).speakers
        speakers.add(host)
        if len(speakers) > 1:
            raise RuleBroken(f"INV-1: {sorted(speakers)} speak for {pair}")

    def _left(self, qemu: Qemu, packet: Packet) -> None:
        record = self.records.get(qemu.vm_name)
        if not qemu.plug.is_releasing_one and record is not None and qemu.is_managed:
            live = record.phase in transitions.LIVE or record.phase is Phase.RELEASING
            if live and record.primary != qemu.host:
                raise RuleBroken(f"INV-1: {qemu.host} speaks for {record}")
            if live:
                self._speaks(qemu.host, (record.vm, record.generation))
        if (qemu.vm_name, qemu.incarnation) in self.lost:
            raise RuleBroken(f"{qemu.vm_name} was said to be gone and speaks on {qemu.host}")
        self.totals["released packets"] += 1
        self.kernel.log("outside", f"hears packet {packet.index} of {qemu.vm_name} ({qemu.host})")
        self._histories[qemu.vm_name].hear(packet.text, qemu.host)

    # --- workers ----------------------------------------------------------------------------------

    def worker_started(self, worker: "Worker") -> None:
        self.totals["workers started"] += 1
        pair = (worker.vm_name, worker.generation)

        def claimed() -> None:
            self.totals["claim messages"] += 1
            claimants = self.generation(*pair).claimants
            if worker.host.name not in claimants:
                self.totals["claims"] += 1
                self.kernel.log(worker.host.name, f"claims {pair}")
            claimants.add(worker.host.name)

        worker.channel.on_claim = claimed

    def checkpoint_sent(self, worker: "Worker", epoch: int) -> None:
        assert worker.qemu is not None
        self.totals["checkpoints"] += 1
        stood = self.generation(worker.vm_name, worker.generation).stood
        if epoch in stood:
            raise RuleBroken(f"INV-2: checkpoint {epoch} was sent twice")
        stood[epoch] = worker.qemu.vm.stood_with
        stood.pop(epoch - 2, None)

    def acknowledges(self, worker: "Worker", epoch: int) -> None:
        generation = self.generation(worker.vm_name, worker.generation)
        where = f"{worker.vm_name} g{worker.generation} on {worker.host.name}"
        self.kernel.log(worker.host.name, f"acknowledges {epoch} of {where}")
        self.totals["acknowledgements"] += 1
        if worker.host.name in generation.claimants:
            raise RuleBroken(f"INV-3: {where} acknowledges {epoch} after it claimed")
        if generation.acknowledger not in (None, worker):
            raise RuleBroken(f"INV-3: a second worker acknowledges: {where}")
        if epoch != generation.acknowledged + 1:
            raise RuleBroken(f"INV-2: {where} acknowledges {epoch} after {generation.acknowledged}")
        if epoch > 1:
            self._must_have(worker, generation)
        generation.acknowledged = epoch
        generation.acknowledger = worker

    def _must_have(self, worker: "Worker", generation: Generation) -> None:
        """The standby has exactly the memory of its primary at the epoch acknowledged last."""
        assert worker.qemu is not None
        stood = generation.stood[generation.acknowledged]
        same = stood == worker.qemu.vm.memory
        if not same.all():
            pages = np.flatnonzero(~same.all(axis=1)).tolist()
            raise RuleBroken(
                f"INV-8: pages {pages} of {worker.vm_name} g{worker.generation} epoch "
                f"{generation.acknowledged} are not the primary's on {worker.host.name}"
            )

    def promotes(self, worker: "Worker", qemu: Qemu) -> None:
        record = self.records[qemu.vm_name]
        where = f"{qemu.vm_name} g{worker.generation} on {qemu.host}"
        if record.primary != qemu.host or record.generation <= worker.generation:
            raise RuleBroken(f"INV-4: {where} is promoted without the claim: {record}")
        if (qemu.vm_name, qemu.incarnation) in self.lost:
            raise RuleBroken(f"{where} was said to be gone and is promoted")
        self._must_have(worker, self.generation(worker.vm_name, worker.generation))
        chain, history = qemu.vm.chain()[1], self._histories[qemu.vm_name]
        if not history.descends(chain, history.heard):
            raise RuleBroken(f"INV-2: {where} goes on before what was heard")
        if qemu.vm.disk_of_memory() != qemu.vm.disk_writes:
            raise RuleBroken(f"INV-9: {where} goes on with a disk of another epoch")
        self.totals["promotions"] += 1
        qemu.is_managed = True

    def product_ends(self, qemu: Qemu) -> None:
        """The product ends a QEMU: never the one that the record lets go on."""
        record = self.records.get(qemu.vm_name)
        self.kernel.log(qemu.host, f"{qemu.vm_name} is ended (pid {qemu.pid})")
        if record is None or qemu.vm.has_shut_down:
            return
        if qemu.failing_saves_total >= CAPTURE_FAILURES_MAX:
            return  # a VM that can not be captured any more is left to its backup
        if qemu.is_standby and not qemu.is_busy:
            return  # nobody can bring it to life any more, whoever won with it
        if qemu.is_standby and self._qemus.guest_on(qemu.host, qemu.vm_name) is not None:
            return
        if record.primary == qemu.host and record.phase in transitions.LIVE:
            raise RuleBroken(f"INV-6: {qemu.host} ends the VM that goes on: {record}")

    # --- after every step -------------------------------------------------------------------------

    def after_step(self) -> None:
        free: set[str] = set()
        for qemu in self._qemus.alive():
            if qemu.is_managed and qemu.vm.is_running and not qemu.plug.is_holding:
                if qemu.vm_name in free:
                    raise RuleBroken(f"INV-1: two copies of {qemu.vm_name} may speak")
                free.add(qemu.vm_name)
