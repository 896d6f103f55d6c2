"""The backup's worker: performs what the backup core decides, for one VM in one generation.

Over ports only. One thread, as in `primary`. Pages of seeding go straight into the standby's
memory; pages of a checkpoint are staged until the checkpoint is whole and verified, acknowledged,
and only then applied. Every decision is in `core/backup.py`.
"""

import logging
from collections.abc import Callable

import numpy as np

from holdfast_agent.checkpoint.driver import Driver
from holdfast_agent.checkpoint.figures import BackupFigures
from holdfast_agent.checkpoint.ports import AgentPort, Peer, Standby
from holdfast_agent.checkpoint.waiting import WaitReadable, wait_readable
from holdfast_agent.checkpoint.wants import Wants, decision_of_order, decision_of_verdict
from holdfast_agent.checkpoint.worker_messages import Decided, Happened, Ordered
from holdfast_agent.core import actions as act
from holdfast_agent.core.backup import BackupMachine, BackupState
from holdfast_agent.core.failures import PeerLost, StagingFull, VirtualMachineFailed
from holdfast_agent.core.memory_map import PAGE_SIZE_BYTES
from holdfast_agent.core.peer_messages import (
    AcknowledgementArrived,
    CheckpointArrived,
    FarewellArrived,
    PagesArrived,
)
from holdfast_api.messages import Assignment
from holdfast_api.words import ClaimReason, EventKind, HostId, WorkerPhase

LOGGER = logging.getLogger(__name__)

HEAR_LIMIT_NS = 5_000_000

PHASES = {
    BackupState.RECEIVING: WorkerPhase.PROTECTING,
    BackupState.CLAIMING: WorkerPhase.CLAIMING,
    BackupState.PROMOTING: WorkerPhase.PROMOTING,
    BackupState.OVER: WorkerPhase.ENDED,
}


