"""The port for primaries of other hosts, over real sockets: who is let in, who is counted."""

import asyncio
import dataclasses
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from tests.integration.transport.certificates import cluster
from tests.unit.agent.agents import until

from holdfast_agent.checkpoint.worker_messages import Introduced, PeerConnected
from holdfast_agent.core.failures import PeerLost
from holdfast_agent.core.frames import FrameEncoder, FrameKind
from holdfast_agent.core.payloads import Hello
from holdfast_agent.core.preface import Preface, encode_preface
from holdfast_agent.host import peer_listener
from holdfast_agent.host.agent_channel import AgentChannel
from holdfast_agent.host.peer_listener import PeerListener
from holdfast_agent.host.worker_link import WorkerLink
from holdfast_agent.transport.connection import FrameConnection
from holdfast_agent.transport.identity import Identity
from holdfast_agent.transport.opening import PeerRefused, greet, reach
from holdfast_api.words import Generation, Role, VmId

HELLO = Hello(
    vm="vm",
    generation=3,
    primary="h2",
    backup="h1",
    keepalive_ms=50,
    silence_limit_ms=250,
    blocks=(("ram", 4096),),
)
PREFACE = Preface("vm", 3, tls=True)
Scene = Callable[[PeerListener, int], Awaitable[None]]


def hello_bytes(hello: Hello) -> bytes:
    encoder = FrameEncoder(sender=Role.PRIMARY, generation=hello.generation)
    views, _ = encoder.encode(FrameKind.HELLO, 0, [hello.model_dump_json().encode()])
    return b"".join(views)


def serve(scene: Scene, link: WorkerLink | None = None, *, tls: bool = True) -> None:
    """Run a scene beside h1's listener, which has `link` as the worker of vm in generation 3."""

    def link_of(vm: VmId, generation: Generation) -> WorkerLink | None:
        return link if (vm, generation) == ("vm", 3) else None

    async def whole() -> None:
        identity = cluster().identity("h1") if tls else None
        listener = PeerListener("127.0.0.1:0", link_of, identity)
        port = listener._listener.getsockname()[1]
        serving = asyncio.create_task(listener.serve())
        try:
            await scene(listener, port)
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            await listener.close()

    asyncio.run(whole())


def dial(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), 10)


def greeting(port: int, hello: Hello, *, identity: Identity | None) -> None:
    """Say HELLO as a primary does; blocks. Raises PeerRefused or PeerLost."""
    preface = Preface(hello.vm, hello.generation, tls=identity is not None)
    connection = FrameConnection(
        reach(f"127.0.0.1:{port}", preface, "h1", identity, 10),
        role=Role.PRIMARY,
        generation=hello.generation,
        silence_limit_seconds=10,
        keepalive_seconds=10,
    )
    try:
        greet(connection, hello, 10)
    finally:
        connection.close()


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: somewhere.example\r\n\r\n" + b"x" * 200,
        b"\0" * 4096,
        b"\xff" * 4096,
        encode_preface(PREFACE).replace(b"vm", b"VM"),
        encode_preface(PREFACE) + b"\0" * 4096,
        encode_preface(dataclasses.replace(PREFACE, tls=False)) + hello_bytes(HELLO),
    ],
    ids=["http", "zeros", "ones", "not-a-name", "no-handshake", "no-tls"],
)
def test_garbage_is_refused_and_counted(said: bytes) -> None:
    async def scene(listener: PeerListener, port: int) -> None:
        with dial(port) as sock:
            sock.sendall(said)
            await until(lambda: listener.refused == 1)

    serve(scene)


@pytest.mark.parametrize(
    "said",
    [hello_bytes(HELLO)[:-1] + b"!", hello_bytes(HELLO).replace(b'"vm":"vm"', b'"vm":"VM"')],
    ids=["torn", "not-a-name"],
)
def test_a_hello_that_can_not_be_believed_is_refused_and_counted(said: bytes) -> None:
    async def scene(listener: PeerListener, port: int) -> None:
        with dial(port) as sock:
            sock.sendall(encode_preface(dataclasses.replace(PREFACE, tls=False)) + said)
            await until(lambda: listener.refused == 1)

    serve(scene, tls=False)


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [(True, False, "is `tls` off there"), (False, True, "tls-required")],
)
def test_a_peer_of_the_other_conviction_learns_it(*, ours: bool, theirs: bool, said: str) -> None:
    async def scene(listener: PeerListener, port: int) -> None:
        identity = cluster().identity("h2") if ours else None
        with pytest.raises((PeerLost, PeerRefused), match=said):
            await asyncio.to_thread(greeting, port, HELLO, identity=identity)
        await until(lambda: listener.refused == 1)

    serve(scene, tls=theirs)


