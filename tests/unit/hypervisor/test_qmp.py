"""The monitor connection, against a peer that answers as a test says (also wrongly)."""

import json
import os
import socket
from collections.abc import Iterator

import pytest

from holdfast_agent.core.failures import MonitorBusy, VirtualMachineFailed, VirtualMachineGone
from holdfast_agent.hypervisor import qmp as qmp_module
from holdfast_agent.hypervisor.qmp import QmpConnection

GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"},'
    b' "capabilities": ["oob"]}}\r\n'
)


@pytest.fixture
def pair() -> Iterator[tuple[QmpConnection, socket.socket]]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(5)
    theirs.sendall(GREETING + b'{"return": {}, "id": 1}\r\n')
    connection = QmpConnection(ours)
    connection.negotiate("here", 5)
    theirs.recv(65536)
    yield connection, theirs
    connection.close()
    theirs.close()


def test_the_greeting_tells_the_version_and_oob_is_asked_for() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(GREETING + b'{"return": {}, "id": 1}\r\n')
        connection = QmpConnection(ours)
        connection.negotiate("here", 5)
        assert connection.version == "7.2.22 (Debian)"
        assert json.loads(theirs.recv(65536))["arguments"] == {"enable": ["oob"]}
        assert connection.peer_pid == os.getpid()
        connection.close()


def test_what_an_earlier_client_asked_is_not_taken_for_our_answer() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        foreign = b'{"return": {"size": 7}, "id": 4711}\r\n{"return": {}}\r\n'
        theirs.sendall(GREETING + foreign + b'{"return": {}, "id": 1}\r\n')
        connection = QmpConnection(ours)
        connection.negotiate("here", 5)
        theirs.sendall(b'{"return": {"status": "running"}, "id": 2}\r\n')
        assert connection.execute("query-status") == {"status": "running"}
        connection.close()


def test_silence_instead_of_a_greeting_means_busy() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        connection = QmpConnection(ours)
        with pytest.raises(MonitorBusy, match="another monitor client"):
            connection.negotiate("here", 0.05)
        connection.close()


@pytest.mark.parametrize("greeting", [b'{"hello": 1}\n', b"SSH-2.0\n", b'{"QMP": {}}\n'])
def test_another_protocol_is_told_from_qmp(greeting: bytes) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(greeting)
        connection = QmpConnection(ours)
        with pytest.raises(VirtualMachineFailed, match="not a QMP monitor"):
            connection.negotiate("here", 5)
        connection.close()


def test_queued_commands_leave_together_and_short(
    pair: tuple[QmpConnection, socket.socket],
) -> None:
    connection, peer = pair
    connection.queue("stop", brief=True)
    connection.queue("save", {"live": False}, brief=True)
    connection.flush()
    assert peer.recv(65536) == b'{"execute":"stop"}{"execute":"save","arguments":{"live":false}}'


def test_answers_belong_to_commands_in_order(pair: tuple[QmpConnection, socket.socket]) -> None:
    connection, peer = pair
    first, second = connection.queue("a"), connection.queue("b", brief=True)
    peer.sendall(b'{"return": 1, "id": 2}\r\n{"event": "STOP"}\r\n{"retu')
    peer.sendall(b'rn": 2}\r\n')
    assert connection.wait(second) == 2
    assert connection.wait(first) == 1
    assert [event.name for event in connection.poll_events()] == ["STOP"]


@pytest.mark.parametrize(
    "answer", [b'{"return": 1, "id": 9}\r\n', b'{"return": 1}\r\n', b"{nonsense}\r\n"]
)
def test_an_answer_to_nothing_ends_the_connection(
    pair: tuple[QmpConnection, socket.socket], answer: bytes
) -> None:
    connection, peer = pair
    ticket = connection.queue("a")
    peer.sendall(answer)
    with pytest.raises(VirtualMachineGone):
        connection.wait(ticket)
    assert connection.gone
    assert [event.name for event in connection.poll_events()] == ["GONE"]


def test_a_refusal_carries_class_description_and_command(
    pair: tuple[QmpConnection, socket.socket],
) -> None:
    connection, peer = pair
    ticket = connection.queue("cont")
    peer.sendall(b'{"error": {"class": "GenericError", "desc": "needs reset"}, "id": 2}\r\n')
    with pytest.raises(VirtualMachineFailed, match="cont: needs reset") as failure:
        connection.wait(ticket)
    assert (failure.value.command, failure.value.error_class) == ("cont", "GenericError")
    assert not connection.gone


