"""Both ends of the socket between agent and worker, over the real thing."""

import asyncio
import contextlib
import functools
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.unit.agent.agents import until

from holdfast_agent.checkpoint.wants import REPEAT_NS, Wants
from holdfast_agent.checkpoint.worker_messages import (
    Finished,
    Happened,
    Introduced,
    Noted,
    PeerConnected,
    Reported,
    ToAgent,
    WantClaim,
)
from holdfast_agent.host.agent_channel import QUEUE_LIMIT, AgentChannel
from holdfast_agent.host.worker_link import WorkerLink, WorkerUnreachable
from holdfast_api.messages import EventReport
from holdfast_api.records import WorkerReport
from holdfast_api.words import ClaimReason, EventKind, Role, WorkerPhase

POLL_SECONDS = 0.005
HANDED_OVER = PeerConnected(vm="vm", generation=3, tls=True, address="10.0.0.1:7")
PATIENCE_SECONDS = 10.0


@pytest.fixture
def channel(run_dir: Path, introduction: Introduced) -> Iterator[AgentChannel]:
    channel = AgentChannel(run_dir / "w.sock", introduction)
    yield channel
    channel.close()


async def connect(channel: AgentChannel, path: Path) -> WorkerLink:
    """Connect while the worker looks at its socket."""
    task = asyncio.create_task(WorkerLink.connect(path, PATIENCE_SECONDS))
    while not task.done():
        channel.receive()
        await asyncio.sleep(POLL_SECONDS)
    return await task


def run(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scene)


class Listener:
    """Reads a link in the background."""

    def __init__(self, link: WorkerLink) -> None:
        self.heard: list[ToAgent] = []
        self.task = asyncio.create_task(link.read(self._hear))

    async def _hear(self, link: WorkerLink, message: ToAgent) -> None:
        del link
        self.heard.append(message)


def raw_agent(channel: AgentChannel, path: Path) -> socket.socket:
    """Connect as an agent that says whatever a test wants."""
    agent = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    agent.settimeout(PATIENCE_SECONDS)
    agent.connect(str(path))
    channel.receive()
    assert b"introduced" in agent.recv(1 << 16)
    return agent


def event(number: int) -> Happened:
    return Happened(
        event=EventReport(kind=EventKind.PROMOTED, host="h1", vm="vm", message=f"event {number}")
    )


def reported() -> Reported:
    return Reported(
        report=WorkerReport(
            vm="vm", generation=3, role=Role.BACKUP, phase=WorkerPhase.SEEDING, detail="x" * 1000
        )
    )


def test_a_worker_introduces_itself_to_every_agent(channel: AgentChannel, run_dir: Path) -> None:
    async def scene() -> None:
        first = await connect(channel, run_dir / "w.sock")
        assert first.introduction.vm == "vm"
        first.close()
        second = await connect(channel, run_dir / "w.sock")
        assert second.introduction == first.introduction
        second.close()

    run(scene())


def test_only_the_newest_agent_is_spoken_with(channel: AgentChannel, run_dir: Path) -> None:
    async def scene() -> None:
        first = await connect(channel, run_dir / "w.sock")
        first_listener = Listener(first)
        second = await connect(channel, run_dir / "w.sock")
        second_listener = Listener(second)
        channel.send(event(1))
        await until(lambda: bool(second_listener.heard))
        await first_listener.task
        assert first_listener.heard == []
        first.close()
        channel.close()
        await second_listener.task
        second.close()

    run(scene())


def test_a_new_introduction_reaches_the_agent(
    channel: AgentChannel, run_dir: Path, introduction: Introduced
) -> None:
    async def scene() -> None:
        link = await connect(channel, run_dir / "w.sock")
        listener = Listener(link)
        channel.introduce(introduction.model_copy(update={"qemu_pid": 77}))
        await until(lambda: link.introduction.qemu_pid == 77)
        channel.close()
        await listener.task
        link.close()

    run(scene())


