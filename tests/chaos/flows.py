"""One TCP flow between a client and a guest: what was asked, what the guest has ever said. Pure.

Theory of operation. Two things are remembered, both bounded:

* *The client's side*: for each stretch of its bytes, as which packet it first passed. The guest's
  acknowledgement number in a packet says up to where the guest had heard the client when it made
  that packet. So `heard_at` gives the newest packet of the client that this one depends on, also
  when a client asks again before it was answered.
* *The guest's side*: the last 64 KiB of its bytes and which of them were seen, and the highest
  acknowledgement number. A guest that went back to an older state says other bytes in the same
  place, or has forgotten that it heard some of the client's.

On the way from one host nothing should overtake, but a packet might when a process changes its
processor between two of them. A guest that has forgotten goes on with its older number for good; so
within one host only `LOWER_IN_A_ROW` packets in a row are a contradiction. From another host the
first is one: a backup goes on from an epoch that had all of it.
"""

from collections import deque
from typing import NamedTuple

from tests.chaos.packets import ACK, RST, SYN, Segment, near

WINDOW_BYTES = 64 << 10
REQUESTS_MAX = 512
LOWER_IN_A_ROW = 3


class _Request(NamedTuple):
    """A stretch of the client's sequence numbers, and as which packet it first passed."""

    begin: int
    end: int
    passed_at: int


class Said(NamedTuple):
    """What a packet of the guest added."""

    is_new: bool = False
    """It has bytes at sequence numbers that were not seen before."""
    overtaken: bool = False
    """It acknowledges less than one before it from the same host."""
    contradiction: str | None = None


class GuestFlow:
    """One flow. Sequence numbers inside are unwrapped: they do not end at 2^32."""

    def __init__(self, opened: Segment | None = None) -> None:
        """Begin with the client's SYN, or with None in the middle of a flow."""
        self.client_began = None if opened is None else opened.sequence
        self._established = opened is None
        self._client_end: int | None = None
        self._requests: deque[_Request] = deque(maxlen=REQUESTS_MAX)
        self._guest_began: int | None = None
        self._acknowledged: int | None = None
        self._acknowledged_from = ""
        self._lower = 0
        self._base: int | None = None
        self._window = bytearray()
        self._seen = bytearray()
        """For each byte of the window 1 if it was seen, else 0."""

    # --- the client -------------------------------------------------------------------------------

    def ask(self, segment: Segment, now: int) -> None:
        """See a segment of the client as packet number `now`."""
        if self._client_end is None:
            self._client_end = segment.sequence
        end = near(segment.sequence + segment.length, self._client_end)
        if end > self._client_end:
            self._requests.append(_Request(self._client_end, end, now))
            self._client_end = end

    def heard_at(self, segment: Segment) -> int:
        """Return as which packet the newest bytes that the guest had heard passed; or 0."""
        if not segment.flags & ACK or self._client_end is None:
            return 0
        heard = near(segment.acknowledgement, self._client_end)
        for request in reversed(self._requests):
            if request.begin < heard:
                return request.passed_at
        return 0

    # --- the guest --------------------------------------------------------------------------------

    def say(self, segment: Segment, host: str, *, is_late: bool = False) -> Said:
        """See a segment of the guest; `is_late` if it was overtaken by another host's."""
        if not self._established:
            return self._open(segment, host)
        if segment.flags & SYN and self._guest_began not in (None, segment.sequence):
            return Said(contradiction=f"it began anew at {segment.sequence}")
        overtaken, contradiction = False, None
        if segment.flags & ACK and not is_late:
            overtaken, contradiction = self._acknowledge(segment.acknowledgement, host)
        is_new = False
        if len(segment.payload):
            is_new, other = self._compare(segment.sequence, segment.payload)
            contradiction = contradiction or other
        return Said(is_new, overtaken, contradiction)

    def _open(self, segment: Segment, host: str) -> Said:
        """Wait for the answer to the client's SYN; what an older flow left is passed over."""
        assert self.client_began is not None
        answers = segment.flags & (SYN | ACK | RST) == SYN | ACK
        if answers and near(segment.acknowledgement, self.client_began) == self.client_began + 1:
            self._established = True
            self._guest_began = segment.sequence
            self._base = segment.sequence + 1
            self._acknowledge(segment.acknowledgement, host)
        return Said()

    def _acknowledge(self, number: int, host: str) -> tuple[bool, str | None]:
        before = self._acknowledged
        now = number if before is None else near(number, before)
        if before is not None and now < before:
            self._lower += 1
            if host == self._acknowledged_from and self._lower < LOWER_IN_A_ROW:
                return True, None
            self._acknowledged, self._acknowledged_from, self._lower = now, host, 0
            return True, f"it acknowledges {before - now} bytes less than it did before"
        self._acknowledged, self._acknowledged_from, self._lower = now, host, 0
        return False, None

    def _compare(self, sequence: int, payload: memoryview) -> tuple[bool, str | None]:
        """Return whether any of these bytes is new, and what they contradict."""
        if self._base is None:
            self._base = sequence
        begin = near(sequence, self._base + len(self._window)) - self._base
        if begin < 0:
            payload, begin = payload[-begin:], 0
            if not len(payload):
                return False, None  # older than what is remembered
        if begin > len(self._window) + WINDOW_BYTES:  # so much was never seen: remember from here
            self._base += begin
            self._window.clear()
            self._seen.clear()
            begin = 0
        if begin > len(self._window):
            gap = bytes(begin - len(self._window))
            self._window += gap
            self._seen += gap
        overlap = min(len(payload), len(self._window) - begin)
        is_new, contradiction = self._overlay(begin, payload[:overlap])
        self._window += payload[overlap:]
        self._seen += b"\1" * (len(payload) - overlap)
        self._trim()
        return is_new or overlap < len(payload), contradiction

    def _overlay(self, begin: int, payload: memoryview) -> tuple[bool, str | None]:
        end = begin + len(payload)
        if self._seen.find(0, begin, end) < 0 and self._window[begin:end] == payload:
            return False, None
        is_new, contradiction = False, None
        for at, byte in enumerate(payload, begin):
            if not self._seen[at]:
                is_new = True
                self._seen[at], self._window[at] = 1, byte
            elif self._window[at] != byte and contradiction is None:
                assert self._base is not None
                contradiction = (
                    f"byte {self._base + at} was {self._window[at]:#04x} and is {byte:#04x}"
                )
        return is_new, contradiction

    def _trim(self) -> None:
        """Forget the oldest bytes; seldom, as what stays is moved."""
        if len(self._window) > 2 * WINDOW_BYTES:
            assert self._base is not None
            cut = len(self._window) - WINDOW_BYTES
            self._base += cut
            del self._window[:cut]
            del self._seen[:cut]
