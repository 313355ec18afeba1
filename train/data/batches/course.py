"""The course of a run's data: which sequence of which source each batch has, phase by phase.

A phase begins with a batch and lasts until the next one's first. Within a run a source is one endless line of sequences
(`train.data.batches.reader`): a phase goes on in it where the phase before has left off, whatever the mixtures.
Sequences of another length are other sequences: the source then begins its next epoch.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from train.data.batches.mixture import Mixture


class Phase(NamedTuple):
    """A part of a run."""

    first: int
    """Number of its first batch, from 0."""
    length: int
    """Tokens of a sequence."""
    weights: tuple[float, ...]
    """Of the sources; 0 for one that is not read."""


class Seen(NamedTuple):
    """What a run has read of a source."""

    tokens: int
    epochs: float
    """Epochs begun, the last one in part."""


class Leg(NamedTuple):
    """A phase, and what was read before it."""

    first: int
    length: int
    mixture: Mixture
    bases: list[int]
    """The number of each source's first sequence in it."""
    tokens: list[int]
    """Read of each source before it."""


class Course:
    """Phases laid one after another.

    Args:
        phases: in their order; the first begins with batch 0.
        batch: sequences of a batch.
        epoch: sequences of an epoch of a source (by its number), at a length.
    """

    def __init__(self, phases: Sequence[Phase], batch: int, epoch: Callable[[int, int], int]) -> None:
        self._batch, self._epoch = batch, epoch
        self.legs: list[Leg] = []
        for phase in phases:
            sources = range(len(phase.weights))
            bases, tokens = [0 for _ in sources], [0 for _ in sources]
            if self.legs:
                before = self.legs[-1]
                bases, tokens = self._after(before, phase.first)
                if before.length != phase.length:
                    bases = [-(-base // epoch(s, before.length)) * epoch(s, phase.length) if base else 0
                             for s, base in enumerate(bases)]  # fmt: skip
            self.legs.append(Leg(phase.first, phase.length, Mixture(phase.weights), bases, tokens))

    def leg(self, batch: int) -> Leg:
        """The phase that a batch is of."""
        return next(leg for leg in reversed(self.legs) if leg.first <= batch)

    def locate(self, batch: int, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """The source of each of a batch's sequences `rows`, and its number in that source's line; both int64 [B]."""
        leg = self.leg(batch)
        begin = (batch - leg.first) * self._batch
        source_B, index_B = leg.mixture.locate(np.arange(begin + rows.start, begin + rows.stop))
        return source_B, index_B + np.array(leg.bases)[source_B]

    def seen(self, batches: int) -> list[Seen]:
        """What the first batches have read of each source."""
        leg = self.leg(max(0, batches - 1))
        bases, tokens = self._after(leg, batches)
        return [
            Seen(read, base / self._epoch(source, leg.length) if base else 0.0)
            for source, (base, read) in enumerate(zip(bases, tokens, strict=True))
        ]

    def _after(self, leg: Leg, batches: int) -> tuple[list[int], list[int]]:
        counts = leg.mixture.counts((batches - leg.first) * self._batch)
        bases = [base + count for base, count in zip(leg.bases, counts, strict=True)]
        return bases, [read + count * leg.length for read, count in zip(leg.tokens, counts, strict=True)]
