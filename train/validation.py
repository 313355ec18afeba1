"""The evaluations of a run, on all ranks together, between two steps of its training."""

from collections.abc import Iterable, Iterator

import torch.distributed as dist
from torch import Tensor

from offload.tables import EngramTables
from train.data.loader import Batch, Loader
from train.engine import Engine
from train.evaluation import Evaluation, TrainedRows, batches, evaluate, evaluating
from train.watch.watch import Watch


class Validation:
    """Evaluates a model under training.

    Args:
        engine: the backbone.
        tables: None without Engram.
        loader: of the validation split.
        sequences: how many of them are evaluated.
        watch: is told of it, and asked for signals.
    """

    def __init__(
        self, engine: Engine, tables: EngramTables | None, loader: Loader, sequences: int, watch: Watch
    ) -> None:
        self._engine, self._tables, self._loader = engine, tables, loader
        self._sequences, self._watch = sequences, watch

    def evaluate(self) -> Evaluation | None:
        """Evaluates the model as it is; None if there is nothing to predict. Collective."""
        return Evaluation.of(self._sums(batches(self._loader, self._sequences)))

    def evaluate_or_end(self) -> tuple[Evaluation | None, int]:
        """The same, unless a signal comes meanwhile, which is then returned instead. Collective."""
        signum = 0

        def until_signal() -> Iterator[Batch]:
            nonlocal signum
            for batch in batches(self._loader, self._sequences):
                self._watch.ask()
                yield batch
                signum = self._watch.answer().signum
                if signum:
                    return

        sums = self._sums(until_signal())
        return None if signum else Evaluation.of(sums), signum

    def _sums(self, text: Iterable[Batch]) -> Tensor:
        """Those of `evaluate`, over all ranks."""
        engine, loader = self._engine, self._loader
        rows = TrainedRows(self._tables) if self._tables else None
        with evaluating(engine.module):
            sums = evaluate(engine, rows, self._watch.each("evaluate", text), loader.bytes_of, engine.device)
        sums = sums.to(engine.device)
        dist.all_reduce(sums)
        return sums