class BackupDriver(Driver):
    """Drives one `BackupMachine`; closes nothing but the peer's connection."""

    def __init__(
        self,
        *,
        machine: BackupMachine,
        host: HostId,
        standby: Standby,
        peer: Peer,
        agent: AgentPort,
        wants: Wants,
        figures: BackupFigures,
        now_ns: Callable[[], int],
        wait: WaitReadable = wait_readable,
        hurry: Callable[[], None] = lambda: None,
    ) -> None:
        """Use these parts until `run` returns; `hurry` is called when seeding is over."""
        super().__init__(
            host=host,
            peer=peer,
            agent=agent,
            wants=wants,
            now_ns=now_ns,
            wait=wait,
            hurry=hurry,
        )
        self._machine = machine
        self._standby = standby
        self._figures = figures
        self._staged: list[PagesArrived] = []
        self._device_state = b""
        self._suspected_ns = 0
        self._won_ns = 0
        self.vm_lives = False
        # A page of a fresh standby that nobody wrote reads as zero and takes no memory: keep it so.
        self._touched = np.zeros(standby.memory.memory_map.page_count, dtype=np.bool_)
        self._touched[standby.memory.populated()] = True

    def run(self) -> str:
        """Work until this generation is over for this host; return how it ended."""
        while not self._finished:
            self._turn()
        self._hang_up()
        return self._machine.outcome

    # --- one turn ---------------------------------------------------------------------------------

    def _turn(self) -> None:
        dues = [self._wants.next_due_ns(), self._figures.next_report_ns]
        descriptors = [*self._agent.filenos(), self._standby.fileno()]
        if self._peer is not None:
            dues.append(self._peer.next_due_ns())
            descriptors.append(self._peer.fileno())
        self._wait(descriptors, min(dues) - self._now_ns())
        self._hear_standby()
        self._hear_peer()
        self._tend_peer()
        self._hear_agent()
        now = self._now_ns()
        self._wants.tend(now)
        if self._figures.report_due(now):
            self._report()

    # --- what is heard ----------------------------------------------------------------------------

    def _hear_standby(self) -> None:
        """Notice that the standby ended: what cannot be promoted must not be acknowledged."""
        if not self._finished and self._standby.has_ended():
            self._perform(self._machine.standby_failed("the standby's QEMU ended"))

    def _hear_peer(self) -> None:
        """Take what has arrived, but not so long that the primary would hear nothing from us."""
        until_ns = self._now_ns() + HEAR_LIMIT_NS
        try:
            while self._peer is not None and self._now_ns() < until_ns:
                message = self._peer.receive()
                if message is None:
                    return
                match message:
                    case PagesArrived():
                        self._pages(message)
                    case CheckpointArrived():
                        self._device_state = message.device_state
                        self._perform(
                            self._machine.checkpoint_whole(message.epoch, final=message.final)
                        )
                    case FarewellArrived():
                        LOGGER.info("the primary left: %s", message)
                        self._wants.evidence["explanation"] = message.explanation
                        self._perform(self._machine.farewell(message.code))
                    case AcknowledgementArrived():
                        raise PeerLost(  # noqa: TRY301 - both ends of a connection are one case
                            ClaimReason.PEER_FAILED, "a primary does not acknowledge"
                        )
        except PeerLost as lost:
            self._lose_peer(lost)
        except (StagingFull, VirtualMachineFailed) as error:
            LOGGER.exception("this host can not hold the standby")
            self._perform(self._machine.standby_failed(str(error)))

    def _pages(self, pages: PagesArrived) -> None:
        self._figures.pages(pages.epoch, len(pages.indexes) + len(pages.zero_indexes))
        if pages.epoch > 0:
            self._staged.append(pages)
            return
        self._write(pages)
        assert self._peer is not None
        self._peer.release_buffers()

    def _lose_peer(self, lost: PeerLost) -> None:
        """Suspect the primary. The connection ends first: nothing is acknowledged from here on."""
        self._suspected_ns = self._now_ns()
        LOGGER.warning("the primary is suspected: %s", lost)
        self._hang_up()
        self._wants.evidence |= {
            "explanation": lost.explanation,
            "suspected_at_monotonic_ns": self._suspected_ns,
        }
        self._perform(self._machine.suspect(ClaimReason(lost.reason)))

    def _hear_agent(self) -> None:
        for message, _ in self._agent.receive():
            match message:
                case Ordered():
                    self._order(message.assignment)
                case Decided():
                    decision = decision_of_verdict(message.verdict, self._host)
                    if decision is None or not self._wants.is_mine(message.claim):
                        continue
                    if decision.generation <= self._machine.generation:
                        self._perform(self._machine.claim_refused())
                    else:
                        self._perform(self._machine.decided(decision))
                case _:
                    LOGGER.warning("the agent sent %s to a backup at work", message.type)

    def _order(self, assignment: Assignment) -> None:
        if assignment.generation > self._machine.generation:
            self._perform(self._machine.decided(decision_of_order(assignment)))

    # --- what is done -----------------------------------------------------------------------------

    def _perform(self, actions: list[act.Action]) -> None:
        for action in actions:
            match action:
                case act.Acknowledge():
                    self._acknowledge(action)
                case act.Apply():
                    self._apply(action)
                case act.AskClaim():
                    self._wants.claim(action.reason, self._machine.acknowledged, self._now_ns())
                case act.Promote():
                    self._promote(action)
                case act.DestroyVm():
                    self._standby.destroy()
                case act.Farewell():
                    if self._peer is not None:
                        self._peer.send_farewell(action.code, self._machine.outcome)
                case act.Finish():
                    self._finished = True
                case _:
                    raise AssertionError(action)

    def _acknowledge(self, action: act.Acknowledge) -> None:
        """Acknowledge; a primary that no longer listens is found out at the next turn."""
        assert self._peer is not None
        if action.epoch == 1:
            self._peer.be_strict()
            self._hurry()
        try:
            self._peer.send_acknowledgement(action.epoch)
        except PeerLost as lost:
            LOGGER.info("the acknowledgement of %d did not leave: %s", action.epoch, lost)

    def _apply(self, action: act.Apply) -> None:
        began = self._now_ns()
        for pages in self._staged:
            self._write(pages)
        self._staged.clear()
        if self._peer is not None:
            self._peer.release_buffers()
        self._figures.applied(self._now_ns() - began)
        self._perform(self._machine.applied_checkpoint(action.epoch))

    def _write(self, pages: PagesArrived) -> None:
        if len(pages.indexes):
            self._standby.memory.copy_in(pages.indexes, pages.rows)
            self._touched[pages.indexes] = True
        zero = pages.zero_indexes[self._touched[pages.zero_indexes]]
        if len(zero):
            rows = np.zeros((len(zero), PAGE_SIZE_BYTES), dtype=np.uint8)
            self._standby.memory.copy_in(zero, rows)

    def _promote(self, action: act.Promote) -> None:
        self._won_ns = self._now_ns()
        self._hang_up()
        try:
            self._standby.promote(self._device_state)
        except VirtualMachineFailed as error:
            LOGGER.exception("promotion failed")
            self._tell(EventKind.VM_LOST, f"promotion failed: {error}", {})
            self._perform(self._machine.promotion_failed(str(error)))
            return
        running_ns = self._now_ns()
        self.vm_lives = True
        asked_ns = self._wants.evidence.get("asked_at_monotonic_ns")
        assert isinstance(asked_ns, int)
        self._tell(
            EventKind.PROMOTED,
            f"runs from epoch {action.epoch}, {(running_ns - self._won_ns) / 1e6:.1f} ms after the "
            f"claim was won",
            {
                **self._wants.evidence,
                "epoch": action.epoch,
                "claim_ms": (self._won_ns - asked_ns) / 1e6,
                "promotion_ms": (running_ns - self._won_ns) / 1e6,
                "won_at_monotonic_ns": self._won_ns,
                "running_at_monotonic_ns": running_ns,
            },
        )
        self._perform(self._machine.promoted())

    def _tell(
        self, kind: EventKind, message: str, evidence: dict[str, str | int | float | bool | None]
    ) -> None:
        self._agent.send(Happened(event=self._wants.event(kind, message, evidence)))

    def _report(self) -> None:
        machine = self._machine
        phase = PHASES[machine.state]
        if machine.state is BackupState.RECEIVING and machine.acknowledged == 0:
            phase = WorkerPhase.SEEDING
        self._agent.flush()
        if self._peer is not None:
            self._figures.connection(self._peer.counters.values() | self._peer.coding.values())
        detail = "" if machine.claim_reason is None else machine.claim_reason.value
        self._agent.send(
            self._figures.report(phase=phase, acknowledged=machine.acknowledged, detail=detail)
        )
