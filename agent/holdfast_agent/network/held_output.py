"""A guest's output that waits, by epoch: framed packets between two marks. Pure.

QEMU's redirector writes each packet as a frame: 4 bytes length, big-endian, then the packet (with
its virtio header, which goes back in as it came out). Frames are kept as one run of bytes:

    0 .. closed        the epoch that was closed and waits for its acknowledgement
    closed .. whole    whole frames of the epoch that runs
    whole .. end       a frame that has not arrived entirely

Invariant: 0 <= closed <= whole <= end, and `closed` and `whole` lie between two frames.
A network may drop packets, but only whole ones: so does this beyond its limit.
"""

import struct

FRAME_HEADER_BYTES = 4
FRAME_LIMIT_BYTES = 1 << 20
"""QEMU's largest packet is about 69 KiB (`NET_BUFSIZE`)."""
HELD_LIMIT_BYTES = 64 << 20
"""Of one NIC: some seconds of a full gigabit while no acknowledgement comes."""

_length_at = struct.Struct(">I").unpack_from


class HeldOutput:
    """The held packets of one NIC."""

    def __init__(self, limit_bytes: int = HELD_LIMIT_BYTES) -> None:
        """Hold nothing yet; beyond `limit_bytes` new packets are dropped and counted."""
        self._data = bytearray()
        self._closed = 0
        self._whole = 0
        self._limit_bytes = limit_bytes
        self._epoch_closed = False
        self.dropped_packets = 0

    def change_limit(self, limit_bytes: int) -> None:
        """Drop what comes beyond this from now on; what is held already stays."""
        self._limit_bytes = limit_bytes

    @property
    def held_bytes(self) -> int:
        """Bytes that wait, frames included."""
        return len(self._data)

    def feed(self, data: bytes | memoryview) -> None:
        """Take in what came from the redirector, however it is cut.

        Raises ValueError when it is no frame.
        """
        self._data += data
        start = position = self._whole
        end = len(self._data)
        frames = 0
        while position + FRAME_HEADER_BYTES <= end:
            (length,) = _length_at(self._data, position)
            if length > FRAME_LIMIT_BYTES:
                raise ValueError(f"a frame of {length} bytes: this is not a redirector's output")
            if position + FRAME_HEADER_BYTES + length > end:
                break
            position += FRAME_HEADER_BYTES + length
            frames += 1
        if start >= self._limit_bytes and position > start:
            del self._data[start:position]
            self.dropped_packets += frames
            position = start
        self._whole = position

    def close_epoch(self) -> None:
        """End the epoch that runs: its whole frames wait together; a torn one is the next's."""
        assert not self._epoch_closed, "an epoch is closed and not released"
        self._epoch_closed = True
        self._closed = self._whole

    def reopen_epoch(self) -> None:
        """Undo `close_epoch`, if one is closed: its frames belong to the epoch that runs."""
        self._epoch_closed = False
        self._closed = 0

    def take_closed(self) -> bytes:
        """Return the frames of the closed epoch, to be let go; the open epoch's stay."""
        assert self._epoch_closed, "no epoch is closed"
        self._epoch_closed = False
        taken = bytes(memoryview(self._data)[: self._closed])
        del self._data[: self._closed]
        self._whole -= self._closed
        self._closed = 0
        return taken

    def take_all(self) -> bytes:
        """Return all whole frames, of whatever epoch."""
        taken = bytes(memoryview(self._data)[: self._whole])
        del self._data[: self._whole]
        self._closed = self._whole = 0
        self._epoch_closed = False
        return taken
