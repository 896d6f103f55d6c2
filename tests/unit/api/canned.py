"""A real HTTP server on loopback that gives the answers a test tells it to, and model-valid ones.

`FakeController` runs uvicorn in a thread; `stop` ends it, hung requests included.
"""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from pydantic import BaseModel

from holdfast_api.errors import PROBLEMS, Refused
from holdfast_api.messages import (
    Assignments,
    Claim,
    ClaimVerdict,
    Heartbeat,
    HeartbeatAnswer,
    HostList,
    VmList,
)
from holdfast_api.records import (
    ClaimStamp,
    Event,
    Host,
    HostFacts,
    HostSettings,
    Percentiles,
    Policy,
    Protection,
    ProtectionRecord,
    SeedingProgress,
    Vm,
    VmFacts,
)
from holdfast_api.words import ClaimReason, EventKind, Phase

START_SECONDS_MAX = 20.0
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class Reply:
    """One answer: parts are sent one by one; `hang` and `tear` say what comes after them."""

    status: int = 200
    parts: tuple[bytes, ...] = (b"",)
    content_type: str = "application/json"
    hang: bool = False
    """Never end; without parts, never begin."""
    tear: bool = False
    """Cut the connection instead of ending."""


@dataclass(frozen=True)
class Request:
    """What a client sent."""

    method: str
    path: str
    query: str
    body: bytes
    port: int
    """The client's: the same one is the same connection."""

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def good(model: BaseModel, status: int = 200) -> Reply:
    return Reply(status, (model.model_dump_json().encode(),))


def problem(code: str, detail: str = "because", faults: list[str] | None = None) -> Reply:
    document = Refused(code, detail, faults).problem
    body = document.model_dump_json().encode()
    return Reply(PROBLEMS[code][0], (body,), "application/problem+json")


def stream(*events: Event, hang: bool = False, tear: bool = False) -> Reply:
    parts = tuple(
        f": alive\r\n\r\nid: {e.position}\ndata: {e.model_dump_json()}\n\n".encode() for e in events
    )
    return Reply(200, parts or (b": alive\n\n",), "text/event-stream", hang=hang, tear=tear)


HANG = Reply(parts=(), hang=True)
UNKNOWN = problem("unknown-path", "the test gave no answer for this")