def test_a_descriptor_travels_with_its_message(channel: AgentChannel, run_dir: Path) -> None:
    async def scene() -> None:
        link = await connect(channel, run_dir / "w.sock")
        reading, writing = os.pipe()
        assert await link.send(HANDED_OVER, reading)
        os.close(reading)
        [(message, descriptor)] = channel.receive(takes_descriptors=True)
        assert message == HANDED_OVER
        assert descriptor is not None
        os.write(writing, b"through")
        assert os.read(descriptor, 16) == b"through"
        os.close(descriptor)
        os.close(writing)
        link.close()

    run(scene())


def test_a_descriptor_that_nobody_waits_for_is_closed(channel: AgentChannel, run_dir: Path) -> None:
    async def scene() -> None:
        link = await connect(channel, run_dir / "w.sock")
        reading, writing = os.pipe()
        assert await link.send(HANDED_OVER, reading)
        os.close(reading)
        assert channel.receive() == [(HANDED_OVER, None)]
        with pytest.raises(BrokenPipeError):  # no end to read from is left
            os.write(writing, b"lost")
        os.close(writing)
        link.close()

    run(scene())


def test_descriptors_that_nobody_expects_are_closed(channel: AgentChannel, run_dir: Path) -> None:
    agent = raw_agent(channel, run_dir / "w.sock")
    ends = [os.pipe() for _ in range(2)]
    readers = [reading for reading, _ in ends]
    socket.send_fds(agent, [b"not a message"], readers)
    socket.send_fds(agent, [Noted(what="seeded").model_dump_json().encode()], readers)
    for reading in readers:
        os.close(reading)
    [(message, descriptor)] = channel.receive(takes_descriptors=True)
    assert message == Noted(what="seeded")
    assert descriptor is not None
    os.close(descriptor)
    for _, writing in ends:
        with pytest.raises(BrokenPipeError):
            os.write(writing, b"nobody")
        os.close(writing)
    agent.close()


def test_what_an_agent_of_another_version_says_is_passed_over(
    channel: AgentChannel, run_dir: Path
) -> None:
    agent = raw_agent(channel, run_dir / "w.sock")
    agent.send(b'{"type": "unheard-of"}')
    agent.send(b"\xff\xfe")
    agent.send(Noted(what="seeded").model_dump_json().encode())
    assert channel.receive() == [(Noted(what="seeded"), None)]
    assert channel.is_connected
    agent.close()


def test_an_agent_that_dies_is_noticed_and_its_successor_hears_what_was_kept(
    channel: AgentChannel, run_dir: Path
) -> None:
    async def scene() -> None:
        first = await connect(channel, run_dir / "w.sock")
        first.close()
        channel.receive()
        assert not channel.is_connected
        channel.send(event(1))
        channel.send(reported())  # the next report replaces it: not kept
        channel.send(Finished(outcome="promoted", vm_lives=True))
        assert not channel.is_drained
        second = await connect(channel, run_dir / "w.sock")
        listener = Listener(second)
        await until(lambda: len(listener.heard) == 2)
        assert listener.heard == [event(1), Finished(outcome="promoted", vm_lives=True)]
        assert channel.is_drained
        channel.close()
        await listener.task
        second.close()

    run(scene())


def test_a_claim_is_repeated_until_an_agent_answers(channel: AgentChannel, run_dir: Path) -> None:
    async def scene() -> None:
        wants = Wants(
            channel, vm="vm", host="h1", generation=3, new_claim_name=lambda: "claim-0001"
        )
        wants.claim(ClaimReason.PEER_SILENT, 5, 0)  # no agent lives
        link = await connect(channel, run_dir / "w.sock")
        listener = Listener(link)
        wants.tend(REPEAT_NS - 1)
        wants.tend(REPEAT_NS)
        wants.tend(2 * REPEAT_NS)
        await until(lambda: len(listener.heard) == 2)
        assert [m.claim.claim for m in listener.heard if isinstance(m, WantClaim)] == [
            "claim-0001"
        ] * 2
        assert not wants.is_mine("claim-0002")
        assert wants.is_mine("claim-0001")
        wants.tend(3 * REPEAT_NS)
        channel.send(event(1))
        await until(lambda: len(listener.heard) == 3)
        assert listener.heard[-1] == event(1)
        channel.close()
        await listener.task
        link.close()

    run(scene())


