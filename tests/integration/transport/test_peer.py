"""FramePeer: the messages of a protection over real sockets, and every way to lose the peer."""

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from tests.integration.transport.loopback import DEADLINE_SECONDS, Sockets, over

from holdfast_agent.core.failures import PeerLost
from holdfast_agent.core.frames import FrameKind, FrameLimits
from holdfast_agent.core.memory_map import NO_PAGES, PageIndexes, PageRows
from holdfast_agent.core.payloads import NO_ROWS, Pages, encode_pages
from holdfast_agent.core.peer_messages import (
    AcknowledgementArrived,
    CheckpointArrived,
    FarewellArrived,
    PagesArrived,
    PeerMessage,
)
from holdfast_agent.transport.buffers import StagingLimitReached
from holdfast_agent.transport.connection import FrameConnection
from holdfast_agent.transport.peer import FramePeer
from holdfast_api.words import ClaimReason, Role

Pair = Callable[..., Sockets]
LIMITS = FrameLimits(slab_size_bytes=8 * 4096, index_size_bytes=4096)
MAP_PAGES = 64


def peers(pair: Sockets, **options: float) -> tuple[FramePeer, FramePeer]:
    made = [
        FramePeer(
            over(
                sock,
                role,
                limits=LIMITS,
                silence_limit_seconds=options.get("silence_limit_seconds", 5),
                keepalive_seconds=options.get("keepalive_seconds", 1),
                staging_limit_bytes=int(options.get("staging_limit_bytes", 1 << 20)),
            ),
            map_page_count=MAP_PAGES,
            silence_limit_seconds=options.get("silence_limit_seconds", 5),
            limits=LIMITS,
            busy_limit_seconds=options.get("busy_limit_seconds", 2),
        )
        for sock, role in zip(pair, (Role.PRIMARY, Role.BACKUP), strict=True)
    ]
    return made[0], made[1]


def connection_of(peer: FramePeer) -> FrameConnection:
    return peer._connection


def wait(peer: FramePeer) -> PeerMessage:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while (message := peer.receive()) is None:
        assert time.monotonic() < deadline
        select.select([peer], [], [], 0.1)
    return message


def content(*indexes: int) -> tuple[PageIndexes, PageRows]:
    pages = np.array(indexes, dtype=np.int64)
    return pages, np.repeat(pages.astype(np.uint8)[:, None], 4096, axis=1)


def test_a_backup_is_seeded_and_gets_a_whole_checkpoint(sockets: Pair) -> None:
    primary, backup = peers(sockets())
    zeros = np.array([50, 51, 60], dtype=np.int64)
    primary.send_pages(0, *content(*range(20)), zeros)
    arrived: list[PagesArrived] = []
    while sum(len(part.indexes) + len(part.zero_indexes) for part in arrived) < 23:
        message = wait(backup)
        assert isinstance(message, PagesArrived)
        arrived.append(message)
    assert np.concatenate([part.indexes for part in arrived]).tolist() == list(range(20))
    assert np.concatenate([part.zero_indexes for part in arrived]).tolist() == [50, 51, 60]
    for part in arrived:  # all of them still valid: nothing was released
        assert part.epoch == 0
        assert part.rows[:, 4095].tolist() == part.indexes.tolist()
    backup.release_buffers()

    primary.send_pages(1, *content(3, 9), NO_PAGES)
    primary.send_checkpoint(1, b"devices", final=False)
    assert isinstance(wait(backup), PagesArrived)
    assert wait(backup) == CheckpointArrived(1, final=False, device_state=b"devices")
    backup.send_acknowledgement(1)
    assert wait(primary) == AcknowledgementArrived(1)

    primary.send_checkpoint(2, b"last", final=True)
    assert wait(backup) == CheckpointArrived(2, final=True, device_state=b"last")


def test_released_buffers_are_used_again(sockets: Pair) -> None:
    primary, backup = peers(sockets(), staging_limit_bytes=2 * 9 * 4096)
    for _ in range(5):
        primary.send_pages(0, *content(*range(8)), NO_PAGES)
        assert isinstance(wait(backup), PagesArrived)
        backup.release_buffers()
    assert connection_of(backup).kept_bytes == 0


