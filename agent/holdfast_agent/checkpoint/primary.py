"""The primary's worker: performs what the epoch core decides, for one VM in one generation.

Over ports only. One thread: wait for the nearest deadline or anything readable, hand what happened
to the core, perform its actions in order. Start at `run`; a checkpoint's own flow is in `capture`,
filling a backup in `seeding`, and every decision in `core/epoch.py`.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

from holdfast_agent.checkpoint.capture import Capturer, Checkpoint
from holdfast_agent.checkpoint.driver import Driver
from holdfast_agent.checkpoint.figures import PrimaryFigures
from holdfast_agent.checkpoint.held_watch import HeldWatch
from holdfast_agent.checkpoint.ports import (
    AgentPort,
    OutputPlug,
    OutputSignal,
    Peer,
    VirtualMachine,
)
from holdfast_agent.checkpoint.seeding import Seeding
from holdfast_agent.checkpoint.waiting import FOREVER_NS, WaitReadable, wait_readable
from holdfast_agent.checkpoint.wants import Wants, decision_of_order, decision_of_verdict
from holdfast_agent.checkpoint.worker_messages import Decided, Noted, Ordered
from holdfast_agent.core import actions as act
from holdfast_agent.core.encoding import EncodingChooser
from holdfast_agent.core.epoch import PrimaryMachine, PrimaryState
from holdfast_agent.core.failures import (
    PeerLost,
    VirtualMachineFailed,
    VirtualMachineNotRunning,
)
from holdfast_agent.core.memory_map import (
    NO_PAGES,
    PAGE_SIZE_BYTES,
    PageIndexes,
    PageRows,
    zero_pages,
)
from holdfast_agent.core.pacing import Pacing
from holdfast_agent.core.peer_messages import AcknowledgementArrived, FarewellArrived
from holdfast_api.messages import Assignment
from holdfast_api.words import ClaimReason, HostId, Phase, WorkerPhase

LOGGER = logging.getLogger(__name__)
CAPTURE_FAILURES_MAX = 5
HANDOVER_LIMIT_NS = 5_000_000_000

PHASES = {
    PrimaryState.SEEDING: WorkerPhase.SEEDING,
    PrimaryState.PROTECTING: WorkerPhase.PROTECTING,
    PrimaryState.HANDING_OVER: WorkerPhase.PROTECTING,
    PrimaryState.CLAIMING: WorkerPhase.CLAIMING,
    PrimaryState.OVER: WorkerPhase.ENDED,
}


@dataclass(frozen=True)
class PrimaryParts:
    """What a primary's worker is made of; `peer` and `seeding` are None in recovery."""

    vm: VirtualMachine
    plug: OutputPlug
    signal: OutputSignal | None
    capturer: Capturer
    peer: Peer | None
    seeding: Seeding | None