def test_an_answer_after_its_deadline_is_dropped(pair: tuple[QmpConnection, socket.socket]) -> None:
    connection, peer = pair
    late, next_one = connection.queue("slow"), connection.queue("quick")
    with pytest.raises(VirtualMachineFailed, match=r"slow: .*did not answer"):
        connection.wait(late, timeout_s=0.02)
    peer.sendall(b'{"return": 1, "id": 2}\r\n{"return": 2, "id": 3}\r\n')
    assert connection.wait(next_one) == 2
    assert connection._answers == {}
    assert connection._forgotten == set()


def test_hanging_up_fails_every_wait_and_is_told_once(
    pair: tuple[QmpConnection, socket.socket],
) -> None:
    connection, peer = pair
    ticket, other = connection.queue("a"), connection.queue("b")
    connection.flush()
    peer.shutdown(socket.SHUT_RDWR)
    for waiting in (ticket, other):
        with pytest.raises(VirtualMachineGone):
            connection.wait(waiting)
    assert [event.name for event in connection.poll_events()] == ["GONE"]
    assert connection.poll_events() == []
    with pytest.raises(VirtualMachineGone):
        connection.execute("c")


def test_the_reason_of_a_shutdown_is_kept(pair: tuple[QmpConnection, socket.socket]) -> None:
    connection, peer = pair
    peer.sendall(b'{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}\r\n')
    (event,) = connection.poll_events()
    assert (event.name, event.reason) == ("SHUTDOWN", "guest-shutdown")


def test_events_beyond_the_limit_fall_off_at_the_old_end(
    pair: tuple[QmpConnection, socket.socket],
) -> None:
    connection, peer = pair
    ticket = connection.queue("a")
    events_sent = b"".join(b'{"event": "E%d"}\r\n' % i for i in range(qmp_module.EVENT_LIMIT + 5))
    peer.sendall(events_sent + b'{"return": 0, "id": 2}\r\n')
    connection.wait(ticket)
    events = connection.poll_events()
    assert len(events) == qmp_module.EVENT_LIMIT
    assert events[0].name == "E5"


def test_a_line_without_end_is_cut(
    pair: tuple[QmpConnection, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    connection, peer = pair
    monkeypatch.setattr(qmp_module, "LINE_LIMIT_BYTES", 1000)
    peer.sendall(b"x" * 2000)
    with pytest.raises(VirtualMachineGone, match="more than 1000 bytes"):
        connection.execute("a")


def test_an_armed_command_waits_for_its_last_byte(
    pair: tuple[QmpConnection, socket.socket],
) -> None:
    connection, peer = pair
    connection.arm("cont")
    connection.flush()
    assert peer.recv(65536) == b'{"execute":"cont"'
    ticket = connection.fire()
    assert ticket is not None
    peer.sendall(b'{"return": {}}\r\n')
    assert connection.wait(ticket) == {}
    assert peer.recv(65536) == b"}"
    assert connection.fire() is None


def test_another_command_calls_the_armed_one_off(
    pair: tuple[QmpConnection, socket.socket],
) -> None:
    connection, peer = pair
    connection.arm("cont")
    ticket = connection.queue("stop", brief=True)
    peer.sendall(b'{"error": {"class": "GenericError", "desc": "unexpected"}}\r\n{"return": 5}\r\n')
    assert connection.wait(ticket) == 5
    sent = peer.recv(65536).decode()
    called_off, end = json.JSONDecoder().raw_decode(sent)
    assert called_off == {"execute": "cont", "arguments": {"called-off": 0}}
    assert json.loads(sent[end:]) == {"execute": "stop"}
    assert connection.fire() is None


def test_descriptors_travel_with_their_command(pair: tuple[QmpConnection, socket.socket]) -> None:
    connection, peer = pair
    read_end, write_end = os.pipe()
    connection.queue("first", brief=True)
    connection.queue("getfd", {"fdname": "p"}, fds=(write_end,), brief=True)
    os.close(write_end)
    data, descriptors, _flags, _address = socket.recv_fds(peer, 65536, 4)
    assert data.startswith(b'{"execute":"first"}{"execute":"getfd"')
    os.write(descriptors[0], b"hello")
    os.close(descriptors[0])
    assert os.read(read_end, 10) == b"hello"
    os.close(read_end)


def test_an_attended_socket_is_served_while_waiting(
    pair: tuple[QmpConnection, socket.socket],
) -> None:
    connection, peer = pair
    ours, theirs = socket.socketpair()
    received: list[bytes] = []

    def serve() -> None:
        received.append(ours.recv(100))
        peer.sendall(b'{"return": "after", "id": 2}\r\n')

    connection.attend(ours.fileno(), serve)
    theirs.sendall(b"packet")
    assert connection.execute("a") == "after"
    assert received == [b"packet"]
    connection.neglect(ours.fileno())
    theirs.sendall(b"more")
    assert connection.poll_events() == []
    assert received == [b"packet"]
    ours.close()
    theirs.close()
