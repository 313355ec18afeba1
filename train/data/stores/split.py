"""Which documents are held out for validation."""

import numpy as np

from train.data.stores.sample import hash_numbers


def validation_mask(lengths_N: np.ndarray, fraction: float) -> np.ndarray:
    """True for the documents held out for validation: bool [N].

    A document's side depends only on its number in the store: on no seed, and it stays when documents are appended.
    With at least two documents that have tokens and a fraction above 0, each side gets at least one of them.

    Args:
        lengths_N: tokens of each document in the store.
        fraction: expected share of documents held out, 0 to 1.
    """
    rank_N = hash_numbers(np.arange(len(lengths_N)))
    mask_N = rank_N < np.uint64(min(int(fraction * 2**64), 2**64 - 1))
    used = np.flatnonzero(lengths_N)
    if fraction <= 0 or len(used) < 2:
        return np.zeros(len(lengths_N), dtype=bool)
    if not mask_N[used].any():
        mask_N[used[np.argmin(rank_N[used])]] = True
    if mask_N[used].all():
        mask_N[used[np.argmax(rank_N[used])]] = False
    return mask_N