@dataclass
class FakeController:
    """Answers each method and path with its replies in turn; the last one repeats."""

    requests: list[Request] = field(default_factory=list)
    _replies: dict[tuple[str, str], list[Reply]] = field(default_factory=dict)
    _server: uvicorn.Server | None = None
    _thread: threading.Thread | None = None
    _stopping: threading.Event = field(default_factory=threading.Event)

    def on(self, method: str, path: str, *replies: Reply) -> None:
        self._replies[method, path] = list(replies)

    def asked(self, method: str, path: str) -> list[Request]:
        return [r for r in self.requests if (r.method, r.path) == (method, path)]

    @property
    def url(self) -> str:
        assert self._server is not None
        port = self._server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    def start(self) -> None:
        config = uvicorn.Config(
            self._answer,
            interface="asgi3",  # uvicorn does not see that a bound method is one
            host="127.0.0.1",
            port=0,
            lifespan="off",
            ws="none",
            log_level="critical",
            timeout_graceful_shutdown=2,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        deadline_seconds = time.monotonic() + START_SECONDS_MAX
        started = threading.Event()
        while not self._server.started:
            assert time.monotonic() < deadline_seconds, "uvicorn did not start"
            started.wait(0.005)

    def stop(self) -> None:
        self._stopping.set()
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(START_SECONDS_MAX)
            assert not self._thread.is_alive(), "uvicorn did not stop"

    async def _answer(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        key = (scope["method"], scope["path"])
        replies = self._replies.get(key, [UNKNOWN])
        reply = replies.pop(0) if len(replies) > 1 else replies[0]
        self.requests.append(
            Request(*key, scope["query_string"].decode(), body, scope["client"][1])
        )
        if reply.parts:
            headers = [(b"content-type", reply.content_type.encode())]
            start = {"type": "http.response.start", "status": reply.status, "headers": headers}
            await send(start)
        for part in reply.parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        if reply.hang:
            await asyncio.to_thread(self._stopping.wait)
        if reply.tear:
            raise ConnectionAbortedError
        if reply.parts:
            await send({"type": "http.response.body", "body": b""})


@contextmanager
def closing_after_each_request(body: bytes) -> Iterator[tuple[str, list[int]]]:
    """Serve one request a connection and claim to keep it; drop the next one unanswered."""
    seen: list[int] = []
    answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with peer:
                seen.append(0)
                while peer.recv(65536):
                    seen[-1] += 1
                    if seen[-1] > 1:
                        break
                    peer.sendall(answer % (len(body), body))

    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=serve, args=(listener,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", seen
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)
        assert not thread.is_alive()


# --- model-valid content ---

FACTS = HostFacts(
    peer_address="10.0.0.1:7410",
    memory_total_bytes=8 << 30,
    memory_available_bytes=4 << 30,
    qemu_version="7.2.22",
    agent_version="0.1.0",
)
VM_FACTS = VmFacts(
    vm="redis",
    running=True,
    memory_bytes=256 << 20,
    vcpus=1,
    machine_type="pc-q35-7.2",
    qemu_version="7.2.22",
    accelerator="tcg",
    pid=4711,
)
UNSAFE = Policy(output="unbuffered")
HEARTBEAT = Heartbeat(facts=FACTS)
ASSIGNMENTS = Assignments(position=7, assignments=())
BEAT_ANSWER = HeartbeatAnswer(position=7, assignments=(), beat_seconds=2.5)
CLAIM = Claim(
    vm="redis", generation=3, host="h2", claim="0123456789abcdef", reason=ClaimReason.PEER_SILENT
)


def record(generation: int = 4, primary: str = "h2", vm: str = "redis") -> ProtectionRecord:
    return ProtectionRecord(
        vm=vm,
        generation=generation,
        phase=Phase.UNPROTECTED,
        primary=primary,
        policy=Policy(),
        claimed=ClaimStamp(claim=CLAIM.claim, host=primary, reason="peer-silent"),
    )


WON = ClaimVerdict(won=True, record=record(), explanation="yours")
LOST = ClaimVerdict(won=False, record=record(primary="h1"), explanation="h1 was faster")


def protection(
    phase: Phase = Phase.PROTECTED,
    generation: int = 2,
    primary: str = "h1",
    backup: str | None = "h2",
    policy: Policy | None = None,
    **more: Any,
) -> Protection:
    return Protection(
        vm="redis",
        phase=phase,
        generation=generation,
        primary=primary,
        backup=backup if phase in (Phase.SEEDING, Phase.PROTECTED) else None,
        policy_name=None,
        policy=policy or Policy(),
        handover=False,
        acknowledged_epoch=1234,
        pause_ms=Percentiles(p50=2.1, p99=4.9, max=7.7),
        **more,
    )


def seeding(sent_bytes: int, total_bytes: int = 256 << 20) -> Protection:
    progress = SeedingProgress(
        round=1, sent_bytes=sent_bytes, total_bytes=total_bytes, rate_bytes_per_second=64 << 20
    )
    return protection(Phase.SEEDING, seeding=progress, reason="the backup is being filled")


def host(name: str = "h1", **settings: Any) -> Host:
    return Host(
        host=name, alive=True, settings=HostSettings(**settings), facts=FACTS, primaries=("redis",)
    )


def vm(shown: Protection | None = None, name: str = "redis") -> Vm:
    facts = VM_FACTS.model_copy(update={"vm": name})
    return Vm(vm=name, host="h1", facts=facts, protection=shown)


def hosts(*names: str) -> HostList:
    return HostList(hosts=tuple(host(n) for n in names))


def vms(*found: Vm) -> VmList:
    return VmList(vms=found)


def event(position: int, name: str | None = "redis", message: str = "it happened") -> Event:
    return Event(
        position=position,
        at=1_700_000_000.25 + position,
        kind=EventKind.FAILED_OVER,
        vm=name,
        host="h2",
        generation=4,
        message=message,
        evidence={"silence_ms": 250},
    )


def events(*positions: int) -> tuple[Event, ...]:
    return tuple(event(p) for p in positions)
