"""What a stream over RDMA sends: writes into the peer's ring, words behind them. Posts requests.

A piece is some bytes of the caller's, written from where they lie if that is registered, and else
from the bounce buffer, followed by one word. Only the last request of a piece is signaled: requests
end in order, so its completion frees what all of them used.

Not thread-safe; `stream.RdmaStream` holds its lock around every call. Errors are OSError.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from holdfast_agent.core.ring import BounceRing, RingWriter, Word, WordKind
from holdfast_agent.transport.rdma.link import (
    BOUNCE_BYTES,
    SEND_REQUESTS,
    WORD,
    WORD_ROOM_BYTES,
    Link,
    OwnRing,
    PeerRing,
)
from holdfast_agent.transport.rdma.regions import Regions, address_of
from holdfast_agent.transport.rdma.verbs import STATUS_SUCCESS

PIECE_BYTES = 1 << 20
"""At most so much is announced by one word: the peer reads a piece while the next one travels."""
PIECE_PARTS_MAX = 16
PIECE_REQUESTS_MAX = PIECE_PARTS_MAX + 2
"""One part may be cut at the end of the ring, and the word may need a request of its own."""
WORD_REQUESTS = 16
"""Requests that data leaves to credits and the end."""
ROOM_BYTES_MIN = 4096
"""Less room does not count as room: a keep-alive must go out whole."""


class _Posted(NamedTuple):
    """What is free again once a signaled request is done."""

    request: int
    slots: int
    bounced_bytes: int
    lent_bytes: int


class _Part(NamedTuple):
    """Bytes to write, where the NIC can read them."""

    address: int
    length: int
    local_key: int


class Outbox:
    """The sending half of a stream."""

    def __init__(self, link: Link, own: OwnRing, peer: PeerRing) -> None:
        """Send over `link` into `peer`, by way of the bounce buffer of `own` if need be."""
        assert own.bounce_region is not None
        self._link = link
        self._memory = own.bounce
        self._address = int(own.bounce.ctypes.data)
        self._key = own.bounce_region.local_key
        self._peer = peer
        self._writer = RingWriter(peer.shape)
        self._bounce = BounceRing(BOUNCE_BYTES)
        self._posted: deque[_Posted] = deque()
        self._free_requests = SEND_REQUESTS
        self._request = 0
        self._said_end = False
        self.regions = Regions(link.register)
        self.lent_bytes = 0
        """Bytes of registered memory that the NIC may still read."""

    @property
    def has_room(self) -> bool:
        """Whether a small frame would go out whole."""
        room_bytes = min(self._writer.room_bytes, self._bounce.room_bytes)
        return room_bytes >= ROOM_BYTES_MIN and self._may_post

    def post(self, views: Sequence[memoryview]) -> int:
        """Post the next bytes of `views`; returns how many, 0 if there is no room."""
        assert not self._said_end, "nothing more may be sent"
        room_bytes = min(PIECE_BYTES, self._writer.room_bytes)
        if room_bytes == 0 or not self._may_post:
            return 0
        used_before = self._bounce.used_bytes
        parts = self._gather(views, room_bytes)
        if not parts:
            return 0
        length = sum(part.length for part in parts)
        bounced_bytes = self._bounce.used_bytes - used_before
        slots = self._write(parts, Word(WordKind.DATA, length))
        self._writer.notified()
        self._remember(slots, bounced_bytes, length - bounced_bytes)
        return length

    def post_credit(self, credit: Word) -> None:
        """Return a credit; `may_post_word` must say that there is room."""
        self._post_word(credit)

    def post_end(self) -> None:
        """Say END, once, if there is room for it now."""
        if not self._said_end and self.may_post_word and self._writer.may_notify:
            self._said_end = True
            self._post_word(Word(WordKind.END))
            self._writer.notified()

    @property
    def may_post_word(self) -> bool:
        """Whether there is a request left."""
        return self._free_requests > 0

    def credited(self, credit: Word) -> None:
        """Take a credit of the peer's. Raises RingViolated."""
        self._writer.credited(credit)

    def poll(self) -> None:
        """Free what finished requests used. Raises OSError for one that failed."""
        while found := self._link.sends.poll():
            for completion in found:
                if completion.status != STATUS_SUCCESS:
                    raise completion.failure()
                self._done(completion.request)

    @property
    def _may_post(self) -> bool:
        least = PIECE_REQUESTS_MAX + WORD_REQUESTS
        return self._writer.may_notify and self._free_requests >= least

    def _done(self, request: int) -> None:
        while self._posted and self._posted[0].request <= request:
            posted = self._posted.popleft()
            self._free_requests += posted.slots
            self._bounce.give_back(posted.bounced_bytes)
            self.lent_bytes -= posted.lent_bytes

    def _gather(self, views: Sequence[memoryview], room_bytes: int) -> list[_Part]:
        """Return the first bytes as parts the NIC can read, copying what is not registered."""
        parts: list[_Part] = []
        for view in views:
            length = min(len(view), room_bytes)
            if room_bytes == 0 or len(parts) == PIECE_PARTS_MAX:
                break
            if length == 0:
                continue
            address = address_of(view)
            region = self.regions.find(address, length)
            if region is not None:
                parts.append(_Part(address, length, region.local_key))
            else:
                placed = self._copy(parts, view[:length])
                if placed < length:
                    break
            room_bytes -= length
        return parts

    def _copy(self, parts: list[_Part], view: memoryview) -> int:
        """Copy into the bounce buffer, in one piece; returns how many bytes found room."""
        offset, placed = self._bounce.place(len(view))
        if placed == 0:
            return 0
        self._memory[offset : offset + placed] = np.frombuffer(view[:placed], dtype=np.uint8)
        address = self._address + offset
        last = parts[-1] if parts else None
        if last and last.local_key == self._key and last.address + last.length == address:
            parts[-1] = last._replace(length=last.length + placed)
        else:
            parts.append(_Part(address, placed, self._key))
        return placed

    def _write(self, parts: Sequence[_Part], word: Word) -> int:
        """Post the writes of `parts` with `word` behind them; returns the requests it took."""
        pieces: list[tuple[_Part, int]] = []
        for part in parts:
            done = 0
            while done < part.length:
                offset, length = self._writer.span(part.length - done)
                pieces.append((_Part(part.address + done, length, part.local_key), offset))
                done += length
        self._request += 1
        for number, (part, offset) in enumerate(pieces):
            carries = self._link.has_immediate and number == len(pieces) - 1
            self._link.write(
                address=part.address,
                length=part.length,
                local_key=part.local_key,
                remote_address=self._peer.address + offset,
                remote_key=self._peer.key,
                request=self._request,
                signaled=carries,
                word=word.encode() if carries else None,
            )
        if self._link.has_immediate:
            return len(pieces)
        self._send_word(word)
        return len(pieces) + 1

    def _post_word(self, word: Word) -> None:
        """Post a word alone: a write of nothing that carries it, or a message."""
        self._request += 1
        if self._link.has_immediate:
            self._link.write(
                address=self._address,
                length=0,
                local_key=self._key,
                remote_address=self._peer.address,
                remote_key=self._peer.key,
                request=self._request,
                signaled=True,
                word=word.encode(),
            )
        else:
            self._send_word(word)
        self._remember(1, 0, 0)

    def _send_word(self, word: Word) -> None:
        # One more place than requests: the NIC is done with a place before it comes round again.
        offset = BOUNCE_BYTES + self._request % (SEND_REQUESTS + 1) * WORD_ROOM_BYTES
        WORD.pack_into(self._memory.data, offset, word.encode())
        self._link.send(
            address=self._address + offset,
            length=WORD.size,
            local_key=self._key,
            request=self._request,
        )

    def _remember(self, slots: int, bounced_bytes: int, lent_bytes: int) -> None:
        self._free_requests -= slots
        self.lent_bytes += lent_bytes
        self._posted.append(_Posted(self._request, slots, bounced_bytes, lent_bytes))
