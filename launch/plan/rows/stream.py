"""The tokens of a job's steps: its own text where it is here, else drawn from Zipf's law. In pieces of bounded size."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from offload.addresses.compression import identity_vocabulary
from offload.addresses.hashing import AddressBook
from train.config.job import JobConfig
from train.data.batches.loader import Loader
from train.data.blend import Blend
from train.tables import address_book, addresses_of

PIECE_TOKENS = 1 << 18


class Piece(NamedTuple):
    """Consecutive sequences of a step's global batch."""

    first: int
    """Number of the first one in the batch."""
    tokens_BT: Tensor
    positions_BT: Tensor


class Stream(Protocol):
    """Steps of tokens, each a pure function of its number."""

    @property
    def addresses(self) -> AddressBook:
        """From the tokens to rows."""

    @property
    def name(self) -> str:
        """Where the tokens come from, for people."""

    def pieces(self, step: int) -> Iterator[Piece]:
        """The step's global batch."""


@dataclass(frozen=True)
class ZipfStream:
    """Independent tokens, the k-th most frequent as often as k^-exponent; each sequence is one document.

    Text repeats its n-grams more often than independent tokens do: unique rows are an upper bound for text of the same
    frequencies.
    """

    job: JobConfig
    exponent: float

    @property
    def name(self) -> str:
        """The law, stated."""
        return f"drawn tokens, Zipf({self.exponent:g}) over {self.job.model.vocab_size:,} ids"

    @property
    def addresses(self) -> AddressBook:
        """Without compression of the vocabulary: ids are hashed as they are."""
        engram, vocabulary = self.job.model.engram, self.job.model.vocab_size
        assert engram is not None
        return addresses_of(engram, identity_vocabulary(vocabulary, pad_id=min(engram.pad_id or 0, vocabulary - 1)))

    def pieces(self, step: int) -> Iterator[Piece]:
        """See `Stream.pieces`."""
        length, total = self.job.data.sequence_length, self.job.train.global_batch_size
        share_V = np.cumsum(np.arange(1, self.job.model.vocab_size + 1, dtype=np.float64) ** -self.exponent)
        each = max(1, PIECE_TOKENS // length)
        for first in range(0, total, each):
            count = min(each, total - first)
            drawn = np.random.default_rng((self.job.train.seed, step, first)).random((count, length))
            tokens_BT = torch.from_numpy(np.searchsorted(share_V, drawn * share_V[-1]))
            yield Piece(first, tokens_BT, torch.arange(length).expand(count, length))


class TextStream:
    """The job's own text, in the order in which training would read it.

    Raises:
        UserError: too little of it for one step, or a tokenizer that does not fit.
    """

    def __init__(self, job: JobConfig) -> None:
        blend = Blend.open(job.data, job.train.global_batch_size, progress=False)
        addresses = address_book(job.model, blend.store)
        assert addresses is not None
        self.addresses = addresses
        length, sequences = job.data.sequence_length, job.train.global_batch_size
        self._loader = Loader(
            blend.sources,
            split="train",
            phases=blend.phases,
            sequence_length=length,
            global_batch_size=sequences,
            micro_batch_size=_largest_divisor(sequences, max(1, PIECE_TOKENS // length)),
            seed=job.train.seed,
            validation_fraction=job.data.validation_fraction,
            best_fit=job.data.packing == "best_fit",
            shuffle_window=job.data.shuffle_window,
        )
        self.name = f"{job.data.shown}, {self._loader.steps_per_epoch:,} steps an epoch"

    def pieces(self, step: int) -> Iterator[Piece]:
        """See `Stream.pieces`."""
        first = 0
        for batch in self._loader.batch(step):
            yield Piece(first, batch.tokens_BT, batch.positions_BT)
            first += len(batch.tokens_BT)


def open_stream(job: JobConfig, zipf: float | None) -> Stream:
    """The job's text if it is here and no law is asked for; else Zipf's with that exponent, 1.2 by default."""
    paths = [path for path in (job.data.path, *(source.path for source in job.data.mix or [])) if path is not None]
    here = bool(paths) and all(Path(path).exists() for path in paths)
    return TextStream(job) if here and zipf is None else ZipfStream(job, 1.2 if zipf is None else zipf)


def _largest_divisor(number: int, most: int) -> int:
    return max(each for each in range(1, min(number, most) + 1) if number % each == 0)
