"""Writes a token store into a folder, chunk by chunk."""

import dataclasses
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from train.data.preparation.encode import Chunk
from train.data.stores.indexed import token_dtype, write_index
from train.data.stores.manifest import MANIFEST, Manifest, Option, file_digest, fingerprint, sample_digest
from train.data.stores.store import BIN, IDX, TOKEN_BYTES
from train.data.stores.sums import SUMS, Sums
from train.data.tokenization.tokenizer import Tokenizer

_LENGTHS = "lengths.part"
_PIECE = 1 << 22


@dataclass(frozen=True)
class Counts:
    """What was written, as the manifest counts it."""

    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0
    token_bytes: int = 0
    empty: int = 0

    def with_chunk(self, chunk: Chunk, token_bytes: int) -> "Counts":
        """The sum with a chunk, whose tokens stand for `token_bytes`."""
        more = len(chunk.tokens), len(chunk.lengths), chunk.text_bytes, token_bytes, chunk.empty
        return Counts(*(have + new for have, new in zip(dataclasses.astuple(self), more, strict=True)))


def is_written(folder: Path, counts: Counts) -> bool:
    """Whether a folder has at least so much."""
    sizes = {BIN: counts.tokens * 2, _LENGTHS: counts.documents * 4}
    return all((folder / name).is_file() and (folder / name).stat().st_size >= size for name, size in sizes.items())


class StoreWriter:
    """Takes tokenized chunks in order; `finish` writes the index, the tokenizer and, last, the manifest.

    A context manager. Memory: 4 bytes per document.

    Attributes:
        counts: written so far.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, counts: Counts | None = None) -> None:
        """Args: a folder that is empty, or was written up to `counts`, and perhaps further; the tokenizer of all
        chunks."""
        self.folder = folder
        self.tokenizer = tokenizer
        self.counts = counts or Counts()
        self._table = tokenizer.token_bytes()
        self._digest, self._sums = hashlib.sha256(), Sums()
        self._stream, self._lengths = ((folder / name).open("a+b") for name in (BIN, _LENGTHS))
        dtype = token_dtype(tokenizer.vocab_size)
        for stream, size in (
            (self._stream, self.counts.tokens * dtype.itemsize),
            (self._lengths, 4 * self.counts.documents),
        ):
            stream.truncate(size)
            stream.seek(0)
        while content := self._stream.read(_PIECE):
            self._digest.update(content)
            self._sums.update(content)

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stream.close()
        self._lengths.close()

    def sync(self) -> None:
        """Waits until all that was appended is on the disk."""
        for stream in (self._stream, self._lengths):
            stream.flush()
            os.fsync(stream.fileno())

    def append(self, chunk: Chunk) -> None:
        """Writes the next documents."""
        content = chunk.tokens.tobytes()
        self._stream.write(content)
        self._digest.update(content)
        self._sums.update(content)
        self._lengths.write(chunk.lengths.astype("<i4", copy=False).tobytes())
        self.counts = self.counts.with_chunk(chunk, int(self._table[chunk.tokens].sum(dtype=np.int64)))

    def finish(
        self, *, bad: int, passed_over: dict[str, int], sources: list[str], options: dict[str, Option]
    ) -> Manifest:
        """Completes the folder and returns its manifest, of which the arguments become entries."""
        self._stream.close()
        self._lengths.close()
        lengths = np.fromfile(self.folder / _LENGTHS, dtype="<i4")
        with (self.folder / IDX).open("wb") as stream:
            write_index(stream, token_dtype(self.tokenizer.vocab_size), lengths)
        np.save(self.folder / TOKEN_BYTES, self._table)
        (self.folder / SUMS).write_bytes(self._sums.content())
        self.tokenizer.save(self.folder)
        bin_sha256, idx_sha256 = self._digest.hexdigest(), file_digest(self.folder / IDX)
        tokenizer_sha256, vocab_size, eos_id = self.tokenizer.sha256, self.tokenizer.vocab_size, self.tokenizer.eos_id
        manifest = Manifest(
            tokenizer=self.tokenizer.name,
            tokenizer_sha256=tokenizer_sha256,
            vocab_size=vocab_size,
            eos_id=eos_id,
            pad_id=self.tokenizer.pad_id,
            **dataclasses.asdict(self.counts),
            bad=bad,
            passed_over=passed_over,
            sources=sources,
            options=options,
            bin_sha256=bin_sha256,
            idx_sha256=idx_sha256,
            sample_sha256=sample_digest(self.folder / BIN, self.folder / IDX),
            shard_bytes=self._sums.shard_bytes,
            sums_sha256=file_digest(self.folder / SUMS),
            fingerprint=fingerprint(bin_sha256, idx_sha256, tokenizer_sha256, vocab_size, eos_id),
        )
        (self.folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        (self.folder / _LENGTHS).unlink()
        return manifest
