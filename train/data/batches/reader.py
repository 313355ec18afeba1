"""One split of a token store as an endless line of sequences, epoch after epoch."""

import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from train.data.batches.best_fit import fit, piece_counts
from train.data.batches.order import Epoch, epoch_order
from train.data.batches.packing import Packed, Pieces, pack
from train.data.stores.split import validation_mask
from train.data.stores.store import TokenStore

_EPOCHS_KEPT = 2  # a look-ahead may be in the next epoch already


@dataclass(frozen=True)
class Source:
    """A store that batches are drawn from.

    Attributes:
        name: in metrics and messages; empty for data without a mixture.
        store: its tokens.
        epochs: times that it may be repeated without a warning.
    """

    name: str
    store: TokenStore
    epochs: float


class SplitReader:
    """Sequences of one length of one split, numbered from 0 on.

    Training: every epoch permutes the documents, packs them and permutes the sequences, all keyed by (seed, epoch);
    what does not fill a sequence or, with `whole`, a global batch at the epoch's end is dropped. Validation: one fixed
    order, the same whatever the seed, that covers every token once and then starts over; padded to whole batches.

    May be called from several threads. Memory: 17 bytes a document of the store, and 16 a document and 8 a sequence for
    each of the two epochs that are kept.

    Attributes:
        sequences: of an epoch.
        num_tokens, num_documents: of the split.
        fit: of its documents with best-fit packing; None otherwise.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        split: Literal["train", "validation"],
        length: int,
        seed: int,
        validation_fraction: float,
        whole: int = 1,
        best_fit: bool = False,
        window: int | None = None,
    ) -> None:
        """Args: the store; which documents; tokens of a sequence; what the order depends on; the fraction held out;
        sequences of which an epoch has a multiple; whether documents of training are packed by best fit; tokens among
        which those are permuted, None for all."""
        self.store, self.split, self.length = store, split, length
        self._seed, self._window = seed, window if split == "train" else None
        lengths = np.diff(store.document_offsets)
        self.held_out = validation_mask(lengths, validation_fraction)
        self.documents = np.flatnonzero((self.held_out == (split == "validation")) & (lengths > 0))
        self.num_documents = len(self.documents)
        self.num_tokens = int(lengths[self.documents].sum())
        self.fit = fit(piece_counts(lengths[self.documents], length)) if best_fit and split == "train" else None
        if split == "train":
            made = self.num_tokens // length if self.fit is None else self.fit.sequences
            self.sequences = made // whole * whole
        else:
            self.sequences = -(-self.num_tokens // (length * whole)) * whole
        self._lock = threading.Lock()
        # Per instance: a cache on the method would keep dead readers alive.
        self._epoch = functools.lru_cache(_EPOCHS_KEPT)(self._make_epoch)

    def where(self, numbers_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of sequences by number: the epoch of each, and its number in the stream of that epoch; int64 [B]."""
        epoch_B, place_B = np.divmod(numbers_B, self.sequences)
        if self.split == "train":
            for epoch in np.unique(epoch_B):
                mine = epoch_B == epoch
                place_B[mine] = self.epoch(int(epoch)).sequences[place_B[mine]]
        return epoch_B, place_B

    def pack(self, numbers_B: np.ndarray) -> Packed:
        """Sequences by number, int64 [B], in any order.

        Raises:
            UserError: the store holds a token id that its tokenizer does not have, or lies elsewhere and fails.
        """
        packed = Packed(*(np.empty((len(numbers_B), self.length), np.int64) for _ in Packed._fields))
        for mine, pieces in self.pieces(numbers_B):
            part = pack(self.store.tokens, pieces, len(mine), self.length, self.store.pad_id)
            for target, values in zip(packed, part, strict=True):
                target[mine] = values
        # Prepared stores have no others; a Megatron pair opened with the wrong tokenizer may.
        self.store.check_ids(packed.tokens_BT)
        return packed

    def pieces(self, numbers_B: np.ndarray) -> Iterator[tuple[np.ndarray, Pieces]]:
        """Epoch by epoch, which of the sequences are of it, int64, and what those are packed of."""
        epoch_B, place_B = self.where(numbers_B)
        for epoch in np.unique(epoch_B):
            mine = np.flatnonzero(epoch_B == epoch)
            yield mine, self.epoch(int(epoch)).stream.pieces(place_B[mine], self.length)

    def epoch(self, number: int) -> Epoch:
        """The order of an epoch; of validation there is one."""
        # The lock keeps two threads from building the same epoch.
        with self._lock:
            return self._epoch(number if self.split == "train" else 0)

    def _make_epoch(self, epoch: int) -> Epoch:
        return epoch_order(
            self.store.document_offsets,
            self.documents,
            length=self.length,
            seed=self._seed if self.split == "train" else 0,
            epoch=epoch,
            fit=self.fit,
            window=self._window,
        )
