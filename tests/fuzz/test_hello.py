"""The first words of whoever connects: a HELLO that is accepted can be acted upon."""

import contextlib
import json
import socket
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.fuzz.peers import GENERATION, LIMITS, loopback, of_length, sealed

from holdfast_agent.core.failures import PeerLost
from holdfast_agent.core.frames import (
    HEADER,
    HEADER_SIZE_BYTES,
    FrameEncoder,
    FrameKind,
    FrameRejected,
)
from holdfast_agent.core.payloads import Hello
from holdfast_agent.transport.connection import FrameConnection
from holdfast_agent.transport.opening import receive_hello
from holdfast_agent.transport.tcp import TcpStream
from holdfast_api.words import Role

EXAMPLES = 150
HELLO_SECONDS = 5.0
SOUND: dict[str, Any] = {
    "vm": "web",
    "generation": GENERATION,
    "primary": "h1",
    "backup": "h2",
    "keepalive_ms": 50,
    "silence_limit_ms": 250,
    "blocks": [["pc.ram", 1 << 20]],
    "spec": {},
}
NUMBERS = st.integers() | st.sampled_from((2**31, 2**62, 2**64, 10**300, 10**1000, -1, 0))
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
BLOCKS = st.lists(st.tuples(st.text(max_size=8), NUMBERS | st.just(4096)).map(list), max_size=4)
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(SOUND, JSON),
        "blocks": BLOCKS,
        "keepalive_ms": NUMBERS,
        "silence_limit_ms": NUMBERS,
        "other": JSON,
    },
)


def hello_frame(payload: bytes) -> bytes:
    encoder = FrameEncoder(sender=Role.PRIMARY, generation=GENERATION, limits=LIMITS)
    return b"".join(encoder.encode(FrameKind.HELLO, 0, [payload])[0])


def listen_to(stream: bytes, *, hang_up: bool = True) -> tuple[Hello | None, bytes]:
    """Return the HELLO that was accepted, and what is left unread behind it."""
    with loopback() as (theirs, ours):
        theirs.sendall(stream)
        if hang_up:
            theirs.shutdown(socket.SHUT_WR)
        try:
            hello = receive_hello(TcpStream(ours), HELLO_SECONDS, LIMITS)
        except (FrameRejected, PeerLost):
            assert ours.fileno() >= 0, "the socket stays the caller's"
            return None, b""
        _can_be_acted_upon(ours, hello)
        rest = b""
        with contextlib.suppress(BlockingIOError):
            rest = ours.recv(1 << 16)
        return hello, rest


def _can_be_acted_upon(ours: socket.socket, hello: Hello) -> None:
    """Do with its numbers what a worker does."""
    assert np.int64(hello.memory_map.page_count) > 0
    connection = FrameConnection(
        TcpStream(ours),
        role=Role.BACKUP,
        generation=hello.generation,
        silence_limit_seconds=hello.silence_limit_ms / 1000,
        keepalive_seconds=hello.keepalive_ms / 1000,
        received_frames=1,
        staging_limit_bytes=hello.memory_map.size_bytes,
    )
    connection.limit_silence(hello.silence_limit_ms / 1000)
    assert connection.silence_due_at_ns > 0


def test_a_sound_hello_is_accepted_without_a_byte_of_what_follows() -> None:
    hello, rest = listen_to(hello_frame(json.dumps(SOUND).encode()) + b"next")
    assert hello == Hello.model_validate(SOUND)
    assert rest == b"next"


@given(CHANGES)
@example({"silence_limit_ms": 10**300})
@example({"keepalive_ms": 10**1000})
@example({"blocks": [["pc.ram", 2**63 - 4096]]})
@settings(max_examples=EXAMPLES, deadline=None)
def test_a_hello_with_any_words_is_accepted_whole_or_refused(changes: dict[str, Any]) -> None:
    payload = json.dumps(SOUND | changes).encode()
    if len(payload) > LIMITS.hello_size_bytes:
        return
    hello, _ = listen_to(hello_frame(payload))
    if hello is not None:
        assert hello.generation == GENERATION


@given(st.binary(max_size=600))
@example(b"[" * 4000)
@example(b'{"spec":' * 500)
@settings(max_examples=EXAMPLES, deadline=None)
def test_a_hello_of_any_bytes_is_refused(payload: bytes) -> None:
    assert listen_to(hello_frame(payload)) == (None, b"")


@given(st.binary(max_size=400))
@settings(max_examples=EXAMPLES, deadline=None)
def test_noise_is_no_hello(noise: bytes) -> None:
    assert listen_to(noise) == (None, b"")


@given(st.data())
@settings(max_examples=EXAMPLES, deadline=None)
def test_a_damaged_hello_is_refused(data: st.DataObject) -> None:
    frame = bytearray(hello_frame(json.dumps(SOUND).encode()))
    at = data.draw(st.integers(0, len(frame) - 1))
    if data.draw(st.booleans()):
        del frame[at:]
    else:
        frame[at] ^= 1 << data.draw(st.integers(0, 7))
    assert listen_to(bytes(frame)) == (None, b"")


@pytest.mark.parametrize("length", [2**20, 2**32 - 1])
def test_a_huge_hello_is_refused_at_once(length: int) -> None:
    frame = of_length(hello_frame(json.dumps(SOUND).encode()), length)
    assert listen_to(frame, hang_up=False) == (None, b"")


@pytest.mark.parametrize("kind", sorted(set(FrameKind) - {FrameKind.HELLO}))
def test_no_other_kind_is_taken_for_a_hello(kind: FrameKind) -> None:
    frame = bytearray(hello_frame(json.dumps(SOUND).encode()))
    frame[6:8] = kind.to_bytes(2, "little")
    assert len(frame) > HEADER_SIZE_BYTES == HEADER.size
    assert listen_to(sealed(frame), hang_up=False) == (None, b"")
