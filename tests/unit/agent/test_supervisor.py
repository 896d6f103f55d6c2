"""The supervisor's table of decisions, with real worker processes and real processes to destroy."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from tests.unit.agent.agents import NOBODY, Qemu, TestedAgent, make_stub, order, record, until

from holdfast_agent import supervisor
from holdfast_agent.checkpoint.worker_messages import (
    Finished,
    ToAgent,
    WantClaim,
    WantSeeded,
    WantSeedingFailed,
)
from holdfast_api.client import AgentClient
from holdfast_api.messages import Claim, ClaimVerdict
from holdfast_api.words import ClaimReason, EventKind, Phase, Role

BACKUP_ORDER = order(Role.BACKUP, Phase.SEEDING)
SEEDING_ORDER = order(Role.PRIMARY, Phase.SEEDING)
PROTECTED_ORDER = order(Role.PRIMARY, Phase.PROTECTED)
CLAIM = Claim(vm="vm", generation=2, host="h1", claim="claim-0001", reason=ClaimReason.PEER_SILENT)

Scene = Callable[[TestedAgent], Awaitable[None]]


@pytest.fixture
def qemu() -> Iterator[Qemu]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


@pytest.fixture
def play(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Scene], None]:
    """Run a scene with a supervisor, and end its workers afterwards."""
    monkeypatch.setattr(sys, "executable", str(make_stub(run_dir)))

    async def whole(scene: Scene) -> None:
        async with AgentClient((NOBODY,), "h1") as client:
            agent = TestedAgent(run_dir, client)
            try:
                await agent.supervisor.adopt()
                await scene(agent)
            finally:
                agent.supervisor._orders.clear()  # nobody is followed by a new worker now
                agent.kill_all_workers()
                await until(lambda: not agent.supervisor._tasks)
                await until(agent.all_workers_are_reaped)
                await asyncio.sleep(0.05)  # the loop hears of it from a thread
                await agent.supervisor.close()

    return lambda scene: asyncio.run(whole(scene))


def fails_to_start() -> None:
    Path(sys.executable).write_text("#!/bin/sh\nexit 3\n")


def says(agent: TestedAgent, *messages: ToAgent) -> None:
    """Let the worker say something."""
    draft = agent.run_dir / "says.new"
    draft.write_text("\n".join(m.model_dump_json() for m in messages))
    draft.rename(agent.run_dir / "says")


Play = Callable[[Scene], None]

# --- none -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", [Role.PRIMARY, Role.BACKUP])
def test_a_host_without_a_role_destroys_what_it_holds(play: Play, qemu: Qemu, role: Role) -> None:
    async def scene(agent: TestedAgent) -> None:
        agent.holds(qemu, role, generation=1)
        await agent.supervisor.apply((order(Role.NONE, Phase.UNPROTECTED),))
        assert qemu.wait(5) == -9
        assert agent.entry.role is Role.NONE
        assert agent.entry.generation == 2
        assert [e.kind for e in agent.outbox.events] == [EventKind.VM_DESTROYED]

    play(scene)


def test_a_host_without_a_role_leaves_alone_what_the_ledger_does_not_name(
    play: Play, qemu: Qemu
) -> None:
    async def scene(agent: TestedAgent) -> None:
        agent.finds(qemu)
        await agent.supervisor.apply((order(Role.NONE, Phase.UNPROTECTED),))
        assert qemu.poll() is None
        assert agent.outbox.events == []

    play(scene)


# --- backup ---------------------------------------------------------------------------------------


def test_a_backups_worker_is_started_once_in_a_generation(play: Play) -> None:
    async def scene(agent: TestedAgent) -> None:
        await agent.supervisor.apply((BACKUP_ORDER,))
        assert agent.supervisor.backup_link("vm", 2) is not None
        assert agent.supervisor.backup_link("vm", 1) is None
        await agent.kill_worker()
        await agent.supervisor.apply((BACKUP_ORDER,))
        await agent.supervisor.apply((order(Role.BACKUP, Phase.PROTECTED),))
        assert agent.started() == [("protect", "backup", 2)]
        await agent.supervisor.apply((order(Role.BACKUP, Phase.SEEDING, 3),))
        assert agent.started()[1:] == [("protect", "backup", 3)]

    play(scene)


def test_a_new_backup_first_destroys_what_an_earlier_generation_left(
    play: Play, qemu: Qemu
) -> None:
    async def scene(agent: TestedAgent) -> None:
        agent.holds(qemu, Role.PRIMARY, generation=1)
        await agent.supervisor.apply((BACKUP_ORDER,))
        assert qemu.wait(5) == -9
        assert agent.started() == [("protect", "backup", 2)]

    play(scene)


def test_what_a_dead_backups_worker_left_is_destroyed(play: Play, qemu: Qemu) -> None:
    async def scene(agent: TestedAgent) -> None:
        await agent.supervisor.apply((BACKUP_ORDER,))
        agent.holds(qemu, Role.BACKUP, is_standby=True)
        await agent.kill_worker()
        await agent.supervisor.apply((BACKUP_ORDER,))
        assert qemu.wait(5) == -9
        assert agent.supervisor.holdings() == ()

    play(scene)


# --- primary, seeding and protected ---------------------------------------------------------------


def test_a_primary_that_seeds_gets_one_worker_and_reports_when_that_died(
    play: Play, qemu: Qemu
) -> None:
    async def scene(agent: TestedAgent) -> None:
        agent.finds(qemu)
        await agent.supervisor.apply((SEEDING_ORDER,))
        assert agent.started() == [("protect", "primary", 2)]
        assert agent.entry.is_plugged
        assert agent.entry.qemu_pid == qemu.pid
        await agent.kill_worker()
        await until(lambda: ("seeding-failed", "vm", 2) in agent.outbox.said)
        assert len(agent.started()) == 1
        assert qemu.poll() is None

    play(scene)


def test_a_primary_seeds_although_an_earlier_standby_of_its_vm_died_here(
    play: Play, qemu: Qemu
) -> None:
    async def scene(agent: TestedAgent) -> None:
        agent.ledger.update("vm", role=Role.BACKUP, qemu_pid=1 << 22, qemu_start_ticks=1)
        agent.finds(qemu)
        await agent.supervisor.apply((order(Role.PRIMARY, Phase.SEEDING),))
        assert agent.started() == [("protect", "primary", 2)]

    play(scene)


def test_a_primary_does_not_seed_without_its_vm_or_its_peers_address(
    play: Play, qemu: Qemu
) -> None:
    async def scene(agent: TestedAgent) -> None:
        await agent.supervisor.apply((SEEDING_ORDER,))
        agent.finds(qemu)
        await agent.supervisor.apply((order(Role.PRIMARY, Phase.SEEDING, peer_address=None),))
        assert agent.started() == []
        await agent.supervisor.apply((SEEDING_ORDER,))
        assert agent.started() == [("protect", "primary", 2)]

    play(scene)


def test_a_protecting_worker_that_died_is_followed_by_one_that_claims(
    play: Play, qemu: Qemu
) -> None:
    async def scene(agent: TestedAgent) -> None:
        agent.finds(qemu)
        await agent.supervisor.apply((SEEDING_ORDER,))
        await agent.supervisor.apply((PROTECTED_ORDER,))
        await agent.kill_worker()
        await until(lambda: len(agent.started()) == 2)
        assert agent.started()[1] == ("recover", "primary", 2)

    play(scene)


def test_a_protected_vm_that_is_gone_is_not_recovered(play: Play, qemu: Qemu) -> None:
    async def scene(agent: TestedAgent) -> None:
        agent.holds(qemu, Role.PRIMARY, generation=2, worker_generation=2, content="primary:h2")
        qemu.kill()
        qemu.wait(5)
        await agent.supervisor.apply((PROTECTED_ORDER,))
        assert agent.started() == []
        assert agent.supervisor.holdings() == ()

    play(scene)


# --- primary alone --------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [Phase.UNPROTECTED, Phase.RELEASING])
def test_plugs_that_a_dead_worker_left_are_taken_out(play: Play, qemu: Qemu, phase: Phase) -> None:
    async def scene(agent: TestedAgent) -> None:
        agent.holds(qemu, Role.PRIMARY, generation=1, is_plugged=True)
        await agent.supervisor.apply((order(Role.PRIMARY, phase),))
        assert agent.started() == [("clean", "primary", 2)]
        assert agent.outbox.said == []
        says(agent, Finished(outcome="taken out", vm_lives=True))
        await until(lambda: not agent.supervisor.busy_vms())
        await until(lambda: not agent.entry.is_plugged)
        await agent.supervisor.apply((order(Role.PRIMARY, phase),))
        assert len(agent.started()) == 1
        assert (("released", "vm", 2) in agent.outbox.said) == (phase is Phase.RELEASING)
        assert qemu.poll() is None

    play(scene)


def test_a_standby_that_won_and_whose_worker_died_is_looked_into(play: Play, qemu: Qemu) -> None:
    async def scene(agent: TestedAgent) -> None:
        agent.holds(qemu, Role.PRIMARY, generation=1, is_standby=True)
        await agent.supervisor.apply((order(Role.PRIMARY, Phase.UNPROTECTED),))
        assert agent.started() == [("clean", "primary", 2)]
        says(agent, Finished(outcome="it was never brought to life", vm_lives=False))
        assert await asyncio.to_thread(qemu.wait, 5) == -9
        await until(lambda: agent.entry.role is Role.NONE)

    play(scene)


def test_an_unprotected_vm_without_plugs_needs_nothing(play: Play, qemu: Qemu) -> None:
    async def scene(agent: TestedAgent) -> None:
        agent.finds(qemu)
        await agent.supervisor.apply((order(Role.PRIMARY, Phase.UNPROTECTED),))
        assert agent.started() == []
        assert agent.outbox.said == []
        assert [h.role for h in agent.supervisor.holdings()] == [Role.PRIMARY]

    play(scene)


def test_a_guest_that_ended_is_let_go_and_its_qemu_ended(play: Play, qemu: Qemu) -> None:
    async def scene(agent: TestedAgent) -> None:
        agent.holds(qemu, Role.PRIMARY, generation=1)
        await agent.supervisor.apply((order(Role.PRIMARY, Phase.ENDED),))
        assert qemu.wait(5) == -9
        assert agent.entry.role is Role.NONE

    play(scene)


def test_a_retired_protection_is_forgotten_and_its_vm_runs_on(play: Play, qemu: Qemu) -> None:
    async def scene(agent: TestedAgent) -> None:
        agent.holds(qemu, Role.PRIMARY, generation=1)
        await agent.supervisor.apply((order(Role.PRIMARY, Phase.RETIRED),))
        assert qemu.poll() is None
        assert agent.entry.role is Role.NONE

    play(scene)


# --- orders ---------------------------------------------------------------------------------------


def test_an_order_of_an_older_generation_is_refused(play: Play, qemu: Qemu) -> None:
    async def scene(agent: TestedAgent) -> None:
        agent.holds(qemu, Role.PRIMARY, generation=3, content="primary:None")
        await agent.supervisor.apply((order(Role.NONE, Phase.UNPROTECTED, 2),))
        assert qemu.poll() is None
        assert agent.entry.generation == 3

    play(scene)


@pytest.mark.parametrize(
    "other", [order(Role.NONE, Phase.SEEDING), order(Role.PRIMARY, Phase.SEEDING, peer="h3")]
)
def test_the_same_generation_with_other_content_is_refused(
    play: Play, qemu: Qemu, other: object
) -> None:
    async def scene(agent: TestedAgent) -> None:
        agent.finds(qemu)
        await agent.supervisor.apply((SEEDING_ORDER,))
        await agent.supervisor.apply((other,))  # type: ignore[arg-type]
        await agent.supervisor.apply((order(Role.PRIMARY, Phase.PROTECTED),))
        await until(lambda: len(agent.heard("ordered")) == 1)
        assert agent.heard("ordered")[0]["assignment"]["phase"] == "protected"
        assert qemu.poll() is None

    play(scene)


def test_a_worker_is_told_of_a_change_and_not_of_a_repetition(play: Play, qemu: Qemu) -> None:
    async def scene(agent: TestedAgent) -> None:
        agent.finds(qemu)
        handover = order(Role.PRIMARY, Phase.PROTECTED, handover=True)
        for assignment in (SEEDING_ORDER, SEEDING_ORDER, PROTECTED_ORDER, handover, handover):
            await agent.supervisor.apply((assignment,))
        await until(lambda: len(agent.heard("ordered")) >= 2)
        told = [n["assignment"] for n in agent.heard("ordered")]
        assert [(t["phase"], t["handover"]) for t in told] == [
            ("protected", False),
            ("protected", True),
        ]

    play(scene)


def test_a_worker_that_lives_is_told_to_let_go_and_says_its_last_word(play: Play) -> None:
    async def scene(agent: TestedAgent) -> None:
        await agent.supervisor.apply((BACKUP_ORDER,))
        await agent.supervisor.apply((order(Role.NONE, Phase.UNPROTECTED, 3),))
        await until(lambda: not agent.supervisor.busy_vms())
        assert agent.entry.role is Role.NONE
        assert agent.entry.generation == 3
        assert list((agent.run_dir / "workers").iterdir()) == []

    play(scene)


def test_absence_from_the_set_means_nothing(play: Play, qemu: Qemu) -> None:
    async def scene(agent: TestedAgent) -> None:
        agent.finds(qemu)
        await agent.supervisor.apply((SEEDING_ORDER,))
        await agent.supervisor.apply(())
        assert agent.supervisor.busy_vms() == {"vm"}
        assert qemu.poll() is None

    play(scene)


# --- restarts -------------------------------------------------------------------------------------


def test_the_next_agent_adopts_a_living_worker_and_removes_a_dead_ones_socket(
    play: Play, qemu: Qemu
) -> None:
    async def scene(agent: TestedAgent) -> None:
        agent.finds(qemu)
        (agent.run_dir / "qemu").write_text(str(qemu.pid))
        await agent.supervisor.apply((SEEDING_ORDER,))
        says(agent, WantSeeded(generation=2))
        await until(lambda: bool(agent.heard("noted")))
        await agent.supervisor.close()
        dead = agent.run_dir / "workers" / "other.1.sock"
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(dead))
        async with AgentClient((NOBODY,), "h1") as client:
            heir = TestedAgent(agent.run_dir, client)
            await heir.supervisor.adopt()
            assert heir.supervisor.busy_vms() == {"vm"}
            assert not dead.exists()
            await heir.supervisor.apply((PROTECTED_ORDER,))
            await until(lambda: len(heir.heard("ordered")) == 1)
            assert len(heir.started()) == 1
            assert [(h.generation, h.role) for h in heir.supervisor.holdings()] == [
                (2, Role.PRIMARY)
            ]
            await heir.kill_worker()
            await until(lambda: len(heir.started()) == 2)
            heir.supervisor._orders.clear()
            heir.kill_all_workers()
            await until(lambda: not heir.supervisor._tasks)
            await heir.supervisor.close()

    play(scene)


def test_a_worker_that_is_silent_at_the_adoption_is_waited_for_and_adopted_later(
    play: Play, qemu: Qemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "ADOPTION_SECONDS", 0.1)
    monkeypatch.setattr(supervisor, "ADOPTION_AGAIN_SECONDS", 0.1)

    async def scene(agent: TestedAgent) -> None:
        await agent.supervisor.apply((BACKUP_ORDER,))
        agent.holds(qemu, Role.PRIMARY, is_standby=True)
        await agent.supervisor.close()
        worker = agent.heard("started")[-1]["pid"]
        os.kill(worker, signal.SIGSTOP)
        async with AgentClient((NOBODY,), "h1") as client:
            heir = TestedAgent(agent.run_dir, client)
            await heir.supervisor.adopt()
            won = order(Role.PRIMARY, Phase.UNPROTECTED, 3)
            await heir.supervisor.apply((won,))
            assert heir.supervisor.busy_vms() == set()
            assert len(heir.started()) == 1
            assert qemu.poll() is None
            os.kill(worker, signal.SIGCONT)
            while not heir.supervisor.busy_vms():
                await heir.supervisor.apply((won,))
            await until(lambda: len(heir.heard("ordered")) == 1)
            assert len(heir.started()) == 1
            heir.supervisor._orders.clear()
            heir.kill_all_workers()
            await until(lambda: not heir.supervisor._tasks)
            await heir.supervisor.close()

    play(scene)


def test_a_worker_that_does_not_start_is_given_up(play: Play, qemu: Qemu) -> None:
    async def scene(agent: TestedAgent) -> None:
        agent.finds(qemu)
        fails_to_start()
        await agent.supervisor.apply((SEEDING_ORDER,))
        assert agent.supervisor.busy_vms() == frozenset()
        await agent.supervisor.apply((SEEDING_ORDER,))
        assert ("seeding-failed", "vm", 2) in agent.outbox.said

    play(scene)


# --- what workers want ----------------------------------------------------------------------------


def test_what_a_worker_wants_known_is_reported_and_noted(play: Play, qemu: Qemu) -> None:
    async def scene(agent: TestedAgent) -> None:
        agent.finds(qemu)
        await agent.supervisor.apply((SEEDING_ORDER,))
        says(agent, WantSeeded(generation=2), WantSeedingFailed(generation=2, reason="full"))
        await until(lambda: len(agent.heard("noted")) == 2)
        assert [n["what"] for n in agent.heard("noted")] == ["seeded", "seeding-failed"]
        assert agent.outbox.said == [("seeded", "vm", 2), ("seeding-failed", "vm", 2)]

    play(scene)


def test_a_claim_that_is_won_is_on_disk_before_the_worker_knows(play: Play) -> None:
    async def scene(agent: TestedAgent) -> None:
        await agent.supervisor.apply((BACKUP_ORDER,))
        agent.outbox.verdict = ClaimVerdict(won=True, record=record("h1", 3), explanation="won")
        says(agent, WantClaim(claim=CLAIM))
        await until(lambda: len(agent.heard("decided")) == 1)
        assert (agent.entry.generation, agent.entry.role) == (3, Role.PRIMARY)
        says(agent, WantClaim(claim=CLAIM))
        await until(lambda: len(agent.heard("decided")) == 2)
        assert len(agent.outbox.claims) == 1
        assert agent.heard("decided")[0] == agent.heard("decided")[1]

    play(scene)


def test_a_win_that_is_learned_late_does_not_contradict_the_next_order(
    play: Play, qemu: Qemu
) -> None:
    async def scene(agent: TestedAgent) -> None:
        await agent.supervisor.apply((BACKUP_ORDER,))
        agent.holds(qemu, Role.BACKUP)
        agent.outbox.verdict = ClaimVerdict(won=True, record=record("h1", 4), explanation="won")
        says(agent, WantClaim(claim=CLAIM))
        await until(lambda: len(agent.heard("decided")) == 1)
        assert (agent.entry.generation, agent.entry.role) == (3, Role.PRIMARY)
        await agent.supervisor.apply((order(Role.PRIMARY, Phase.SEEDING, 4),))
        await until(lambda: len(agent.heard("ordered")) == 1)

    play(scene)


def test_a_claim_that_is_lost_changes_nothing_but_is_told(play: Play) -> None:
    async def scene(agent: TestedAgent) -> None:
        await agent.supervisor.apply((BACKUP_ORDER,))
        agent.outbox.verdict = ClaimVerdict(won=False, record=record("h2", 3), explanation="lost")
        says(agent, WantClaim(claim=CLAIM))
        await until(lambda: len(agent.heard("decided")) == 1)
        assert agent.entry.generation == 2
        assert agent.entry.role is Role.NONE

    play(scene)
