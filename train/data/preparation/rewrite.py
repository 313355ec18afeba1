"""New stores of the documents of others: several joined, or one split by document."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from train.data.preparation.encode import Chunk
from train.data.preparation.writer import StoreWriter
from train.data.stores.indexed import token_dtype
from train.data.stores.manifest import Manifest, Option
from train.data.stores.split import validation_mask
from train.data.stores.store import TokenStore
from train.data.tokenization.tokenizer import Tokenizer
from train.errors import UserError
from train.files import new_folder

_PIECE = 1 << 22
"""Tokens in memory at a time."""


def merge(stores: Sequence[TokenStore], out: Path, *, overwrite: bool = False) -> Manifest:
    """Joins stores of one tokenizer, one after another, into a prepared folder.

    Its tokens and documents are those of preparing all their sources at once, and so is its fingerprint.

    Raises:
        UserError: stores of several tokenizers, or `out` in use.
    """
    first = stores[0]
    for store in stores[1:]:
        if store.tokenizer_sha256 != first.tokenizer_sha256 or store.eos_id != first.eos_id:
            raise UserError(
                f"{store.prefix}: made with another tokenizer than {first.prefix}; prepare it again with it"
            )
    with new_folder(out, overwrite=overwrite) as folder, StoreWriter(folder, _tokenizer(first)) as writer:
        for store in stores:
            _copy(store, np.ones(store.num_documents, dtype=bool), writer)
        passed_over: dict[str, int] = {}
        for kind, count in (item for store in stores for item in _made(store).passed_over.items()):
            passed_over[kind] = passed_over.get(kind, 0) + count
        return writer.finish(
            bad=sum(_made(store).bad for store in stores),
            passed_over=passed_over,
            sources=[name for store in stores for name in _made(store).sources],
            options={"merged": len(stores)},
        )


def split(
    store: TokenStore, held_out: Path, rest: Path, fraction: float, *, overwrite: bool = False
) -> tuple[Manifest, Manifest]:
    """Writes the documents that training would hold out with this `data.validation_fraction`, and the others.

    Both folders appear, or none.

    Raises:
        UserError: nothing would be held out, nothing left, or a folder is in use, or is or holds the other.
    """
    one, other = held_out.resolve(), rest.resolve()
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise UserError(f"{held_out} and {rest}: the two parts need folders of their own, neither in the other")
    chosen = validation_mask(np.diff(store.document_offsets), fraction)
    if not chosen.any() or chosen.all():
        raise UserError(f"{store.prefix}: {fraction:g} of {store.num_documents:,} document(s) leaves one side empty")
    found = []
    with ExitStack() as stack:
        for out, mask in ((held_out, chosen), (rest, ~chosen)):
            folder = stack.enter_context(new_folder(out, overwrite=overwrite))
            with StoreWriter(folder, _tokenizer(store)) as writer:
                _copy(store, mask, writer)
                side = "held out" if mask is chosen else "rest"
                options: dict[str, Option] = {"split_of": store.fingerprint, "fraction": str(fraction), "side": side}
                found.append(writer.finish(bad=0, passed_over={}, sources=_made(store).sources, options=options))
    return found[0], found[1]


class _Made:
    """What a plain pair does not tell of how it was made."""

    def __init__(self, store: TokenStore) -> None:
        self.passed_over: dict[str, int] = {}
        self.sources, self.bad, self.empty, self.text_bytes = [str(store.prefix)], 0, 0, None


def _made(store: TokenStore) -> "Manifest | _Made":
    return store.manifest or _Made(store)


def _tokenizer(store: TokenStore) -> Tokenizer:
    """The store's, under the name that its manifest has."""
    tokenizer = store.tokenizer()
    if store.manifest is not None:
        tokenizer.name = store.manifest.tokenizer
    return tokenizer


def _copy(store: TokenStore, chosen: np.ndarray, writer: StoreWriter) -> None:
    """Appends the chosen documents; of a whole store also what it says of its text."""
    made, whole = _made(store), bool(chosen.all())
    dtype = token_dtype(writer.tokenizer.vocab_size)
    for tokens, lengths in _pieces(store, chosen):
        text_bytes = 0 if whole and made.text_bytes is not None else round(store.bytes_of(tokens))
        writer.append(Chunk(tokens.astype(dtype, copy=False), lengths, 0, text_bytes))
    if whole and made.text_bytes is not None:
        writer.append(Chunk(np.empty(0, dtype), np.empty(0, np.int32), made.empty, made.text_bytes))


def _pieces(store: TokenStore, chosen: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens of runs of chosen documents, in bounded pieces; the lengths of documents come with their run's first."""
    offsets = store.document_offsets
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8)))
    for first, end in zip(edges[::2], edges[1::2], strict=True):
        lengths = np.diff(offsets[first : end + 1]).astype(np.int32)
        for begin in range(int(offsets[first]), max(int(offsets[end]), int(offsets[first]) + 1), _PIECE):
            yield store.tokens[begin : min(begin + _PIECE, int(offsets[end]))], lengths
            lengths = lengths[:0]