def test_who_connects_and_goes_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_listener, "HELLO_SECONDS", 10.0)

    async def scene(listener: PeerListener, port: int) -> None:
        dial(port).close()
        await until(lambda: listener.refused == 1)

    serve(scene)


def test_many_who_say_nothing_do_not_keep_others_out_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peer_listener, "HELLO_SECONDS", 0.2)
    count = peer_listener.HELLO_LIMIT + 2

    async def scene(listener: PeerListener, port: int) -> None:
        silent = [dial(port) for _ in range(count)]
        with pytest.raises(PeerRefused) as raised:
            await asyncio.to_thread(greeting, port, HELLO, identity=cluster().identity("h2"))
        assert raised.value.refusal.code == "not-expected"
        await until(lambda: listener.refused == count)
        for sock in silent:
            sock.close()

    serve(scene)


@pytest.mark.parametrize("handed", [False, True], ids=["preface", "hello"])
def test_a_beginning_that_drips_is_refused_at_the_deadline(
    monkeypatch: pytest.MonkeyPatch, *, handed: bool
) -> None:
    monkeypatch.setattr(peer_listener, "HELLO_SECONDS", 0.3)
    preface = encode_preface(dataclasses.replace(PREFACE, tls=False))
    at_once, dripping = (preface, hello_bytes(HELLO)) if handed else (b"", preface)

    async def scene(listener: PeerListener, port: int) -> None:
        with dial(port) as sock:
            sock.sendall(at_once)
            for byte in dripping:
                if listener.refused:
                    break
                try:
                    sock.sendall(bytes([byte]))
                except (BrokenPipeError, ConnectionResetError):
                    break
                await asyncio.sleep(0.01)
            await until(lambda: listener.refused == 1)

    serve(scene, tls=False)


@pytest.mark.parametrize(
    "hello",
    [HELLO.model_copy(update={"generation": 2}), HELLO.model_copy(update={"vm": "other"})],
    ids=["generation", "vm"],
)
def test_a_primary_that_nobody_expects_is_told_so(
    run_dir: Path, introduction: Introduced, hello: Hello
) -> None:
    async def scene(listener: PeerListener, port: int) -> None:
        with pytest.raises(PeerRefused) as raised:
            await asyncio.to_thread(greeting, port, hello, identity=cluster().identity("h2"))
        assert raised.value.refusal.code == "not-expected"
        assert listener.refused == 0  # it is early or late, not a stranger

    channel = AgentChannel(run_dir / "w.sock", introduction)
    link = asyncio.run(linked(channel, run_dir / "w.sock"))
    serve(scene, link)
    assert channel.receive() == []
    link.close()
    channel.close()


def test_a_primary_that_is_expected_reaches_its_worker(
    run_dir: Path, introduction: Introduced
) -> None:
    channel = AgentChannel(run_dir / "w.sock", introduction)
    link = asyncio.run(linked(channel, run_dir / "w.sock"))

    async def scene(listener: PeerListener, port: int) -> None:
        with dial(port) as sock:
            sock.sendall(encode_preface(PREFACE) + b"and more")
            messages = []

            def arrived() -> bool:
                messages.extend(channel.receive(takes_descriptors=True))
                return bool(messages)

            await until(arrived)
            [(message, descriptor)] = messages
            assert isinstance(message, PeerConnected)
            assert (message.vm, message.generation, message.tls) == ("vm", 3, True)
            assert message.address == "{}:{}".format(*sock.getsockname())
            assert descriptor is not None
            with socket.socket(fileno=descriptor) as handed:
                handed.settimeout(10)
                assert handed.recv(100) == b"and more"  # not a byte more was read than the preface
                handed.send(b"back")
                assert sock.recv(100) == b"back"
        assert listener.refused == 0

    serve(scene, link)
    link.close()
    channel.close()


async def linked(channel: AgentChannel, path: Path) -> WorkerLink:
    task = asyncio.create_task(WorkerLink.connect(path, 10.0))
    while not task.done():
        channel.receive()
        await asyncio.sleep(0.005)
    return await task
