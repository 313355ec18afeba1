"""Batches as a pure function of (seed, step): the same global batch at any number of ranks, without state."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.data.batches.batch import Batch
from train.data.batches.fetch_ahead import FetchAhead
from train.data.batches.packing import IGNORED, Packed, Pieces
from train.data.batches.reader import Source
from train.data.batches.timetable import Timetable
from train.data.stores.shards import ShardedTokens
from train.data.stores.store import TokenStore
from train.errors import UserError

__all__ = ["IGNORED", "Batch", "Loader"]


class Loader(Timetable):
    """Batches of one split of one or several token stores.

    Training: which source a sequence comes from, `train.data.batches.course` tells, and which of that source's,
    `train.data.batches.reader`. Validation: of one store, every token once; `batch` starts over after it. There may be
    none of it, and no batch then.

    `batch` may be called from several threads.
    """

    def __init__(
        self,
        data: TokenStore | Sequence[Source],
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        fetch_ahead: int = 0,
        **more: Any,
    ) -> None:
        """Args: the store, or sources of one tokenizer; sizes in sequences; which contiguous part of each batch is
        ours; of how many further steps the text is fetched, from stores by URL; and those of `Timetable`.

        Raises:
            UserError: batch sizes that do not divide, or too little text for one batch of training.
        """
        _check_sizes(global_batch_size, micro_batch_size, rank, world_size)
        sources = [Source("", data, 1.0)] if isinstance(data, TokenStore) else data
        super().__init__(sources, global_batch_size=global_batch_size, **more)
        self.micro_batch_size = micro_batch_size
        self._rows = slice(*(global_batch_size // world_size * part for part in (rank, rank + 1)))
        elsewhere = any(isinstance(source.store.tokens, ShardedTokens) for source in sources)
        self._ahead = FetchAhead(self._fetched_pieces, fetch_ahead if elsewhere else 0)

    def batch(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step (from 0), in the order to be run.

        Raises:
            ValueError: a negative step.
            UserError: the store holds a token id that its tokenizer does not have, or lies elsewhere and fails.
        """
        if step < 0:
            raise ValueError(f"step {step} is negative")
        self._ahead.reach(step)
        packed, source_B = self._pack(self.batch_number(step))
        size = self.micro_batch_size
        arrays = [*packed, source_B] if len(self.sources) > 1 else packed
        return [Batch(*parts) for parts in zip(*(torch.from_numpy(each).split(size) for each in arrays), strict=True)]

    def _pack(self, number: int) -> tuple[Packed, np.ndarray]:
        """This rank's sequences of a batch, and the source of each."""
        length = self.course.leg(number).length
        source_B, line_B = self.course.locate(number, self._rows)
        parts = {
            source: self.lines.reader(source, length).pack(line_B[source_B == source]) for source in np.unique(source_B)
        }
        if len(parts) == 1:
            return next(iter(parts.values())), source_B
        packed = Packed(*(np.empty((len(source_B), length), np.int64) for _ in Packed._fields))
        for source, part in parts.items():
            for target, values in zip(packed, part, strict=True):
                target[source_B == source] = values
        return packed, source_B

    def _fetched_pieces(self, step: int) -> Iterator[tuple[ShardedTokens, Pieces]]:
        """What a step reads of sources that lie elsewhere."""
        number = self.batch_number(step)
        source_B, line_B = self.course.locate(number, self._rows)
        for source in np.unique(source_B):
            reader = self.lines.reader(source, self.course.leg(number).length)
            if isinstance(reader.store.tokens, ShardedTokens):
                for _, pieces in reader.pieces(line_B[source_B == source]):
                    yield reader.store.tokens, pieces

    def unigram_entropy(self, labels: Tensor | None = None, *, source: int = 0) -> float:
        """Nats a token of `labels` under the training split's token frequencies (add-one smoothing).

        A model below it has learned more than frequencies, which with several sources are those of the first phase's
        mixture. IGNORED labels count nothing; None stands for the whole validation split of `source`, which is then
        read.

        Raises:
            ValueError: there is no validation split.
        """
        priced = None if labels is None else labels[labels != IGNORED].numpy(force=True)
        return self.lines.unigram_entropy(self.shares, source, priced)

    def bytes_of(self, tokens: Tensor | np.ndarray) -> float:
        """UTF-8 bytes of text behind token ids of any shape, of the first source; IGNORED ones count nothing.

        Bits per byte = sum of losses in nats / ln 2 / bytes_of(labels).
        """
        store = self.sources[0].store
        return store.bytes_of(tokens.numpy(force=True) if isinstance(tokens, Tensor) else tokens)


def _check_sizes(global_batch_size: int, micro_batch_size: int, rank: int, world_size: int) -> None:
    if global_batch_size % (micro_batch_size * world_size):
        raise UserError(
            f"train.global_batch_size: {global_batch_size} sequences cannot be split over {world_size} rank(s) in "
            f"micro-batches of {micro_batch_size}: make it a multiple of {world_size * micro_batch_size}, lower "
            f"train.micro_batch_size, or start fewer ranks (--nproc)"
        )
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}")
