"""Streams on the wire: followed however they come, never contradicting themselves, bounded."""

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.chaos.evidence import LINKS_MAX, OWNERS_MAX
from tests.chaos.flows import REQUESTS_MAX, WINDOW_BYTES
from tests.chaos.streams import EARLY_BYTES_MAX
from tests.chaos.wire import (
    ANSWERS_MAX,
    CONNECTIONS_MAX,
    FLOWS_MAX,
    GUESTS_MAX,
    VIOLATIONS_KEPT,
    Wire,
)
from tests.unit.chaos.passing import (
    ACK,
    CLIENT,
    FIN,
    GUEST,
    RST,
    SYN,
    VM,
    Controller,
    Flow,
    Link,
    Talk,
    broken,
    fail_over,
    ip_frame,
    no_violation,
    protected,
    speak,
    tcp_frame,
)

from holdfast_agent.core.frames import FrameKind
from holdfast_lab.network import party_address

# --- following the streams ------------------------------------------------------------------------


@given(cuts=st.lists(st.integers(1, 2000), max_size=12), data=st.data())
def test_a_stream_is_followed_wherever_it_was_cut_and_however_it_came(
    cuts: list[int], data: st.DataObject
) -> None:
    """In pieces, swapped, repeated and overlapping: the receiver puts it together, and so do we."""
    wire = Wire()
    wire.name_guest(GUEST, VM)
    talk = Talk(wire, "h1")
    link = protected(wire)
    talk.ask()
    whole = b"".join(
        [
            link.bytes_of(FrameKind.KEEPALIVE),
            link.bytes_of(FrameKind.PAGES, 2, [bytes(700)]),
            link.bytes_of(FrameKind.CHECKPOINT, 2, [bytes(40)]),
            link.bytes_of(FrameKind.KEEPALIVE),
        ]
    )
    edges = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    pieces = list(itertools.pairwise(edges))
    overlaps = [(a, min(b + 30, len(whole))) for a, b in pieces]
    begin = link.flow.next[0]
    for a, b in data.draw(st.permutations(pieces + overlaps)):
        wire.see("h1", link.flow.frame(0, begin + a, whole[a:b]))
    link.flow.next[0] += len(whole)
    link.acknowledge(2)
    talk.reply()
    assert no_violation(wire)
    assert wire.summary()["connections not followed"] == 0
    assert wire.summary()["replies checked"] == 1


@given(pieces=st.integers(1, 400))
def test_a_verdict_is_understood_in_however_many_pieces_it_comes(pieces: int) -> None:
    wire = Wire()
    Controller(wire, "h2").verdict("h2", 3, pieces=pieces)
    assert wire.summary()["claims won"] == 1


def test_verdicts_behind_each_other_and_behind_something_long_are_understood(wire: Wire) -> None:
    controller = Controller(wire, "h2")
    controller.verdict("h2", 3)
    controller.verdict("h2", 3)  # a retry is told the same
    controller.answer({"what": "x" * (2 << 20)}, pieces=70)
    controller.verdict("h2", 5)
    assert wire.summary()["claims won"] == 2


def test_a_connection_to_a_controller_may_be_joined_in_the_middle(wire: Wire) -> None:
    controller = Controller(wire, "h2", opens=False)
    controller.flow.send(1, b'ly"}')
    controller.verdict("h2", 3, pieces=3)
    controller.flow.send(1, b"nonsense")
    controller.verdict("h2", 5)
    assert wire.summary()["claims won"] == 2


