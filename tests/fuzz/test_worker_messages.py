"""Datagrams between agent and worker: what is not understood is dropped, with all descriptors."""

import array
import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from holdfast_agent.checkpoint.worker_messages import (
    Decided,
    Finished,
    Introduced,
    Noted,
    Ordered,
    PeerConnected,
    ToAgent,
)
from holdfast_agent.host.agent_channel import AgentChannel
from holdfast_agent.host.worker_link import WorkerLink, WorkerUnreachable
from holdfast_api.messages import Assignment, ClaimVerdict
from holdfast_api.records import Policy
from holdfast_api.words import Phase, Role

EXAMPLES = 120
CONNECT_SECONDS = 5.0
INTRODUCTION = Introduced(vm="web", host="h1", generation=3, role=Role.BACKUP, pid=7)
SOUND = [
    json.loads(message.model_dump_json())
    for message in (
        Ordered(
            assignment=Assignment(
                vm="web", generation=3, role=Role.BACKUP, phase=Phase.SEEDING, policy=Policy()
            )
        ),
        Decided(claim="c0000001", verdict=ClaimVerdict(won=False, record=None, explanation="")),
        PeerConnected(vm="web", generation=3, tls=True, address="10.0.0.1:7"),
        Noted(what="seeded"),
        INTRODUCTION,
        Finished(outcome="over", vm_lives=False),
    )
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=8,
)


@st.composite
def datagrams(draw: st.DrawFn) -> bytes:
    """A message, sound or with a field changed, lost or put in; or no message at all."""
    if draw(st.booleans()):
        return draw(st.binary(min_size=1, max_size=200))
    message: dict[str, Any] = dict(draw(st.sampled_from(SOUND)))
    if draw(st.booleans()):
        name = draw(st.sampled_from(sorted(message)) | st.text(max_size=5))
        if draw(st.booleans()):
            message.pop(name, None)
        else:
            message[name] = draw(JSON)
    return json.dumps(message).encode()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "worker.sock"


@contextlib.contextmanager
def no_descriptor_is_left() -> Iterator[None]:
    before = set(Path("/proc/self/fd").iterdir())
    yield
    assert set(Path("/proc/self/fd").iterdir()) == before


@given(said=st.lists(st.tuples(datagrams(), st.integers(0, 3)), max_size=8))
@example(said=[(b"[" * 100_000, 1)])
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_a_worker_takes_in_what_it_understands(said: list[tuple[bytes, int]], path: Path) -> None:
    with no_descriptor_is_left():
        channel = AgentChannel(path, INTRODUCTION)
        agent = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        agent.connect(str(path))
        try:
            for data, descriptor_count in said:
                passed = array.array("i", [agent.fileno()] * descriptor_count)
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)] if passed else []
                agent.sendmsg([data], rights)
            messages = channel.receive(takes_descriptors=True)
            assert len(messages) <= len(said)
            for message, descriptor in messages:
                assert isinstance(message, Ordered | Decided | PeerConnected | Noted)
                if descriptor is not None:
                    os.close(descriptor)
            assert channel.is_connected
        finally:
            agent.close()
            channel.close()


async def link_to(path: Path, said: list[bytes]) -> list[ToAgent]:
    """Return what an agent understands of a worker that says all this and hangs up."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen(1)
    heard: list[ToAgent] = []

    async def handle(_link: WorkerLink, message: ToAgent) -> None:
        heard.append(message)

    with listener:
        connecting = asyncio.create_task(WorkerLink.connect(path, CONNECT_SECONDS))
        listener.settimeout(0)
        worker, _ = await asyncio.get_running_loop().sock_accept(listener)
        with worker:
            for data in said:
                worker.send(data)
        link = await connecting
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await link.read(handle)
        finally:
            link.close()
    return heard


@given(said=st.lists(datagrams(), max_size=8))
@example(said=[b"[" * 100_000])
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_an_agent_hears_what_it_understands(said: list[bytes], path: Path) -> None:
    first = INTRODUCTION.model_dump_json().encode()
    with no_descriptor_is_left():
        path.unlink(missing_ok=True)
        heard = asyncio.run(link_to(path, [first, *said]))
    assert len(heard) <= len(said)


@given(said=st.lists(datagrams(), min_size=1, max_size=1))
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_a_worker_without_an_introduction_is_not_linked(said: list[bytes], path: Path) -> None:
    with no_descriptor_is_left():
        path.unlink(missing_ok=True)
        try:
            asyncio.run(link_to(path, said))
        except WorkerUnreachable:
            return
    assert json.loads(said[0])["type"] == "introduced"