class PrimaryDriver(Driver):
    """Drives one `PrimaryMachine`; closes nothing but the peer's connection."""

    def __init__(
        self,
        *,
        machine: PrimaryMachine,
        host: HostId,
        parts: PrimaryParts,
        agent: AgentPort,
        wants: Wants,
        figures: PrimaryFigures,
        assignment: Assignment,
        now_ns: Callable[[], int],
        wait: WaitReadable = wait_readable,
        hurry: Callable[[], None] = lambda: None,
    ) -> None:
        """Use these parts until `run` returns; `hurry` is called when seeding is over."""
        super().__init__(
            host=host,
            peer=parts.peer,
            agent=agent,
            wants=wants,
            now_ns=now_ns,
            wait=wait,
            hurry=hurry,
        )
        self._machine = machine
        self._parts = parts
        self._figures = figures
        self._seeding = parts.seeding
        self._capture_failures = 0
        self._handover_ns = FOREVER_NS
        self._captured_ns = 0
        self._sent_bytes = 0
        self._vm_gone = False
        self.vm_lives = True
        policy = assignment.policy
        self._assignment = assignment
        self._encodings = EncodingChooser(policy.encoding, now_ns())
        self._held = HeldWatch(parts.plug, agent, wants, policy.held_limit_bytes)
        self._pacing = Pacing(
            interval_ms=policy.interval_ms,
            min_interval_ms=policy.min_interval_ms,
            output_triggered=policy.output_triggered,
        )

    def run(self) -> str:
        """Work until this generation is over for this host; return how it ended."""
        if self._peer is not None:
            self._peer.use_encoding(self._encodings.encoding)
        if self._seeding is not None:
            self._seeding.start()
        self._order(self._assignment)
        while not self._finished:
            self._turn()
        self._hang_up()
        return self._machine.outcome

    def recover(self) -> str:
        """Without a peer: output is held by what an earlier worker left; claim, then go on."""
        self._machine.state = PrimaryState.PROTECTING
        self._perform(self._machine.peer_lost(ClaimReason.STREAM_BROKEN))
        return self.run()

    # --- one turn ---------------------------------------------------------------------------------

    def _turn(self) -> None:
        ready = self._wait(self._descriptors(), self._next_due_ns() - self._now_ns())
        signal = self._parts.signal
        if signal is not None and signal.fileno() in ready and signal.drain():
            self._pacing.output_waits(self._now_ns())
            if self._held.is_pressed():
                self._pacing.output_presses(self._now_ns())
        self._hear_agent()
        self._hear_vm()
        self._hear_peer()
        self._tend_peer()
        self._seed()
        now = self._now_ns()
        due = self._pacing.due_at_ns()
        if due is not None and now >= due and self._seeding is None:
            self._perform(self._machine.checkpoint_due())
        if now >= self._handover_ns:
            self._handover_ns = FOREVER_NS
            self._perform(self._machine.handover_timed_out())
        self._wants.tend(now)
        if self._figures.report_due(now):
            self._report()
        if self._parts.capturer.is_short:
            self._parts.capturer.make_room()

    def _descriptors(self) -> list[int]:
        descriptors = [*self._agent.filenos()]
        if not self._vm_gone:
            descriptors.append(self._parts.vm.fileno())
        if self._parts.signal is not None:
            descriptors.append(self._parts.signal.fileno())
        if self._peer is not None:
            descriptors.append(self._peer.fileno())
        return descriptors

    def _next_due_ns(self) -> int:
        if self._parts.capturer.is_short:
            return 0
        dues = [self._wants.next_due_ns(), self._figures.next_report_ns, self._handover_ns]
        if self._peer is not None:
            dues.append(self._peer.next_due_ns())
        if self._seeding is not None and self._machine.state is PrimaryState.SEEDING:
            dues.append(self._seeding.not_before_ns())
        elif self._machine.state is PrimaryState.PROTECTING:
            due = self._pacing.due_at_ns()
            if due is not None:
                dues.append(due)
        return min(dues)

    # --- what is heard ----------------------------------------------------------------------------

    def _hear_agent(self) -> None:
        for message, _ in self._agent.receive():
            match message:
                case Ordered():
                    self._order(message.assignment)
                case Decided():
                    decision = decision_of_verdict(message.verdict, self._host)
                    if decision is not None and self._wants.is_mine(message.claim):
                        self._perform(self._machine.decided(decision))
                case Noted():
                    self._wants.noted(message.what)
                case _:
                    LOGGER.warning("the agent sent %s to a primary", message.type)

    def _order(self, assignment: Assignment) -> None:
        """Follow the assignment: a newer generation decides, the same may change the policy."""
        if assignment.generation > self._machine.generation:
            self._perform(self._machine.decided(decision_of_order(assignment)))
            return
        if assignment.generation < self._machine.generation:
            return
        self._assignment = assignment
        policy = assignment.policy
        self._held.change_limit(policy.held_limit_bytes)
        self._pacing.change_policy(
            interval_ms=policy.interval_ms,
            min_interval_ms=policy.min_interval_ms,
            output_triggered=policy.output_triggered,
        )
        self._encodings.change(policy.encoding, self._now_ns())
        if assignment.phase is Phase.PROTECTED:
            self._wants.noted("seeded")
            if assignment.handover:
                self._perform(self._machine.handover_ordered())

    def _hear_vm(self) -> None:
        if self._vm_gone:
            return
        for event in self._parts.vm.poll_events():
            if event.name == "SHUTDOWN" and event.reason != "guest-reset":
                LOGGER.warning("the guest shut down: %s", event.reason)
                self._perform(self._machine.guest_shut_down())
            elif event.name == "GONE":
                LOGGER.warning("QEMU is gone")
                self._vm_gone = True
                self.vm_lives = False
                self._perform(self._machine.vm_gone())
                return

    def _hear_peer(self) -> None:
        try:
            while self._peer is not None:
                message = self._peer.receive()
                if message is None:
                    return
                if isinstance(message, AcknowledgementArrived):
                    self._perform(self._machine.acknowledgement(message.epoch))
                elif isinstance(message, FarewellArrived):
                    raise PeerLost(  # noqa: TRY301 - both ends of a connection are one case
                        ClaimReason.PEER_FAILED, f"{message.code}: {message.explanation}"
                    )
        except PeerLost as lost:
            self._lose_peer(lost)

    def _lose_peer(self, lost: PeerLost) -> None:
        LOGGER.warning("the backup is lost: %s", lost)
        self._wants.evidence["explanation"] = lost.explanation
        self._hang_up()
        self._perform(self._machine.peer_lost(ClaimReason(lost.reason)))

    # --- what is done -----------------------------------------------------------------------------

    def _perform(self, actions: list[act.Action]) -> None:
        for action in actions:
            self._perform_one(action)

    def _perform_one(self, action: act.Action) -> None:  # noqa: C901, PLR0912 - one flat table
        parts = self._parts
        match action:
            case act.HoldOutput():
                parts.plug.hold()
            case act.Capture():
                self._capture(action)
            case act.MarkAcknowledged():
                self._acknowledged()
            case act.ReleaseOutput():
                parts.plug.release_one()
            case act.ReleaseAll():
                self._quietly(parts.plug.release_all)
            case act.StopGuest():
                self._quietly(parts.vm.stop)
            case act.ResumeGuest():
                self._quietly(parts.vm.resume)
            case act.ReportSeeded():
                if self._peer is not None:
                    self._peer.be_strict()
                self._hurry()
                self._wants.seeded(self._now_ns())
            case act.ReportSeedingFailed():
                self._wants.seeding_failed(action.reason, self._now_ns())
            case act.AskClaim():
                self._wants.claim(action.reason, self._machine.acknowledged, self._now_ns())
            case act.Farewell():
                if self._peer is not None:
                    self._peer.send_farewell(action.code, self._machine.outcome)
            case act.DestroyVm() | act.QuitVm():
                self.vm_lives = False
                self._vm_gone = True
                parts.vm.kill()
            case act.Finish():
                self._finished = True
            case act.Acknowledge() | act.Apply() | act.Promote():
                raise AssertionError(action)
            case _:
                assert_never(action)

    def _quietly(self, command: Callable[[], object]) -> None:
        """Do what a QEMU that just died cannot answer; its end is an event of its own."""
        try:
            command()
        except VirtualMachineFailed as error:
            LOGGER.warning("%s", error)

    def _capture(self, action: act.Capture) -> None:
        began = self._now_ns()
        self._pacing.captured(began)
        try:
            checkpoint = self._parts.capturer.take(action.epoch, final=action.final)
        except VirtualMachineNotRunning as error:
            # Somebody paused it: nothing runs, so nothing is missed. Try again an interval later.
            LOGGER.info("checkpoint %d: %s", action.epoch, error)
            self._capture_failed(counts=False)
            return
        except VirtualMachineFailed as error:
            LOGGER.warning("checkpoint %d failed: %s", action.epoch, error)
            self._capture_failed(counts=True)
            return
        self._capture_failures = 0
        self._captured_ns = self._now_ns()
        self._figures.captured(checkpoint)
        if action.final:
            self._handover_ns = self._captured_ns + HANDOVER_LIMIT_NS
        try:
            self._send(checkpoint)
        except PeerLost as lost:
            self._lose_peer(lost)

    def _capture_failed(self, *, counts: bool) -> None:
        self._pacing.acknowledged(self._now_ns())
        self._perform(self._machine.capture_failed())
        self._capture_failures += counts
        self._hear_vm()
        if self._capture_failures >= CAPTURE_FAILURES_MAX:
            self.vm_lives = False
            self._vm_gone = True
            self._parts.vm.kill()
            self._perform(self._machine.vm_gone())

    def _send(self, checkpoint: Checkpoint) -> None:
        assert self._peer is not None
        self._peer.use_encoding(self._encodings.encoding)
        self._sent_bytes = 0
        for indexes, rows in checkpoint.batches:
            full, content, empty = _without_zero_pages(indexes, rows)
            self._sent_bytes += len(full) * PAGE_SIZE_BYTES
            self._peer.send_pages(checkpoint.epoch, full, content, empty)
        self._peer.send_checkpoint(
            checkpoint.epoch, checkpoint.device_state, final=checkpoint.final
        )
        self._figures.sent(self._now_ns() - self._captured_ns)

    def _acknowledged(self) -> None:
        now = self._now_ns()
        self._parts.capturer.acknowledged()
        self._pacing.acknowledged(now)
        self._figures.acknowledged(now - self._captured_ns)
        self._encodings.acknowledged(self._sent_bytes, now - self._captured_ns, now)
        self._figures.encoding(self._encodings.settled, self._encodings.reason)

    def _seed(self) -> None:
        if self._seeding is None or self._machine.state is not PrimaryState.SEEDING:
            return
        if self._now_ns() < self._seeding.not_before_ns():
            return
        try:
            left = self._seeding.step()
        except PeerLost as lost:
            self._lose_peer(lost)
            return
        except VirtualMachineFailed as error:
            self._lose_peer(PeerLost(ClaimReason.PEER_FAILED, f"seeding failed here: {error}"))
            return
        if left is not None:
            self._figures.seeded(self._seeding.figures)
            self._parts.capturer.owe(left)
            self._seeding = None
            self._perform(self._machine.seeding_small_enough())

    def _report(self) -> None:
        machine = self._machine
        seeding = None if self._seeding is None else self._seeding.figures
        self._figures.dropped(self._held.tell(self._now_ns()))
        self._agent.flush()
        if self._peer is not None:
            self._figures.connection(self._peer.counters.values() | self._peer.coding.values())
        self._agent.send(
            self._figures.report(
                self._now_ns(),
                phase=PHASES[machine.state],
                epoch=machine.captured,
                acknowledged=machine.acknowledged,
                held_bytes=self._parts.plug.held_bytes(),
                seeding=seeding,
                detail="" if machine.claim_reason is None else machine.claim_reason.value,
            )
        )


def _without_zero_pages(
    indexes: PageIndexes, rows: PageRows
) -> tuple[PageIndexes, PageRows, PageIndexes]:
    """Return the pages that are not zero with their content, and those that are."""
    empty = zero_pages(rows)
    if not empty.any():
        return indexes, rows, NO_PAGES
    full = ~empty
    return indexes[full], rows[full], indexes[empty]