def test_what_is_kept_for_an_absent_agent_has_a_limit(channel: AgentChannel, run_dir: Path) -> None:
    for number in range(QUEUE_LIMIT + 10):
        channel.send(event(number))

    async def scene() -> None:
        link = await connect(channel, run_dir / "w.sock")
        listener = Listener(link)
        channel.flush()

        def all_heard() -> bool:
            channel.flush()
            return len(listener.heard) == QUEUE_LIMIT

        await until(all_heard)
        assert listener.heard[0] == event(10)
        assert listener.heard[-1] == event(QUEUE_LIMIT + 9)
        channel.close()
        await listener.task
        link.close()

    run(scene())


def test_an_agent_that_does_not_read_never_blocks_its_worker(
    channel: AgentChannel, run_dir: Path
) -> None:
    agent = raw_agent(channel, run_dir / "w.sock")
    for _ in range(20_000):  # more than any socket buffer holds
        channel.send(reported())
    assert channel.is_connected
    channel.send(event(1))
    assert not channel.is_drained
    agent.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while agent.recv(1 << 16):
            """Read all that fitted."""
    channel.flush()
    assert channel.is_drained
    assert b"event 1" in agent.recv(1 << 16)
    agent.close()


def unreachable(path: Path) -> WorkerUnreachable:
    async def scene() -> None:
        await WorkerLink.connect(path, 0.1)

    with pytest.raises(WorkerUnreachable) as raised:
        run(scene())
    return raised.value


def test_a_dead_worker_is_told_from_one_that_only_says_nothing(run_dir: Path) -> None:
    path = run_dir / "other.sock"
    assert unreachable(path).is_dead
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        assert unreachable(path).is_dead
        listener.listen(1)
        assert not unreachable(path).is_dead
    assert unreachable(path).is_dead


Say = Callable[[bytes], Coroutine[Any, Any, None]]


@contextlib.asynccontextmanager
async def raw_worker(path: Path) -> AsyncIterator[tuple[asyncio.Task[WorkerLink], Say]]:
    """Yield an agent's attempt to link, and how to say whatever a test wants as its worker."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen(1)
        listener.setblocking(False)
        linking = asyncio.create_task(WorkerLink.connect(path, PATIENCE_SECONDS))
        connection, _ = await loop.sock_accept(listener)
        with connection:
            yield linking, functools.partial(loop.sock_sendall, connection)


@pytest.mark.parametrize("first_words", [b"garbage", b'{"type": "want-seeded", "generation": 1}'])
def test_a_worker_that_does_not_introduce_itself_is_refused(
    run_dir: Path, first_words: bytes
) -> None:
    async def scene() -> None:
        async with raw_worker(run_dir / "other.sock") as (linking, say):
            await say(first_words)
            with pytest.raises(WorkerUnreachable):
                await linking

    run(scene())


def test_garbage_from_a_worker_is_passed_over(run_dir: Path, introduction: Introduced) -> None:
    async def scene() -> None:
        async with raw_worker(run_dir / "other.sock") as (linking, say):
            await say(introduction.model_dump_json().encode())
            link = await linking
            said = Listener(link)
            await say(b'{"type": "unheard-of"}')
            await say(event(1).model_dump_json().encode())
        await said.task
        assert said.heard == [event(1)]
        link.close()

    run(scene())


def test_sending_to_a_worker_that_is_gone_fails_and_says_so(
    channel: AgentChannel, run_dir: Path
) -> None:
    async def scene() -> None:
        link = await connect(channel, run_dir / "w.sock")
        channel.close()
        assert not await link.send(Noted(what="seeded"))
        link.close()

    run(scene())
    assert not (run_dir / "w.sock").exists()


def test_last_words_are_heard_though_the_worker_left_without_reading_ours(
    channel: AgentChannel, run_dir: Path
) -> None:
    async def scene() -> None:
        link = await connect(channel, run_dir / "w.sock")
        assert await link.send(Noted(what="seeded"))  # nobody will read it
        channel.send(event(1))
        channel.send(Finished(outcome="promoted", vm_lives=True))
        channel.close()
        listener = Listener(link)
        await asyncio.wait_for(listener.task, PATIENCE_SECONDS)
        assert listener.heard == [event(1), Finished(outcome="promoted", vm_lives=True)]
        link.close()

    run(scene())
