"""Batches as a pure function of (seed, step): the same global batch at any number of ranks, without state."""

import functools
import threading
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from train.data.batch import Batch
from train.data.config import VALIDATION_FRACTION
from train.data.order import Epoch, epoch_order
from train.data.packing import IGNORED, Packed
from train.data.split import validation_mask
from train.data.statistics import unigram_entropy
from train.data.store import TokenStore
from train.errors import UserError

__all__ = ["IGNORED", "Batch", "Loader"]

_EPOCHS_KEPT = 2  # a look-ahead may be in the next epoch already


class Loader:
    """Batches of one split of a token store.

    Training: every epoch permutes the documents, packs them and permutes the sequences, all keyed by (seed, epoch);
    what does not fill a sequence or a global batch at the epoch's end is dropped. Validation: one fixed order, the
    same whatever the seed, that covers every token once; the last global batch is padded, and `batch` starts over
    after it. There may be none of it, and no batch then.

    `batch` may be called from several threads. Memory: 17 bytes a document of the store,
    and 16 a document and 8 a sequence for each of the two epochs that are kept.

    Attributes:
        steps_per_epoch: global batches of an epoch (all batches of a validation pass).
        num_tokens, num_documents: of the split.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        split: Literal["train", "validation"],
        sequence_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        validation_fraction: float = VALIDATION_FRACTION,
        skip: Sequence[range] = (),
    ) -> None:
        """Args: the store; sizes in sequences; the seed of the order; which contiguous part of each batch is ours;
        which batches to pass over, ascending and apart: numbers from 0, as if none were.

        Raises:
            UserError: batch sizes that do not divide, or too little text for one batch of training.
        """
        _check_sizes(global_batch_size, micro_batch_size, rank, world_size)
        self.store = store
        self.split = split
        self.sequence_length = sequence_length
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.validation_fraction = validation_fraction
        self._skip = skip
        self._rows = slice(*(global_batch_size // world_size * part for part in (rank, rank + 1)))
        lengths = np.diff(store.document_offsets)
        self._held_out = validation_mask(lengths, validation_fraction)
        self._documents = np.flatnonzero((self._held_out == (split == "validation")) & (lengths > 0))
        self.num_documents = len(self._documents)
        self.num_tokens = int(lengths[self._documents].sum())
        sequences = self.num_tokens // sequence_length
        if split == "train":
            self.steps_per_epoch = sequences // global_batch_size
        else:
            self.steps_per_epoch = -(-self.num_tokens // (sequence_length * global_batch_size))
        self._refuse_empty(sequences)
        self._lock = threading.Lock()
        # Per instance: a cache on the method would keep dead loaders alive.
        self._epoch = functools.lru_cache(_EPOCHS_KEPT)(self._make_epoch)

    def _refuse_empty(self, sequences: int) -> None:
        if self.split == "train" and self.steps_per_epoch == 0:
            raise UserError(
                f"too little text: the training split has {self.num_tokens:,} tokens in {self.num_documents:,} "
                f"document(s), {sequences:,} sequences of {self.sequence_length}; one step takes "
                f"{self.global_batch_size}. Add text, shorten data.sequence_length or lower the batch size"
            )

    def batch(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step (from 0), in the order to be run.

        Raises:
            ValueError: a negative step.
            UserError: the store holds a token id that its tokenizer does not have.
        """
        if step < 0:
            raise ValueError(f"step {step} is negative")
        packed = self._pack(step)
        size = self.micro_batch_size
        arrays = [torch.from_numpy(array).split(size) for array in packed]
        return [Batch(*parts) for parts in zip(*arrays, strict=True)]

    def batch_number(self, step: int) -> int:
        """The number of a step's batch in the order without `skip`, from 0."""
        number = step
        for skipped in self._skip:
            if number >= skipped.start:
                number += len(skipped)
        return number

    def epochs(self, steps: int) -> float:
        """Epochs that so many steps go through; what `skip` passes over counts."""
        return (self.batch_number(steps - 1) + 1) / self.steps_per_epoch if steps else 0.0

    def where(self, step: int) -> dict[str, Any]:
        """What a step's batch is, JSON-able: its number from 1, epoch from 0, all ranks' sequences in that epoch."""
        epoch, _, numbers = self._sequences(step)
        return {"batch": self.batch_number(step) + 1, "epoch": epoch, "sequences": numbers.tolist()}

    def _sequences(self, step: int) -> tuple[int, Epoch, np.ndarray]:
        """The epoch of a step's global batch, its order, and the numbers of the sequences in its stream."""
        epoch, index = divmod(self.batch_number(step), self.steps_per_epoch)
        begin = index * self.global_batch_size
        numbers = np.arange(begin, begin + self.global_batch_size)
        # The lock keeps two threads from building the same epoch.
        with self._lock:
            order = self._epoch(epoch if self.split == "train" else 0)
        return epoch, order, order.sequences[numbers] if self.split == "train" else numbers

    def _pack(self, step: int) -> Packed:
        _, order, numbers = self._sequences(step)
        numbers = numbers[self._rows]
        packed = order.stream.pack(numbers, self.sequence_length, self.store.pad_id)
        self._check_ids(packed.tokens_BT)
        return packed

    def _make_epoch(self, epoch: int) -> Epoch:
        return epoch_order(
            self.store.tokens,
            self.store.document_offsets,
            self._documents,
            length=self.sequence_length,
            seed=self.seed if self.split == "train" else 0,
            epoch=epoch,
        )

    def _check_ids(self, tokens_BT: np.ndarray) -> None:
        # Prepared stores cannot; a Megatron pair opened with the wrong tokenizer can.
        if tokens_BT.min() < 0 or tokens_BT.max() >= self.store.vocab_size:
            bad = int(tokens_BT.max() if tokens_BT.min() >= 0 else tokens_BT.min())
            raise UserError(
                f"{self.store.prefix}: token id {bad} is not in the tokenizer's {self.store.vocab_size} entries; "
                f"was another tokenizer used to make the tokens?"
            )

    def unigram_entropy(self, labels: Tensor | None = None) -> float:
        """Nats a token of `labels` under the training split's token frequencies (add-one smoothing).

        A model below it has learned more than frequencies. IGNORED labels count nothing; None stands for the whole
        validation split, which is then read.

        Raises:
            ValueError: there is no validation split.
        """
        store = self.store
        priced = None if labels is None else labels[labels != IGNORED].numpy(force=True)
        return unigram_entropy(store.tokens, store.document_offsets, self._held_out, store.vocab_size, labels=priced)

    def bytes_of(self, tokens: Tensor | np.ndarray) -> float:
        """UTF-8 bytes of text behind token ids of any shape; IGNORED ones count nothing.

        Bits per byte = sum of losses in nats / ln 2 / bytes_of(labels).
        """
        return self.store.bytes_of(tokens.numpy(force=True) if isinstance(tokens, Tensor) else tokens)

    def identity(self) -> dict[str, Any]:
        """All that the global batches depend on, JSON-able: two loaders with equal identities give equal batches.

        Ranks and micro-batches are no part of it.
        """
        return {
            "fingerprint": self.store.fingerprint,
            "split": self.split,
            "validation_fraction": self.validation_fraction,
            "sequence_length": self.sequence_length,
            "global_batch_size": self.global_batch_size,
            "seed": self.seed,
            # Not there without any, as in what was saved before there were some.
            **({"skip_steps": [[part.start + 1, part.stop] for part in self._skip]} if self._skip else {}),
        }


def _check_sizes(global_batch_size: int, micro_batch_size: int, rank: int, world_size: int) -> None:
    if global_batch_size % (micro_batch_size * world_size):
        raise UserError(
            f"train.global_batch_size: {global_batch_size} sequences cannot be split over {world_size} rank(s) in "
            f"micro-batches of {micro_batch_size}: make it a multiple of {world_size * micro_batch_size}, lower "
            f"train.micro_batch_size, or start fewer ranks (--nproc)"
        )
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}")
