"""Checksums of a token file's shards: pieces of equal size but for the last, which are fetched one by one (by URL)."""

import hashlib
from pathlib import Path

from train.errors import UserError

SUMS = "tokens.sums"
"""Name of the file with all checksums, one after another."""
SHARD_BYTES = 1 << 20
"""Of the stores that are made now. A sequence needs some tokens of a shard: larger ones waste more of what is fetched,
smaller ones ask the server more often."""
_DIGEST_BYTES = 16


def shard_sum(content: object) -> bytes:
    """Checksum of a shard, any bytes-like object: 16 bytes of BLAKE2b."""
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()  # type: ignore[arg-type]


class Sums:
    """Takes a token file's bytes as they are written.

    Attributes:
        shard_bytes: of a shard.
    """

    def __init__(self) -> None:
        self.shard_bytes = SHARD_BYTES
        self._whole = bytearray()
        self._started()

    def _started(self) -> None:
        self._sum, self._left = hashlib.blake2b(digest_size=_DIGEST_BYTES), self.shard_bytes

    def update(self, content: bytes) -> None:
        """Takes the next bytes."""
        rest = memoryview(content)
        while len(rest):
            part, rest = rest[: self._left], rest[self._left :]
            self._sum.update(part)
            self._left -= len(part)
            if not self._left:
                self._whole += self._sum.digest()
                self._started()

    def content(self) -> bytes:
        """What the file `SUMS` holds."""
        return bytes(self._whole) + (self._sum.digest() if self._left < self.shard_bytes else b"")


def read_sums(path: Path, shards: int) -> list[bytes]:
    """The checksums of all shards.

    Raises:
        UserError: the file has those of another number.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    if len(content) != shards * _DIGEST_BYTES:
        raise UserError(f"{path}: {len(content):,} bytes, where {shards:,} shards have {shards * _DIGEST_BYTES:,}")
    return [content[place : place + _DIGEST_BYTES] for place in range(0, len(content), _DIGEST_BYTES)]