def test_a_connection_joined_in_the_middle_is_counted_and_left_alone(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    link = Link(wire, "h1", "h2", 2, opens=False)
    link.commit()
    talk.ask()
    talk.reply()
    speak(wire, "h2")
    assert no_violation(wire)
    summary = wire.summary()
    assert summary["connections not followed"] == 1
    assert summary["connections"] == 0
    assert summary["replies unchecked"] == 1
    assert summary["speaker changes unchecked"] == 1


def test_bytes_that_never_come_end_the_following(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    link = protected(wire)
    link.flow.next[0] += 100  # these never come
    for _ in range(EARLY_BYTES_MAX // 60000 + 1):
        link.flow.send(0, bytes(60000))
    assert wire.summary()["connections not followed"] == 1
    talk.ask()
    talk.reply()
    assert no_violation(wire)
    assert wire.summary()["replies unchecked"] == 1


def test_an_acknowledgement_of_bytes_that_were_not_seen_ends_the_following(wire: Wire) -> None:
    link = protected(wire)
    link.flow.next[0] += 100
    link.checkpoint(2)
    link.acknowledge(2)
    assert wire.summary()["connections not followed"] == 1
    assert no_violation(wire)


@pytest.mark.parametrize(("at", "size"), [(0, 4), (4, 2), (6, 2), (8, 8), (24, 8), (44, 4)])
def test_a_header_with_one_field_wrong_ends_the_following(wire: Wire, at: int, size: int) -> None:
    link = protected(wire)
    frame = bytearray(link.bytes_of(FrameKind.CHECKPOINT, 2, [bytes(40)]))
    frame[at : at + size] = bytes([99] + [0] * (size - 1))
    link.flow.send(0, bytes(frame))
    assert wire.summary()["connections not followed"] == 1


def test_a_port_that_is_used_again_begins_a_new_connection(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    link = protected(wire)
    flow = link.flow
    wire.see("h1", tcp_frame((party_address("h1"), 40002), (party_address("h2"), 7701),
                             (1 << 32) - 700, 0, flags=SYN))  # fmt: skip
    link.commit()
    assert wire.summary()["acknowledgements"] == 2, "the same SYN again changes nothing"
    flow.next = {0: 5, 1: 6}
    flow.send(0, flags=SYN, length=1)
    flow.send(1, flags=SYN | ACK, length=1)
    flow.send(0, b"no frame, however long it may be".ljust(64))
    talk.ask()
    talk.reply()
    assert [each[:2] for each in wire.violations] == ["R2"], "the old one binds as before"
    assert wire.summary()["connections not followed"] == 1


@pytest.mark.parametrize("side", [0, 1])
def test_what_is_no_frame_ends_the_following(wire: Wire, side: int) -> None:
    link = protected(wire)
    link.flow.send(side, bytes(64))
    assert wire.summary()["connections not followed"] == 1
    assert no_violation(wire)


def test_after_frames_were_missed_everything_begins_anew_with_the_next_connection(
    wire: Wire,
) -> None:
    talk = Talk(wire, "h1")
    link = protected(wire)
    wire.lose_track()
    talk.ask()
    talk.reply()
    link.commit()
    speak(wire, "h3")
    assert no_violation(wire)
    assert wire.summary()["replies unchecked"] == 1
    assert wire.summary()["connections not followed"] == 1
    assert wire.summary()["speaker changes unchecked"] == 1
    protected(wire, "h3", "h2", 4)
    talk.ask()
    talk.reply("h3")
    assert broken(wire, "R2")


def test_after_frames_were_missed_nobody_is_bound_by_a_connection_that_has_ended(
    wire: Wire,
) -> None:
    talk = Talk(wire, "h1")
    protected(wire).flow.send(0, flags=FIN | ACK, length=1)
    wire.lose_track()
    talk.ask()
    talk.reply()
    assert no_violation(wire)
    assert wire.summary()["replies unchecked"] == 1


def test_after_frames_were_missed_answers_are_understood_again(wire: Wire) -> None:
    controller = Controller(wire, "h2")
    controller.flow.next[1] += 100  # missed
    wire.lose_track()
    controller.verdict("h2", 3)
    assert wire.summary()["claims won"] == 1


def test_after_frames_were_missed_nothing_is_contradicted(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    talk.ask()
    talk.reply()
    wire.lose_track()
    talk.flow.again(1, 4, b":7\r\n")
    assert no_violation(wire)


def test_with_the_next_connection_a_vm_is_followed_again(wire: Wire) -> None:
    speak(wire, "h1")
    wire.lose_track()
    protected(wire)
    speak(wire, "h3")
    assert broken(wire, "R1")


def test_answers_to_others_than_hosts_are_nobodys_orders(wire: Wire) -> None:
    Controller(wire, "client").verdict("h2", 3)
    assert wire.summary()["claims won"] == 0


# --- R3, the stream never contradicts itself ------------------------------------------------------


def after_failover(wire: Wire) -> Talk:
    """A client that was answered twice on h1; h2 has taken over."""
    talk = Talk(wire, "h1")
    link = protected(wire)
    for _ in range(2):
        talk.ask()
        link.commit()
        talk.reply()
    fail_over(wire)
    return talk


def test_the_same_bytes_again_are_no_contradiction(wire: Wire) -> None:
    talk = after_failover(wire)
    talk.flow.again(1, 8, b":1\r\n:2\r\n", "h2")
    talk.flow.again(1, 4, b":2\r\n:3\r\n", "h2")
    assert no_violation(wire)


def test_other_bytes_in_the_same_place_break_r3(wire: Wire) -> None:
    talk = after_failover(wire)
    talk.flow.again(1, 4, b":7\r\n", "h2")
    assert broken(wire, "R3")


def test_other_bytes_behind_a_part_that_was_not_seen_break_r3(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    begin = talk.flow.next[1]
    wire.see("h1", talk.flow.frame(1, begin + 4, b"5678"))
    assert no_violation(wire)
    wire.see("h1", talk.flow.frame(1, begin, b"123456"))
    assert no_violation(wire)
    wire.see("h1", talk.flow.frame(1, begin + 2, b"3x"))
    assert broken(wire, "R3")


def test_zeros_where_nothing_was_seen_are_new(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    begin = talk.flow.next[1]
    wire.see("h1", talk.flow.frame(1, begin + 4, b"5678"))
    wire.see("h1", talk.flow.frame(1, begin, bytes(4)))
    assert wire.summary()["replies outside of protection"] == 2
    wire.see("h1", talk.flow.frame(1, begin, b"1"))
    assert broken(wire, "R3")


def test_the_same_opening_again_does_not_make_it_forget(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    talk.ask()
    talk.reply()
    assert talk.flow.sides[0][2] == 30000
    wire.see("client", tcp_frame((CLIENT, 30000), (GUEST, 6379), (1 << 32) - 30, 0, flags=SYN))
    talk.flow.again(1, 4, b":7\r\n")
    assert broken(wire, "R3")


def test_a_guest_that_has_forgotten_what_it_heard_breaks_r3(wire: Wire) -> None:
    talk = after_failover(wire)
    talk.flow.send(1, port="h2", heard=10)
    assert broken(wire, "R3")


def test_one_that_was_overtaken_on_its_way_is_counted(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    talk.ask()
    talk.flow.send(1)
    talk.flow.send(1, heard=10)
    talk.flow.send(1)
    assert no_violation(wire)
    assert wire.summary()["guest packets overtaken"] == 1


def test_a_host_that_goes_on_with_less_breaks_r3(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    talk.ask()
    talk.flow.send(1)
    for _ in range(3):
        talk.flow.send(1, heard=10)
    assert broken(wire, "R3")


def test_a_reset_without_acknowledgement_contradicts_nothing(wire: Wire) -> None:
    talk = after_failover(wire)
    talk.flow.send(1, flags=RST, port="h2")
    assert no_violation(wire)


def test_a_connection_that_was_accepted_twice_breaks_r3(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    flow = talk.flow
    wire.see("h1", flow.frame(1, flow.next[1] - 1, flags=SYN | ACK))
    assert no_violation(wire), "the same acceptance again"
    wire.see("h1", flow.frame(1, flow.next[1] + 77, flags=SYN | ACK))
    assert broken(wire, "R3")


def test_a_port_that_is_used_again_begins_a_new_flow(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    talk.ask()
    talk.reply()
    flow = Flow(wire, talk.flow.sides[0], talk.flow.sides[1], sequences=(99, 77), opens=False)
    flow.send(0, flags=SYN, length=1)
    wire.see("h1", talk.flow.frame(1, 4321, flags=SYN | ACK))
    talk.flow.send(1)  # of the old one, which the guest still has
    flow.send(1, flags=SYN | ACK, length=1)
    flow.send(0, b"x")
    flow.send(1, b"y")
    assert no_violation(wire)
    flow.again(1, 1, b"z")
    assert broken(wire, "R3")


@given(
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=40),
    start=st.integers(0, (1 << 32) - 1),
    data=st.data(),
)
def test_any_repetition_of_a_long_stream_is_the_same_stream(
    sizes: list[int], start: int, data: st.DataObject
) -> None:
    wire = Wire()
    text = bytes(at * 31 % 251 for at in range(sum(sizes)))
    flow = Flow(wire, ("client", CLIENT, 1), ("h1", GUEST, 6379), sequences=(5, start))
    begin, at = flow.next[1], 0
    for size in sizes:
        wire.see("h1", flow.frame(1, begin + at, text[at : at + size]))
        at += size
        back = data.draw(st.integers(0, at))
        wire.see("h1", flow.frame(1, begin + at - back, text[at - back : at]))
    assert no_violation(wire)
    wrong = bytearray(text[-1:])
    wrong[0] ^= 1
    wire.see("h1", flow.frame(1, begin + at - 1, bytes(wrong)))
    assert broken(wire, "R3")


# --- what is not of interest, and limits ----------------------------------------------------------


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        bytes(14),
        bytes(12) + b"\x08\x00" + bytes(10),
        bytes(12) + b"\x08\x06" + bytes(10),
        bytes(12) + b"\x86\xdd" + bytes(60),
        ip_frame("10.77.0.11", "10.77.0.12", b"\0" * 8),
        ip_frame(
            "10.77.0.11", "10.77.0.12", struct.pack("!HH", 9, 7701) * 3 + bytes(20), fragment=3
        ),
        ip_frame("10.77.0.11", "10.77.0.12", b"\0" * 60, protocol=17),
        tcp_frame(("10.77.0.11", 22), ("10.77.0.12", 22), 1, 1, payload=b"x"),
    ],
)
def test_other_frames_pass_unnoticed(wire: Wire, frame: bytes) -> None:
    wire.see("h1", frame)
    assert wire.summary() == {name: int(name == "packets") for name in wire.summary()}


def test_an_unnamed_guest_is_followed_and_not_judged_by_protections(wire: Wire) -> None:
    other = "10.77.1.9"
    speak(wire, "h1", other)
    speak(wire, "h2", other)
    assert no_violation(wire)
    assert wire.summary()["speaker changes unchecked"] == 1


def test_everything_that_grows_has_a_limit(wire: Wire) -> None:
    speak(wire, "h1")
    for number in range(VIOLATIONS_KEPT + 50):
        speak(wire, f"h{2 + number % 3}")
    assert len(wire.violations) == VIOLATIONS_KEPT
    assert wire.summary()["violations"] == VIOLATIONS_KEPT + 50
    for number in range(GUESTS_MAX + 50):
        speak(wire, "h1", f"10.77.{2 + number // 200}.{1 + number % 200}")
    for number in range(FLOWS_MAX + 50):
        Talk(wire, "h1", port=1000 + number).ask()
    for number in range(CONNECTIONS_MAX + 50):
        Flow(wire, ("h1", party_address("h1"), number), ("h2", party_address("h2"), 7701))
    for number in range(ANSWERS_MAX + 50):
        frame = tcp_frame(
            (party_address("controller-1"), 7700),
            (party_address("h1"), number),
            1,
            1,
            payload=b"HTTP/1.1 200",
        )
        wire.see("controller-1", frame)
    assert len(wire._answers) == ANSWERS_MAX
    controller = Controller(wire, "h1")
    for generation in range(1, 3 * OWNERS_MAX):
        Link(wire, "h1", "h2", generation, port=generation)
        controller.verdict("h1", generation)
    assert len(wire._guests) == GUESTS_MAX
    assert len(wire._flows) == FLOWS_MAX
    assert len(wire._connections) == CONNECTIONS_MAX
    assert len(wire._vms[VM].links) == LINKS_MAX
    assert len(wire._vms[VM].owners) == OWNERS_MAX
    assert len(wire._vms[VM].claims) == OWNERS_MAX


def test_a_flow_remembers_no_more_than_its_window(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    for _ in range(2 * REQUESTS_MAX):
        talk.ask()
        talk.flow.send(1, bytes(1000))
    (flow,) = wire._flows.values()
    assert len(flow._requests) == REQUESTS_MAX
    assert len(flow._window) == len(flow._seen) <= 2 * WINDOW_BYTES + 1000
    talk.flow.again(1, 200_000, b"x")  # older than what is remembered
    talk.flow.again(1, 1000, bytes(1000))
    assert no_violation(wire)
    talk.flow.again(1, WINDOW_BYTES // 2, b"x")
    assert broken(wire, "R3")
