"""What a model that only knows token frequencies would score: the mark that a training run must beat."""

import math
from collections.abc import Sequence

import numpy as np

from train.data.stores.shards import Tokens

_CHUNK = 1 << 22


def unigram_entropy(
    tokens: Tokens,
    offsets: np.ndarray,
    validation: np.ndarray,
    vocab_size: int,
    *,
    labels: np.ndarray | None = None,
    max_train_tokens: int = 200_000_000,
) -> float:
    """Cross-entropy of the validation documents under the training documents' token frequencies, in nats per token.

    Counted over predicted tokens, as the loss is: every token but the first of each document. Add-one smoothing, so
    that tokens absent from training have a price.

    Args:
        tokens, offsets: of the store.
        validation: bool, one for each document.
        vocab_size: entries of the vocabulary.
        labels: the predicted tokens to price, none negative; None: all of the validation documents, which reads them.
        max_train_tokens: for large corpora, training frequencies are taken from about this many tokens spread over it.

    Raises:
        ValueError: nothing is predicted in the validation documents.
    """
    train, held_out = _counts(tokens, offsets, validation, vocab_size, labels, max_train_tokens)
    if not held_out.sum():
        raise ValueError("the validation documents have no token to predict")
    log_p = np.log(train + 1) - math.log(train.sum() + vocab_size)
    return float(-(held_out * log_p).sum() / held_out.sum())


def mixed_entropy(
    texts: Sequence[tuple[Tokens, np.ndarray, np.ndarray]],
    shares: Sequence[float],
    vocab_size: int,
    *,
    source: int,
    labels: np.ndarray | None = None,
    max_train_tokens: int = 200_000_000,
) -> float:
    """The same for one of several sources, under the frequencies of their mixture.

    Args:
        texts: tokens, offsets and validation mask of each source.
        shares: of the sources, with the sum 1.
        vocab_size, labels, max_train_tokens: as for `unigram_entropy`.
        source: whose validation documents are priced.

    Raises:
        ValueError: nothing is predicted in them.
    """
    mixed = np.zeros(vocab_size)
    priced = np.bincount(np.empty(0, np.int64) if labels is None else labels, minlength=vocab_size)
    for number, (text, share) in enumerate(zip(texts, shares, strict=True)):
        wanted = labels is None and number == source
        train, held_out = _counts(*text, vocab_size, None if wanted else np.empty(0, np.int64), max_train_tokens)
        mixed += share * (train + 1) / (train.sum() + vocab_size)
        priced += held_out
    if not priced.sum():
        raise ValueError("the validation documents have no token to predict")
    return float(-(priced * np.log(mixed)).sum() / priced.sum())


def _counts(
    tokens: Tokens,
    offsets: np.ndarray,
    validation: np.ndarray,
    vocab_size: int,
    labels: np.ndarray | None,
    max_train_tokens: int,
) -> tuple[np.ndarray, np.ndarray]:
    """How often each token is predicted in training documents, and in `labels` or the validation documents."""
    stride = max(1, len(tokens) // max_train_tokens)
    train = np.zeros(vocab_size, dtype=np.int64)
    held_out = np.bincount(np.empty(0, np.int64) if labels is None else labels, minlength=vocab_size)
    # What is not counted is not read: it may lie elsewhere.
    for begin in range(0, len(tokens), _CHUNK if labels is None else _CHUNK * stride):
        part = tokens[begin : begin + _CHUNK]
        side = _sides(offsets, validation, begin, begin + len(part))
        if labels is None:
            held_out += np.bincount(part[side == 1], minlength=vocab_size)
        if begin // _CHUNK % stride == 0:
            train += np.bincount(part[side == 0], minlength=vocab_size)
    return train, held_out


def _sides(offsets: np.ndarray, validation: np.ndarray, begin: int, end: int) -> np.ndarray:
    """The side of each token of a range: 0 training, 1 validation, 2 first of its document."""
    document = int(np.searchsorted(offsets, begin, side="right")) - 1
    last = int(np.searchsorted(offsets, end, side="left"))
    bounds = np.clip(offsets[document : last + 1], begin, end)
    side = np.repeat(validation[document:last].astype(np.int8), np.diff(bounds))
    first = offsets[document:last]
    side[first[(first >= begin) & (first < end)] - begin] = 2
    return side
