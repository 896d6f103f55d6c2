"""What workers of both sides have in common: their order, how they introduce themselves, the end.

Touches the agent's channel.
"""

import contextlib
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast_agent.checkpoint.waiting import wait_readable
from holdfast_agent.checkpoint.wants import REPEAT_NS, Wants
from holdfast_agent.checkpoint.worker_messages import Finished, Introduced, Noted, WantSeedingFailed
from holdfast_agent.config import AgentConfig
from holdfast_agent.core.payloads import Hello
from holdfast_agent.host.agent_channel import AgentChannel
from holdfast_agent.host.processes import start_ticks_of
from holdfast_agent.hypervisor.preflight import Examination
from holdfast_api.messages import Assignment
from holdfast_api.words import Generation, HostId

LAST_WORD_SECONDS = 3.0
HURRIED_NICENESS = -10
SEEDING_SILENCE_SECONDS = 3.0
"""Silence that counts before the first checkpoint, unless the policy allows more."""


@dataclass(frozen=True)
class WorkerOrder:
    """One worker's task."""

    mode: str
    socket: Path
    """Where the worker listens for its agent."""
    qmp_socket: Path
    """The VM's monitor, for a primary."""
    assignment: Assignment
    config: AgentConfig

    def wants(self, channel: AgentChannel) -> Wants:
        """Return the wants of this worker."""
        return Wants(
            channel,
            vm=self.assignment.vm,
            host=self.config.host,
            generation=self.assignment.generation,
            new_claim_name=lambda: secrets.token_hex(16),
        )


def hello_of(
    assignment: Assignment,
    host: HostId,
    blocks: tuple[tuple[str, int], ...],
    spec: dict[str, Any],
    *,
    has_rdma: bool = False,
) -> Hello:
    """Return how the primary on `host` introduces itself; `blocks` and `spec` are its VM's."""
    assert assignment.peer is not None
    return Hello(
        vm=assignment.vm,
        generation=assignment.generation,
        primary=host,
        backup=assignment.peer,
        keepalive_ms=assignment.policy.keepalive_ms,
        silence_limit_ms=assignment.policy.silence_limit_ms,
        blocks=blocks,
        spec=spec,
        rdma=has_rdma and assignment.policy.transport != "tcp",
    )


def hurry() -> None:
    """Go before what merely computes: the guest stands still, or its output waits, for us.

    Not while seeding, which takes whole cores for seconds and can wait.
    """
    with contextlib.suppress(PermissionError):
        os.nice(HURRIED_NICENESS)


def introduction(
    order: WorkerOrder, found: Examination | None = None, *, qemu_pid: int = 0
) -> Introduced:
    """Return who this worker is and what it holds: an examined VM, a standby's pid, or nothing."""
    pid = qemu_pid if found is None else found.identity.pid
    ticks = start_ticks_of(pid) if pid else 0
    facts = None
    if found is not None:
        facts = found.facts(order.assignment.vm).model_copy(
            update={"pid": pid, "start_ticks": ticks}
        )
    return Introduced(
        vm=order.assignment.vm,
        host=order.config.host,
        generation=order.assignment.generation,
        role=order.assignment.role,
        pid=os.getpid(),
        qemu_pid=pid,
        qemu_start_ticks=ticks,
        facts=facts,
        qmp_socket=str(order.qmp_socket),
    )


def say_seeding_failed(channel: AgentChannel, generation: Generation, why: str) -> None:
    """Have it noted why a backup could not be filled; waits for that, but not for long.

    A worker that fails early has met no agent yet, and an agent that meets only its last word can
    say no more than that it died.
    """
    want = WantSeedingFailed(generation=generation, reason=why[:1000])
    deadline = time.monotonic() + LAST_WORD_SECONDS
    repeat_at = 0.0
    while (now := time.monotonic()) < deadline:
        heard = [message for message, _ in channel.receive()]
        if Noted(what="seeding-failed") in heard:
            return
        if channel.is_connected and now >= repeat_at:
            channel.send(want)
            repeat_at = now + REPEAT_NS / 1e9
        wait_readable(channel.filenos(), 50_000_000)


def say_last_word(channel: AgentChannel, outcome: str, *, vm_lives: bool) -> None:
    """Tell the agent how it ended, wait a little until it has left, and hang up."""
    channel.send(Finished(outcome=outcome, vm_lives=vm_lives))
    deadline = time.monotonic() + LAST_WORD_SECONDS
    while not channel.is_drained and time.monotonic() < deadline:
        wait_readable(channel.filenos(), 50_000_000)
        channel.receive()
        channel.flush()
    channel.close()
