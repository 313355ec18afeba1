"""What is in a token store: counts, lengths, exact duplicates; and whether all of it is sound."""

import hashlib
from dataclasses import dataclass

import numpy as np

from train.data.stores.store import TokenStore
from train.errors import UserError

_PIECE = 1 << 22
"""Tokens in memory at a time."""


@dataclass(frozen=True)
class Statistics:
    """Figures of a store.

    Attributes:
        documents, tokens: in it, end-of-document tokens included.
        text_bytes: that the tokens stand for.
        entries, used_entries: of the vocabulary, and those of them that occur.
        quantiles: tokens of a document, by percent of the documents that have at most as many.
        histogram: documents by length: `[least, most, documents, tokens]`, each range twice as wide as the one before.
        duplicates, duplicate_tokens: documents that are equal to an earlier one, token by token, and their tokens.
    """

    documents: int
    tokens: int
    text_bytes: float
    entries: int
    used_entries: int
    quantiles: dict[int, int]
    histogram: list[list[int]]
    duplicates: int
    duplicate_tokens: int


def statistics(store: TokenStore) -> Statistics:
    """Reads the whole store once; 16 bytes a document are in memory beside the index."""
    lengths = np.diff(store.document_offsets)
    counts = np.zeros(store.vocab_size, dtype=np.int64)
    for begin in range(0, store.num_tokens, _PIECE):
        part = store.tokens[begin : begin + _PIECE]
        store.check_ids(part)
        counts += np.bincount(part, minlength=store.vocab_size)
    repeated = _repeated(store)
    percents = (0, 1, 10, 25, 50, 75, 90, 99, 100)
    values = np.percentile(lengths, percents, method="inverted_cdf")
    return Statistics(
        documents=store.num_documents,
        tokens=store.num_tokens,
        text_bytes=float((counts * store.token_bytes).sum()) * store.bytes_ratio,
        entries=store.vocab_size,
        used_entries=int((counts > 0).sum()),
        quantiles={percent: int(value) for percent, value in zip(percents, values, strict=True)},
        histogram=_histogram(lengths),
        duplicates=int(repeated.sum()),
        duplicate_tokens=int(lengths[repeated].sum()),
    )


def check(store: TokenStore) -> None:
    """Compares both files with the manifest, byte by byte, and looks at every token.

    Raises:
        UserError: they differ, there is no manifest, a token is none of the tokenizer's, or a document does not end
            with the end-of-document token.
    """
    store.verify()
    for begin in range(0, store.num_tokens, _PIECE):
        store.check_ids(store.tokens[begin : begin + _PIECE])
    offsets = store.document_offsets
    full = np.flatnonzero(np.diff(offsets))
    unended = full[store.tokens[offsets[full + 1] - 1] != store.eos_id]
    if len(unended):
        raise UserError(
            f"{store.prefix}: {len(unended):,} document(s) do not end with the end-of-document token {store.eos_id}, "
            f"the first is number {unended[0] + 1}"
        )


def _repeated(store: TokenStore) -> np.ndarray:
    """Which documents are equal to an earlier one: bool, one a document. Told by 128 bits of BLAKE2b."""
    digests = np.empty((store.num_documents, 2), dtype=np.uint64)
    for number, (begin, end) in enumerate(zip(store.document_offsets, store.document_offsets[1:], strict=False)):
        digest = hashlib.blake2b(digest_size=16)
        for start in range(int(begin), int(end), _PIECE):
            digest.update(store.tokens[start : min(start + _PIECE, int(end))].tobytes())
        digests[number] = np.frombuffer(digest.digest(), dtype=np.uint64)
    _, first = np.unique(digests, axis=0, return_index=True)
    repeated = np.ones(store.num_documents, dtype=bool)
    repeated[first] = False
    return repeated


def _histogram(lengths: np.ndarray) -> list[list[int]]:
    # 0 | 1 | 2 3 | 4 .. 7 | ...
    bins = np.where(lengths > 0, np.floor(np.log2(np.maximum(lengths, 1))).astype(np.int64) + 1, 0)
    found = []
    for number in range(int(bins.min()), int(bins.max()) + 1):
        mine = lengths[bins == number]
        least = 2 ** (number - 1) if number else 0
        found.append([least, max(0, 2 * least - 1), len(mine), int(mine.sum())])
    return found
