"""The evaluations of a run, on all ranks together, between two steps of its training."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist

from offload.tables import EngramTables
from train.data.batches.batch import Batch
from train.engine import Engine
from train.evaluation import Evaluation, batches, evaluate, evaluating
from train.loaders import HeldOut
from train.row_source import TrainedRows
from train.watch.watch import Watch


class Validation:
    """Evaluates a model under training.

    Args:
        engine: the backbone.
        tables: None without Engram.
        held_out: of each source.
        sequences: how many of each are evaluated.
        watch: told of it, and asked for signals.
    """

    def __init__(
        self, engine: Engine, tables: EngramTables | None, held_out: Sequence[HeldOut], sequences: int, watch: Watch
    ) -> None:
        self._engine, self._tables, self._held_out = engine, tables, held_out
        self._sequences, self._watch = sequences, watch

    def evaluate(self) -> Evaluation | None:
        """Evaluates the model as it is; None if there is nothing to predict. Collective."""
        return self._evaluated(lambda text: text)

    def evaluate_or_end(self) -> tuple[Evaluation | None, int]:
        """The same, unless a signal comes meanwhile, which is then returned instead. Collective."""
        signum = 0

        def until_signal(text: Iterable[Batch]) -> Iterator[Batch]:
            nonlocal signum
            for batch in () if signum else text:
                self._watch.ask()
                yield batch
                signum = self._watch.answer().signum
                if signum:
                    return

        found = self._evaluated(until_signal)
        return None if signum else found, signum

    def _evaluated(self, until: Callable[[Iterable[Batch]], Iterable[Batch]]) -> Evaluation | None:
        """Of what `until` lets through, over all ranks."""
        engine = self._engine
        rows = TrainedRows(self._tables) if self._tables else None
        sums = torch.zeros(len(self._held_out), 3, dtype=torch.float64)
        with evaluating(engine.module):
            for part, (_, _, loader) in zip(sums, self._held_out, strict=True):
                text = self._watch.each("evaluate", until(batches(loader, self._sequences)))
                part += evaluate(engine, rows, text, loader.bytes_of, engine.device)
        sums = sums.to(engine.device)
        dist.all_reduce(sums)
        parts = [(name, share, part) for (name, share, _), part in zip(self._held_out, sums.cpu(), strict=True)]
        return Evaluation.of_sources(parts)
