"""The order of an epoch: which documents, in which order end to end, and the order of their sequences."""

from typing import NamedTuple

import numpy as np

from train.data.batches.best_fit import BestFitStream, Fit
from train.data.batches.packing import DocumentStream

PART_TOKENS = 1 << 22
"""A part of a store that is read together: many times what a document has, as the last one reaches into the next part.
Of a store by URL it is eight shards or more."""


class Epoch(NamedTuple):
    """Everything that an epoch's batches follow from."""

    stream: DocumentStream | BestFitStream
    """The split's documents in this epoch's order."""
    sequences: np.ndarray
    """int64: numbers of the stream's whole sequences, in the order of training."""


def permutation(count: int, seed: int, *key: int) -> np.ndarray:
    """A pseudo-random permutation of range(count) that depends on `seed` and `key` alone: int64 [count].

    Sorted from Philox's raw output and not shuffled by `Generator`: NumPy promises that the first never changes between
    versions, but not the second (NEP 19), and a run must be able to continue with another version.
    """
    ranks = np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)).random_raw(count)
    return np.argsort(ranks, kind="stable")


def epoch_order(
    offsets: np.ndarray,
    documents: np.ndarray,
    *,
    length: int,
    seed: int,
    epoch: int,
    fit: Fit | None = None,
    window: int | None = None,
) -> Epoch:
    """The order of one epoch over `documents`: they are permuted, packed, and the sequences permuted.

    The tokens after the last whole sequence are dropped; as the documents are permuted, every epoch drops others.

    With `window`, parts of the store, each of PART_TOKENS consecutive tokens, are permuted and taken together until
    they have as many tokens; documents, and then sequences, are permuted among those of the same parts only. At any
    time, an epoch then reads few parts of the store.

    Args:
        offsets: the store's document offsets.
        documents: int64 numbers of the split's documents.
        length: tokens of a sequence.
        seed, epoch: what the order depends on.
        fit: of the documents, to be packed by best fit; None: laid end to end.
        window: tokens among which to permute; None: all.
    """
    if window is not None:
        return _windowed(offsets, documents, window, length, seed, epoch)
    ordered = documents[permutation(len(documents), seed, epoch, 0)]
    if fit is not None:
        packed = BestFitStream(offsets, ordered, length, fit)
        return Epoch(packed, permutation(fit.sequences, seed, epoch, 1))
    stream = DocumentStream(offsets, ordered)
    return Epoch(stream, permutation(stream.num_tokens // length, seed, epoch, 1))


def _windowed(offsets: np.ndarray, documents: np.ndarray, window: int, length: int, seed: int, epoch: int) -> Epoch:
    parts = int(offsets[-1]) // PART_TOKENS + 1
    place_of_part = np.argsort(permutation(parts, seed, epoch, 2))
    group = place_of_part[offsets[documents] // PART_TOKENS] // max(1, window // PART_TOKENS)
    in_order = np.lexsort((permutation(len(documents), seed, epoch, 0), group))
    stream = DocumentStream(offsets, documents[in_order])
    # A sequence is of the group that its first token is of.
    ends = np.cumsum((offsets[documents + 1] - offsets[documents])[in_order])
    count = stream.num_tokens // length
    of_sequence = group[in_order][np.searchsorted(ends, np.arange(count) * length, side="right")]
    return Epoch(stream, np.lexsort((permutation(count, seed, epoch, 1), of_sequence)))
