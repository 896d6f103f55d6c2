"""Whatever a peer sends: documented errors only, bounded memory, nothing after a rejection."""

import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fuzz.peers import (
    LIMITS,
    LONGEST_PAYLOAD_BYTES,
    MAP_PAGES,
    SPOKEN,
    STAGING_LIMIT_BYTES,
    Conversation,
    frames_of_one_kind,
    hear,
    of_length,
    resealed_streams,
    spoilt_streams,
)

from holdfast_agent.core.failures import PeerLost
from holdfast_agent.core.frames import KIBIBYTE, KINDS_OF, FrameKind
from holdfast_agent.core.peer_messages import CheckpointArrived, PagesArrived, PeerMessage
from holdfast_agent.transport.buffers import MAX_FREE_BUFFERS, StagingLimitReached
from holdfast_api.words import ClaimReason, Role

EXAMPLES = 150
BOTH = pytest.mark.parametrize(
    ("speaker", "listener"), [(Role.PRIMARY, Role.BACKUP), (Role.BACKUP, Role.PRIMARY)]
)
ALLOCATED_BYTES_MAX = (
    STAGING_LIMIT_BYTES
    + (MAX_FREE_BUFFERS + 2) * LIMITS.payload_size_bytes(FrameKind.PAGES)
    + 4 * LONGEST_PAYLOAD_BYTES
    + 512 * KIBIBYTE
)
"""What may be staged, what the pool keeps, a payload under way with its copies, small change."""


def told(message: PeerMessage) -> object:
    """Return what can be compared."""
    if isinstance(message, PagesArrived):
        return (
            message.epoch,
            message.indexes.tolist(),
            message.zero_indexes.tolist(),
            message.rows.tobytes(),
        )
    return message


WHOLE = {
    speaker: [told(message) for message in hear(b"".join(SPOKEN[speaker]), listener).messages]
    for speaker, listener in ((Role.PRIMARY, Role.BACKUP), (Role.BACKUP, Role.PRIMARY))
}


@BOTH
def test_what_was_not_spoilt_is_heard_to_its_end(speaker: Role, listener: Role) -> None:
    heard = hear(b"".join(SPOKEN[speaker]), listener)
    assert isinstance(heard.end, PeerLost)
    assert heard.end.reason == ClaimReason.STREAM_BROKEN
    signs_of_life = {Role.PRIMARY: 1, Role.BACKUP: 3}[speaker]
    assert len(heard.messages) == len(SPOKEN[speaker]) - signs_of_life


@BOTH
@given(data=st.data())
@settings(max_examples=EXAMPLES, deadline=None)
def test_of_a_spoilt_stream_only_a_sound_beginning_is_accepted(
    speaker: Role, listener: Role, data: st.DataObject
) -> None:
    heard = hear(data.draw(spoilt_streams(speaker)), listener)
    assert isinstance(heard.end, PeerLost)
    accepted = [told(message) for message in heard.messages]
    assert accepted == WHOLE[speaker][: len(accepted)]


@BOTH
@given(data=st.data())
@settings(max_examples=EXAMPLES, deadline=None)
def test_behind_a_good_checksum_nothing_impossible_is_accepted(
    speaker: Role, listener: Role, data: st.DataObject
) -> None:
    heard = hear(data.draw(resealed_streams(speaker)), listener)
    epochs = [message.epoch for message in heard.messages if isinstance(message, CheckpointArrived)]
    assert epochs == list(range(1, len(epochs) + 1))
    for pages in (message for message in heard.messages if isinstance(message, PagesArrived)):
        named = pages.indexes.tolist() + pages.zero_indexes.tolist()
        assert len(set(named)) == len(named)
        assert all(0 <= page < MAP_PAGES for page in named)
        assert all(one < other for one, other in pairwise(pages.indexes.tolist()))
        assert len(pages.rows) == len(pages.indexes)


@pytest.mark.parametrize(
    ("speaker", "listener", "kind"),
    [
        (speaker, listener, kind)
        for speaker, listener in ((Role.PRIMARY, Role.BACKUP), (Role.BACKUP, Role.PRIMARY))
        for kind in sorted(KINDS_OF[speaker])
    ],
)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_payload_of_any_kind_is_accepted_or_ends_the_connection(
    speaker: Role, listener: Role, kind: FrameKind, data: st.DataObject
) -> None:
    heard = hear(data.draw(frames_of_one_kind(speaker, kind)), listener)
    assert len(heard.messages) <= 1
    assert isinstance(heard.end, PeerLost)


@given(st.binary(max_size=2000), st.sampled_from((Role.PRIMARY, Role.BACKUP)))
@settings(max_examples=EXAMPLES, deadline=None)
def test_noise_is_never_accepted(noise: bytes, listener: Role) -> None:
    assert hear(noise, listener).messages == []


@pytest.mark.parametrize("number", range(len(SPOKEN[Role.PRIMARY])))
@pytest.mark.parametrize("length", [2**20, 2**31, 2**32 - 1])
def test_a_huge_length_is_refused_before_memory_is_set_aside(number: int, length: int) -> None:
    frames = SPOKEN[Role.PRIMARY]
    stream = b"".join(frames[:number]) + of_length(frames[number], length)
    tracemalloc.start()
    try:
        heard = hear(stream, Role.BACKUP)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "too-long" in str(heard.end)
    assert peak_bytes < ALLOCATED_BYTES_MAX


@given(
    st.lists(
        st.tuples(st.integers(0, 20), st.integers(0, 3), st.integers(0, 40)),
        min_size=40,
        max_size=120,
    )
)
@settings(max_examples=40, deadline=None)
def test_pages_without_end_meet_the_staging_limit(frames: list[tuple[int, int, int]]) -> None:
    primary = Conversation(Role.PRIMARY)
    for first, count, zeros in frames:
        primary.pages(1, first, count, zeros)
    tracemalloc.start()
    try:
        heard = hear(b"".join(primary.frames), Role.BACKUP)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < ALLOCATED_BYTES_MAX + sum(map(len, primary.frames))
    staged = sum(
        message.rows.nbytes for message in heard.messages if isinstance(message, PagesArrived)
    )
    assert staged <= STAGING_LIMIT_BYTES
    assert isinstance(heard.end, (PeerLost, StagingLimitReached))


def test_page_numbers_count_against_the_staging_limit() -> None:
    """A frame of 96 bytes can name every page of the VM as zero, and each takes eight bytes."""
    primary = Conversation(Role.PRIMARY)
    per_frame = 8 * MAP_PAGES
    for _ in range(2 * STAGING_LIMIT_BYTES // per_frame):
        primary.pages(1, 0, 0, MAP_PAGES)
    heard = hear(b"".join(primary.frames), Role.BACKUP)
    assert isinstance(heard.end, StagingLimitReached)
    assert len(heard.messages) * per_frame <= STAGING_LIMIT_BYTES
