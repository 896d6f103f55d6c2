"""Compresses and decompresses blocks of pages with zstd. Touches nothing but memory.

Both calls give up the interpreter lock while they work, and blocks are megabytes (a slab), so that
taking it back is rare. Not thread-safe: one side of one connection.

What comes from a peer is not trusted: it must state its size, and that must be the one that the
frame's head announced. No more than that is set aside: zstd's window is never larger.

Source: RFC 8878; python-zstandard 0.25.
"""

import numpy as np
import zstandard
from numpy.typing import NDArray

from holdfast_agent.core.frames import FrameRejected, RejectionCode

LEVEL = 1
"""Above it a Redis guest's differences get 2 % shorter and take twice as long."""


class ZstdBlocks:
    """A compressor and a decompressor, each made when it is first needed."""

    def __init__(self, level: int = LEVEL) -> None:
        """Nothing is set aside yet."""
        self._level = level
        self._compressor: zstandard.ZstdCompressor | None = None
        self._decompressor: zstandard.ZstdDecompressor | None = None

    def compress(self, content: NDArray[np.uint8]) -> bytes:
        """Return one zstd frame that states its size."""
        if self._compressor is None:
            self._compressor = zstandard.ZstdCompressor(level=self._level, write_checksum=False)
        return self._compressor.compress(content.data)

    def decompress(self, payload: memoryview, length: int) -> memoryview:
        """Return the `length` bytes that one zstd frame stands for. Raises FrameRejected."""
        if self._decompressor is None:
            self._decompressor = zstandard.ZstdDecompressor()
        try:
            stated = zstandard.get_frame_parameters(payload).content_size
            if stated != length:
                raise _bad(f"a zstd frame of {stated} bytes, {length} announced")
            content = self._decompressor.decompress(payload, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise _bad(f"not zstd: {error}") from error
        assert len(content) == length, (len(content), length)
        return memoryview(content)


def _bad(explanation: str) -> FrameRejected:
    return FrameRejected(RejectionCode.BAD_PAYLOAD, explanation)
