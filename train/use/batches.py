"""Texts in batches that share a forward."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Text = TypeVar("Text")


def in_batches(texts: Iterable[Text], length: Callable[[Text], int], tokens: int) -> Iterator[list[Text]]:
    """The texts, longest first and those of one length in order, in batches of at most `tokens` with padding, or of one
    text.

    Args:
        texts: in any order.
        length: of a text, in tokens.
        tokens: of a batch, padding included.
    """
    batch: list[Text] = []
    for text in sorted(texts, key=length, reverse=True):
        if batch and (len(batch) + 1) * length(batch[0]) > tokens:
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch
