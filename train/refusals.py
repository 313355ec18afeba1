"""Steps that are not applied: why, and what comes of it."""

import math
from collections.abc import Callable, Iterable

import torch.distributed as dist
from torch import Tensor

from train.config.job import TrainConfig
from train.data.batches.loader import Loader
from train.errors import UserError
from train.report.reporter import Reporter
from train.report.step import StepResult
from train.spikes import Spikes, Update


class Refusals:
    """Judges steps. All ranks give the same numbers, so all come to the same verdict.

    Args:
        config: the `train` section.
        loader: of the split that is trained on, which knows what was in a batch.
        reporter: is told of them.
        recent: updates that steps are compared with.

    Attributes:
        in_a_row: how many of the last steps changed nothing.
    """

    def __init__(self, config: TrainConfig, loader: Loader, reporter: Reporter, recent: Iterable[Update]) -> None:
        self._config, self._loader, self._reporter = config, loader, reporter
        self._spikes = None
        if config.on_spike != "ignore":
            self._spikes = Spikes(config.spike_sigma, config.spike_window, recent)
        self.in_a_row = 0

    @property
    def need_loss(self) -> bool:
        """Whether `judge` needs the loss."""
        return self._spikes is not None

    @property
    def recent(self) -> list[Update]:
        """The updates that steps are compared with, oldest first."""
        return self._spikes.recent if self._spikes else []

    def judge(self, loss: float, norm: float) -> str | None:
        """Why a step is not applied, from the loss of all ranks and the gradient's norm; None if it is.

        One that is applied joins the updates that later steps are compared with.
        """
        if not math.isfinite(norm):
            return "its gradient is not finite"
        if self._spikes is None:
            return None
        if why := self._spikes.why(loss, norm):
            return why
        self._spikes.add(loss, norm)
        return None

    def tell(self, step: int, result: StepResult, save: Callable[[int], str]) -> None:
        """Reports a step that was not applied, and ends the run where the config wants it. Collective.

        Args:
            step: counted from 0.
            result: the step's.
            save: called with the step before the run ends; returns what it has saved, in words.
        """
        if result.refused is None:
            self.in_a_row = 0
            return
        config, loader, number = self._config, self._loader, step + 1
        self._reporter.refused(number, result, float(everyones(result.loss)), loader.where(step))
        key = "on_spike" if math.isfinite(result.grad_norm) else "on_non_finite"
        if getattr(config, key) == "stop":
            batch = loader.batch_number(step) + 1
            raise UserError(
                f"train.{key} is stop, and step {number} was not applied: {result.refused}{save(step)}; "
                f"data.skip_steps=[[{batch},{batch}]] data.allow_change=true passes over its batch"
            )
        self.in_a_row += 1
        if self.in_a_row > config.max_skipped_steps:
            raise UserError(
                f"train.max_skipped_steps: {self.in_a_row} steps in a row were skipped, the last one step {number}: "
                f"{result.refused}; lower optimizer.learning_rate or raise schedule.warmup_steps"
            )


def everyones(loss: Tensor) -> Tensor:
    """The sum of all ranks' parts of a loss. Collective."""
    total = loss.clone()
    dist.all_reduce(total)
    return total
