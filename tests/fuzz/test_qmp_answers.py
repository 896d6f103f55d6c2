"""A monitor that says anything: documented errors only, and nothing believed after the end."""

import json
import socket
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from holdfast_agent.core.failures import VirtualMachineFailed, VirtualMachineGone
from holdfast_agent.hypervisor import qmp as qmp_module
from holdfast_agent.hypervisor.qmp import EVENT_LIMIT, QmpConnection

EXAMPLES = 120
WAIT_SECONDS = 5.0
GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""},'
    b' "capabilities": ["oob"]}}\r\n'
)
NEGOTIATED = b'{"return": {}, "id": 1}\r\n'

SCALARS = st.none() | st.booleans() | st.integers(-2, 5) | st.floats() | st.text(max_size=8)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "return": JSON,
        "id": st.integers(0, 5) | JSON,
        "error": st.fixed_dictionaries({}, optional={"class": JSON, "desc": JSON}) | JSON,
        "event": st.sampled_from(("STOP", "RESUME", "GONE")) | JSON,
        "data": st.fixed_dictionaries({}, optional={"reason": JSON}) | JSON,
        "QMP": JSON,
    },
)
LINES = (
    (FIELDS | JSON).map(lambda message: json.dumps(message).encode()) | st.binary(max_size=60)
).map(lambda line: line + b"\r\n")
GOOD = st.sampled_from(
    (
        b'{"return": {"status": "running"}, "id": 2}\r\n',
        b'{"event": "STOP", "data": {"reason": "x"}}\r\n',
        b'{"error": {"class": "GenericError", "desc": "no"}, "id": 3}\r\n',
        b'{"return": "text", "id": 4}\r\n',
    )
)
STREAMS = st.lists(GOOD | LINES, max_size=8).map(b"".join)


def talk(after_greeting: bytes, greeting: bytes = GREETING + NEGOTIATED) -> list[Any]:
    """Ask a monitor that says these bytes and hangs up; return the answers that were believed."""
    ours, theirs = socket.socketpair()
    connection = QmpConnection(ours, timeout_s=WAIT_SECONDS)
    answers: list[Any] = []
    try:
        theirs.sendall(greeting)
        if not greeting.endswith(NEGOTIATED):
            theirs.shutdown(socket.SHUT_WR)
        connection.negotiate("here", WAIT_SECONDS)
        theirs.sendall(after_greeting)
        theirs.shutdown(socket.SHUT_WR)
        tickets = [connection.queue("query-status") for _ in range(3)]
        answers.extend(connection.wait(ticket) for ticket in tickets)
        while not connection.gone:
            assert len(connection.poll_events()) <= EVENT_LIMIT + 1
    except VirtualMachineGone:
        assert connection.gone or not connection.version
        _nothing_more_is_believed(connection)
    except VirtualMachineFailed:
        pass
    finally:
        connection.close()
        theirs.close()
    return answers


def _nothing_more_is_believed(connection: QmpConnection) -> None:
    if not connection.gone:
        return
    connection.poll_events()
    assert connection.poll_events() == []
    with pytest.raises(VirtualMachineGone):
        connection.execute("query-status")


def test_sound_answers_are_believed() -> None:
    said = b"".join(b'{"return": %d, "id": %d}\r\n' % (n, n) for n in (2, 3, 4))
    assert talk(said) == [2, 3, 4]


@given(STREAMS)
@example(b"[" * 50_000 + b"\r\n")
@example(b'{"return": {}, "id": [2]}\r\n')
@example(b'{"event": "STOP", "data": 5}\r\n')
@example(b'{"id": 2}\r\n')
@example(b"5\r\n")
@settings(max_examples=EXAMPLES, deadline=None)
def test_any_answers_are_believed_or_end_the_connection(said: bytes) -> None:
    talk(said)


@given(st.binary(max_size=300))
@settings(max_examples=EXAMPLES, deadline=None)
def test_noise_is_no_answer(noise: bytes) -> None:
    assert talk(noise) == []


@given(LINES, st.lists(LINES, max_size=2).map(b"".join))
@example(b"[" * 50_000 + b"\r\n", b"")
@example(b'{"QMP": {"version": {"qemu": []}}}\r\n', NEGOTIATED)
@settings(max_examples=EXAMPLES, deadline=None)
def test_any_greeting_is_understood_or_refused(greeting: bytes, behind: bytes) -> None:
    talk(b"", greeting=greeting + behind)


@given(st.data())
@settings(max_examples=EXAMPLES, deadline=None)
def test_damaged_answers_are_believed_or_end_the_connection(data: st.DataObject) -> None:
    said = bytearray(b"".join(data.draw(st.lists(GOOD, min_size=1, max_size=6))))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(len(said) - 1, 0)))
        if data.draw(st.booleans()) and said:
            said[at] ^= 1 << data.draw(st.integers(0, 7))
        else:
            said[at:at] = said[at : at + data.draw(st.integers(0, 30))]
    talk(bytes(said))


def test_a_line_without_end_is_given_up_at_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp_module, "LINE_LIMIT_BYTES", 10_000)
    ours, theirs = socket.socketpair()
    connection = QmpConnection(ours, timeout_s=WAIT_SECONDS)
    try:
        theirs.sendall(GREETING + NEGOTIATED)
        connection.negotiate("here", WAIT_SECONDS)
        theirs.sendall(b'{"return": "' + b"x" * 80_000)
        with pytest.raises(VirtualMachineGone, match="more than 10000 bytes"):
            connection.execute("query-status")
        assert len(connection._rest) <= 10_000 + qmp_module.RECEIVE_BYTES
    finally:
        connection.close()
        theirs.close()