def test_more_pages_than_may_be_staged_are_this_hosts_own_shortage(sockets: Pair) -> None:
    primary, backup = peers(sockets(), staging_limit_bytes=2 * 9 * 4096)
    primary.send_pages(1, *content(*range(32)), NO_PAGES)
    for _ in range(2):
        wait(backup)
    with pytest.raises(StagingLimitReached):
        wait(backup)


def test_pages_that_cannot_be_end_the_connection_and_are_counted(sockets: Pair) -> None:
    primary, backup = peers(sockets())
    outside = Pages(np.array([MAP_PAGES], np.int64), np.zeros((1, 4096), np.uint8), NO_PAGES)
    connection_of(primary).send(FrameKind.PAGES, 1, encode_pages(outside))
    primary.send_pages(1, *content(1), NO_PAGES)
    for _ in range(2):
        with pytest.raises(PeerLost) as caught:
            wait(backup)
        assert caught.value.reason == ClaimReason.PEER_FAILED
    assert backup.counters.rejected_frames == 1


def test_a_checkpoint_that_misses_a_page_frame_is_refused(sockets: Pair) -> None:
    primary, backup = peers(sockets())
    primary.send_pages(1, *content(1), NO_PAGES)
    primary._tally.add(b"x" * 16, 1)
    primary.send_checkpoint(1, b"", final=False)
    assert isinstance(wait(backup), PagesArrived)
    with pytest.raises(PeerLost, match="not whole"):
        wait(backup)


def test_what_is_not_a_frame_ends_the_connection(sockets: Pair) -> None:
    pair = sockets()
    _, backup = peers(pair)
    pair[0].sendall(b"x" * 64)
    with pytest.raises(PeerLost, match="bad-magic") as caught:
        wait(backup)
    assert caught.value.reason == ClaimReason.PEER_FAILED


def test_a_rejected_frame_while_sending_is_the_peers_fault(sockets: Pair) -> None:
    pair = sockets(buffer_bytes=4096)
    primary, _ = peers(pair)
    pair[1].sendall(b"x" * 64)
    rows = np.zeros((MAP_PAGES, 4096), np.uint8)
    with pytest.raises(PeerLost, match="bad-magic") as caught:
        primary.send_pages(0, np.arange(MAP_PAGES), rows, NO_PAGES)
    assert caught.value.reason == ClaimReason.PEER_FAILED


