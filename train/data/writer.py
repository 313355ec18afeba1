"""Writes a token store into a folder, chunk by chunk."""

import hashlib
from pathlib import Path
from types import TracebackType

import numpy as np

from train.data.encode import Chunk
from train.data.indexed import token_dtype, write_index
from train.data.manifest import MANIFEST, Manifest, Option, file_digest, fingerprint, sample_digest
from train.data.store import BIN, IDX, TOKEN_BYTES
from train.data.sums import SUMS, Sums
from train.data.tokenizer import Tokenizer


class StoreWriter:
    """Takes tokenized chunks in order; `finish` writes the index, the tokenizer and, last, the manifest.

    A context manager. Memory: 4 bytes per document.

    Attributes:
        tokens, documents: written so far.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        """Args: an empty folder; the tokenizer of all chunks."""
        self.folder = folder
        self.tokenizer = tokenizer
        self.tokens = self.documents = 0
        self._text_bytes = self._token_bytes = self._empty = 0
        self._lengths: list[np.ndarray] = []
        self._table = tokenizer.token_bytes()
        self._digest, self._sums = hashlib.sha256(), Sums()
        self._stream = (folder / BIN).open("wb")

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stream.close()

    def append(self, chunk: Chunk) -> None:
        """Writes the next documents."""
        content = chunk.tokens.tobytes()
        self._stream.write(content)
        self._digest.update(content)
        self._sums.update(content)
        self._lengths.append(chunk.lengths)
        self.tokens += len(chunk.tokens)
        self.documents += len(chunk.lengths)
        self._text_bytes += chunk.text_bytes
        self._token_bytes += int(self._table[chunk.tokens].sum(dtype=np.int64))
        self._empty += chunk.empty

    def finish(
        self, *, bad: int, passed_over: dict[str, int], sources: list[str], options: dict[str, Option]
    ) -> Manifest:
        """Completes the folder and returns its manifest, of which the arguments become entries."""
        self._stream.close()
        with (self.folder / IDX).open("wb") as stream:
            write_index(stream, token_dtype(self.tokenizer.vocab_size), np.concatenate(self._lengths))
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
            documents=self.documents,
            tokens=self.tokens,
            text_bytes=self._text_bytes,
            token_bytes=self._token_bytes,
            bad=bad,
            passed_over=passed_over,
            empty=self._empty,
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
        return manifest
