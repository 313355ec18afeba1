"""A deterministic sample of a stream of texts, in bounded memory."""

import itertools
from collections.abc import Iterable, Iterator

import numpy as np


def sample_texts(texts: Iterable[str], max_chars: int) -> list[str]:
    """Texts of at most about `max_chars` characters in all, spread evenly over the stream, in its order.

    Each text has a fixed pseudo-random rank (of its number in the stream). Those below a threshold are kept, and the
    threshold is halved whenever they grow beyond the limit: no total is needed beforehand. A short stream is kept
    whole.
    """
    kept: list[tuple[int, str]] = []
    chars = 0
    threshold = 1 << 64
    for rank, text in zip(_ranks(), texts, strict=False):
        if rank >= threshold:
            continue
        kept.append((rank, text))
        chars += len(text)
        while chars > max_chars and len(kept) > 1:
            threshold //= 2
            kept = [(rank, text) for rank, text in kept if rank < threshold] or kept[:1]
            chars = sum(len(text) for _, text in kept)
    return [text[:max_chars] for _, text in kept]


def _ranks() -> Iterator[int]:
    for start in itertools.count(0, 4096):
        yield from hash_numbers(np.arange(start, start + 4096)).tolist()


def hash_numbers(numbers_N: np.ndarray) -> np.ndarray:
    """A fixed pseudo-random uint64 for every uint64 (splitmix64's output function; Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        mixed = (numbers_N.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))