def test_a_farewell_is_heard_though_much_was_unread_on_both_sides(sockets: Pair) -> None:
    pair = sockets(buffer_bytes=4096)
    pair[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    primary, backup = peers(pair)
    backup.send_acknowledgement(1)
    assert select.select([primary], [], [], DEADLINE_SECONDS)[0]  # unread: closing would reset
    primary.send_pages(0, *content(*range(24)), NO_PAGES)
    primary.send_farewell("guest-ended", "shut down from inside")
    leaver = threading.Thread(target=primary.close)
    leaver.start()
    backup.tend(time.monotonic_ns() + 10**9)  # a keep-alive into a connection that is ending
    assert [
        len(message.indexes)
        for message in (wait(backup), wait(backup), wait(backup))
        if isinstance(message, PagesArrived)
    ] == [8, 8, 8]
    assert wait(backup) == FarewellArrived("guest-ended", "shut down from inside")
    backup.close()
    leaver.join(DEADLINE_SECONDS)
    assert primary.fileno() == -1
    primary.close()


def test_after_a_farewell_the_stream_ends_at_once(sockets: Pair) -> None:
    primary, backup = peers(sockets())
    primary.send_farewell("released", "")
    assert wait(backup) == FarewellArrived("released", "")
    with pytest.raises(PeerLost, match="between frames"):
        wait(backup)
    with pytest.raises(PeerLost, match="nothing more may be sent"):
        primary.send_checkpoint(1, b"", final=False)


def test_closing_after_a_farewell_waits_for_the_peer_but_not_for_ever(sockets: Pair) -> None:
    primary, _ = peers(sockets())
    primary.send_farewell("released", "")
    primary.close()
    assert primary.fileno() == -1


def test_a_farewell_to_nobody_does_not_matter(sockets: Pair) -> None:
    primary, backup = peers(sockets())
    backup.close()
    for _ in range(3):
        primary.send_farewell("released", "")
    primary.close()


def test_a_peer_that_left_without_a_word_is_a_broken_stream(sockets: Pair) -> None:
    primary, backup = peers(sockets())
    primary.close()
    with pytest.raises(PeerLost) as caught:
        wait(backup)
    assert caught.value.reason == ClaimReason.STREAM_BROKEN


def test_tending_sends_keepalives_when_they_are_due_and_finds_silence(sockets: Pair) -> None:
    primary, backup = peers(sockets(), silence_limit_seconds=0.3, keepalive_seconds=0.06)
    deadline = time.monotonic() + DEADLINE_SECONDS
    lost: PeerLost | None = None
    while lost is None:
        assert time.monotonic() < deadline
        pause = max(primary.next_due_ns() - time.monotonic_ns(), 0) / 1e9
        select.select([], [], [], pause)
        try:
            primary.tend(time.monotonic_ns())
        except PeerLost as error:
            lost = error
    assert lost.reason == ClaimReason.PEER_SILENT
    assert primary.counters.sent_frames >= 1
    assert backup.receive() is None  # it had heard them all the time
    assert backup.counters.received_frames == primary.counters.sent_frames


def test_peers_that_tend_never_lose_each_other(sockets: Pair) -> None:
    both = peers(sockets(), silence_limit_seconds=0.5, keepalive_seconds=0.05)
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        due = min(peer.next_due_ns() for peer in both)
        select.select(both, [], [], max(due - time.monotonic_ns(), 0) / 1e9)
        for peer in both:
            assert peer.receive() is None
            peer.tend(time.monotonic_ns())
    assert all(peer.counters.received_frames > 5 for peer in both)


def test_frames_read_ahead_are_due_at_once(sockets: Pair) -> None:
    primary, backup = peers(sockets(buffer_bytes=4096), silence_limit_seconds=0.2)
    backup.send_acknowledgement(1)
    with pytest.raises(PeerLost):
        primary.send_pages(0, np.arange(64), np.zeros((64, 4096), np.uint8), NO_PAGES)
    assert primary.next_due_ns() == 0
    assert primary.receive() == AcknowledgementArrived(1)
    assert primary.receive() is None
    assert primary.next_due_ns() > 0


def test_who_stops_receiving_before_all_is_taken_is_due_at_once(sockets: Pair) -> None:
    # TLS may have taken in all of it, and then no descriptor becomes readable for it.
    primary, backup = peers(sockets())
    for epoch in (1, 2):
        backup.send_acknowledgement(epoch)
    assert wait(primary) == AcknowledgementArrived(1)
    assert primary.next_due_ns() == 0
    assert wait(primary) == AcknowledgementArrived(2)
    assert primary.receive() is None
    assert primary.next_due_ns() > 0


def test_no_pages_send_no_frame(sockets: Pair) -> None:
    primary, _ = peers(sockets())
    primary.send_pages(0, NO_PAGES, NO_ROWS, NO_PAGES)
    assert primary.counters.sent_frames == 0


def listens(peer: FramePeer, seconds: float) -> None:
    """Take turns, as a worker does, for so long. Raises PeerLost."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        select.select([peer], [], [], 0.02)
        assert peer.receive() is None
        peer.tend(time.monotonic_ns())


def test_a_worker_that_is_busy_is_not_taken_for_dead_but_one_that_hangs_is(sockets: Pair) -> None:
    primary, backup = peers(
        sockets(), silence_limit_seconds=0.5, keepalive_seconds=0.1, busy_limit_seconds=1.5
    )
    with contextlib.closing(primary), contextlib.closing(backup):
        primary.be_strict()
        backup.be_strict()
        listens(backup, 1.2)  # the primary has no turn for more than two silence limits
        primary.tend(time.monotonic_ns())
        listens(backup, 1.2)
        with pytest.raises(PeerLost) as caught:
            listens(backup, DEADLINE_SECONDS)
    assert caught.value.reason is ClaimReason.PEER_SILENT


def test_the_thread_of_keep_alives_ends_with_its_connection(sockets: Pair) -> None:
    primary, backup = peers(sockets())
    primary.be_strict()
    primary.be_strict()
    assert [one.name for one in threading.enumerate()].count("keep-alives") == 1
    primary.close()
    assert "keep-alives" not in [one.name for one in threading.enumerate()]
    backup.close()
