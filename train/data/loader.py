"""Batches as a pure function of (seed, step): the same global batch at any number of ranks, without state."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from train.data.batch import Batch
from train.data.config import VALIDATION_FRACTION
from train.data.course import Course, Phase, Seen
from train.data.fetch_ahead import FetchAhead
from train.data.lines import Lines
from train.data.packing import IGNORED, Packed, Pieces
from train.data.reader import Source
from train.data.shards import ShardedTokens
from train.data.store import TokenStore
from train.errors import UserError

__all__ = ["IGNORED", "Batch", "Loader"]


class Loader:
    """Batches of one split of one or several token stores.

    Training: which source a sequence comes from, `train.data.course` tells, and which of that source's,
    `train.data.reader`. Validation: of one store, every token once; `batch` starts over after it. There may be none of
    it, and no batch then.

    `batch` may be called from several threads.

    Attributes:
        sources: that batches are drawn from.
        lines: of their sequences.
        steps_per_epoch: global batches of an epoch of a single source (all batches of a validation pass).
        num_tokens, num_documents: of the split, in all sources.
    """

    def __init__(
        self,
        data: TokenStore | Sequence[Source],
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
        phases: Sequence[Phase] = (),
        best_fit: bool = False,
        fetch_ahead: int = 0,
        shuffle_window: int | None = None,
    ) -> None:
        """Args: the store, or sources of one tokenizer; sizes in sequences; the seed of the order; which contiguous
        part of each batch is ours; which batches to pass over, ascending and apart: numbers from 0, as if none were;
        the phases, by default one with equal weights; whether documents of training are packed by best fit; of how many
        further steps the text is fetched, from stores by URL; tokens of training among which documents are permuted.

        Raises:
            UserError: batch sizes that do not divide, or too little text for one batch of training.
        """
        _check_sizes(global_batch_size, micro_batch_size, rank, world_size)
        self.sources = [Source("", data, 1.0)] if isinstance(data, TokenStore) else data
        self.split = split
        self.sequence_length = sequence_length
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.validation_fraction = validation_fraction
        self.best_fit = best_fit
        self._shuffle_window = shuffle_window
        self._skip = skip
        self._rows = slice(*(global_batch_size // world_size * part for part in (rank, rank + 1)))
        self.phases = phases or [Phase(0, sequence_length, (1.0,) * len(self.sources))]
        self.lines = Lines(
            self.sources,
            self.phases,
            split=split,
            seed=seed,
            batch=global_batch_size,
            validation_fraction=validation_fraction,
            best_fit=best_fit,
            window=shuffle_window,
        )
        used = [self.lines.first(source) for source in range(len(self.sources))]
        self.num_documents = sum(reader.num_documents for reader in used)
        self.num_tokens = sum(reader.num_tokens for reader in used)
        self.steps_per_epoch = sum(reader.sequences for reader in used) // global_batch_size
        self._course = Course(self.phases, global_batch_size, lambda *key: self.lines.reader(*key).sequences)
        elsewhere = any(isinstance(source.store.tokens, ShardedTokens) for source in self.sources)
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

    def batch_number(self, step: int) -> int:
        """The number of a step's batch in the order without `skip`, from 0."""
        number = step
        for skipped in self._skip:
            if number >= skipped.start:
                number += len(skipped)
        return number

    def length(self, step: int) -> int:
        """Tokens of a step's sequences."""
        return self._course.leg(self.batch_number(step)).length

    def epochs(self, steps: int) -> float:
        """Epochs that the first steps have begun, the last one in part; of a mixture, those of the source most read.

        What `skip` passes over counts as read.
        """
        return max(seen.epochs for seen in self._seen(steps))

    def seen(self, steps: int) -> dict[str, Seen]:
        """What the first steps have read of each source, by name; batches that were skipped count as read."""
        return {source.name: seen for source, seen in zip(self.sources, self._seen(steps), strict=True)}

    def _seen(self, steps: int) -> list[Seen]:
        return self._course.seen(self.batch_number(steps - 1) + 1 if steps else 0)

    def phase_starts(self, steps: int) -> list[int]:
        """The first step of each phase that begins within the first `steps`, the first phase's 0 included."""
        starts = [bisect_left(range(steps), phase.first, key=self.batch_number) for phase in self.phases]
        return [step for step in starts if step < steps]

    def where(self, step: int) -> dict[str, Any]:
        """What a step's batch is, JSON-able: its number from 1, epoch from 0, all ranks' sequences in that epoch.

        With several sources: the name, epoch and number of each sequence.
        """
        number = self.batch_number(step)
        leg = self._course.leg(number)
        source_B, line_B = self._course.locate(number, slice(0, self.global_batch_size))
        found = [self.lines.reader(source, leg.length).where(line_B[[place]]) for place, source in enumerate(source_B)]
        epochs, sequences = ([int(part[0]) for part in parts] for parts in zip(*found, strict=True))
        if len(self.sources) == 1:
            return {"batch": number + 1, "epoch": epochs[0], "sequences": sequences}
        names = [self.sources[source].name for source in source_B]
        return {"batch": number + 1, "sources": names, "epochs": epochs, "sequences": sequences}

    def _pack(self, number: int) -> tuple[Packed, np.ndarray]:
        """This rank's sequences of a batch, and the source of each."""
        length = self._course.leg(number).length
        source_B, line_B = self._course.locate(number, self._rows)
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
        source_B, line_B = self._course.locate(number, self._rows)
        for source in np.unique(source_B):
            reader = self.lines.reader(source, self._course.leg(number).length)
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

    @property
    def shares(self) -> list[float]:
        """The sources' shares of the first phase; they sum to 1."""
        whole = self._course.legs[0].mixture.shares
        return [share / sum(whole) for share in whole]

    def bytes_of(self, tokens: Tensor | np.ndarray) -> float:
        """UTF-8 bytes of text behind token ids of any shape, of the first source; IGNORED ones count nothing.

        Bits per byte = sum of losses in nats / ln 2 / bytes_of(labels).
        """
        store = self.sources[0].store
        return store.bytes_of(tokens.numpy(force=True) if isinstance(tokens, Tensor) else tokens)

    def identity(self) -> dict[str, Any]:
        """All that the global batches depend on, as a JSON object: two loaders with equal ones give equal batches.

        Ranks, micro-batches and names are no part of it.
        """
        later = [
            {"after_steps": leg.first, "sequence_length": leg.length, **self._mixed(leg.mixture.shares)}
            for leg in self._course.legs[1:]
        ]
        return {
            **self._mixed(self._course.legs[0].mixture.shares),
            "split": self.split,
            "validation_fraction": self.validation_fraction,
            "sequence_length": self.sequence_length,
            "global_batch_size": self.global_batch_size,
            "seed": self.seed,
            # Absent without any, as in what was saved before the key existed.
            **({"skip_steps": [[part.start + 1, part.stop] for part in self._skip]} if self._skip else {}),
            **({"phases": later} if later else {}),
            **({"packing": "best_fit"} if self.best_fit else {}),
            **({"shuffle_window": self._shuffle_window} if self._shuffle_window else {}),
        }

    def _mixed(self, shares: Sequence[int]) -> dict[str, Any]:
        mix = [[source.store.fingerprint, share] for source, share in zip(self.sources, shares, strict=True) if share]
        return {"fingerprint": mix[0][0]} if len(mix) == 1 else {"mix": mix}


def _check_sizes(global_batch_size: int, micro_batch_size: int, rank: int, world_size: int) -> None:
    if global_batch_size % (micro_batch_size * world_size):
        raise UserError(
            f"train.global_batch_size: {global_batch_size} sequences cannot be split over {world_size} rank(s) in "
            f"micro-batches of {micro_batch_size}: make it a multiple of {world_size * micro_batch_size}, lower "
            f"train.micro_batch_size, or start fewer ranks (--nproc)"
        )
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}")
