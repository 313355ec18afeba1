"""Compressed files as streams that end only where their content does: one that is cut short raises instead."""

import contextlib
import gzip
import io
from collections.abc import Iterator
from typing import Any

from train.data.remote.files import AnyFile

_PIECE = 1 << 14
"""Bytes that are decompressed at a time: their whole content is then in memory."""


@contextlib.contextmanager
def decompressed(raw: io.BufferedReader, path: AnyFile) -> Iterator[Any]:
    """The content of an open file, decompressed if its name ends in `.gz` or `.zst`, as a binary stream.

    Raises:
        EOFError: when the stream is read: the file ends before its content does.
        OSError, zlib.error, zstandard.ZstdError: when the stream is read: it is damaged.
    """
    if path.suffix.lower() not in (".gz", ".zst"):
        yield raw
        return
    if not raw.peek(1):
        raise EOFError("the file is empty, which nothing compressed is")
    with gzip.open(raw) if path.suffix.lower() == ".gz" else io.BufferedReader(_Frames(raw), 1 << 20) as stream:
        yield stream


def zstd_error() -> type[Exception]:
    """What the stream of a damaged `.zst` file raises."""
    import zstandard

    return zstandard.ZstdError


class _Frames(io.RawIOBase):
    """All frames of a zstd file. `zstandard.stream_reader` takes a file that ends within a frame for a whole one."""

    def __init__(self, raw: io.BufferedReader) -> None:
        import zstandard

        # Many published corpora are long-window, which is not read by default.
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._raw = raw
        self._frame: Any = None
        self._packed, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and (self._packed or self._more()):
            self._frame = frame = self._frame or self._decompressor.decompressobj()
            self._ready = memoryview(frame.decompress(self._packed))
            self._packed = frame.unused_data
            if frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def _more(self) -> bool:
        self._packed = self._raw.read(_PIECE)
        if not self._packed and self._frame is not None:
            raise EOFError("Compressed file ended before the end of its last frame")
        return bool(self._packed)
