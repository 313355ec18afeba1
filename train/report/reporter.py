"""Shows the user what a run does: progress on the screen, the log, metrics.jsonl, Weights & Biases."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from train.config.job import JobConfig
from train.data.batches.course import Seen
from train.evaluation import Evaluation
from train.look_ahead import Choice
from train.report.meter import Measured
from train.report.metrics import MetricsLog, StepMetrics
from train.report.progress import RunProgress
from train.report.skipped import SkippedSteps
from train.report.step import StepResult
from train.run_folder import LOG_FILE
from train.run_state import StateRecord


class Reporter:
    """Reports on rank 0, and does nothing on the others; use it as a context manager.

    Args:
        job: its config.
        folder: of the run.
        start: steps that were done before.
        active: whether this is rank 0.
        state: of the run, kept up to date; None for none.
    """

    def __init__(
        self, job: JobConfig, folder: Path, *, start: int, active: bool, state: StateRecord | None = None
    ) -> None:
        self._state = state
        self._stack = ExitStack()
        self._progress: RunProgress | None = None
        if not active:
            return
        log = self._stack.enter_context((folder / LOG_FILE).open("a", encoding="utf-8"))
        self._metrics = self._stack.enter_context(
            MetricsLog(
                folder,
                resumed_step=start,
                every=job.train.log_every,
                wandb=job.wandb,
                tensorboard=job.tensorboard.enabled,
                name=job.run.name,
                job=job.model_dump(),
            )
        )
        self._skipped = SkippedSteps(folder, resumed_step=start)
        self._progress = self._stack.enter_context(RunProgress(job.train.steps, start_step=start, log=log))
        for note in self._metrics.notes:
            self.message(note)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, at)

    def advance(self, step: int) -> None:
        """A step is done."""
        if self._state:
            self._state.step = step
        if self._progress:
            self._progress.advance(step)

    def step(
        self,
        step: int,
        result: StepResult,
        measured: Measured,
        evaluation: Evaluation | None,
        epoch: float,
        seen: Mapping[str, Seen],
    ) -> None:
        """A step to be recorded, after so many epochs; `seen` is what was read of each source of a mixture."""
        if not self._progress:
            return
        metrics = StepMetrics(
            step=step,
            loss=measured.loss,
            grad_norm=result.grad_norm,
            lr=result.lr,
            tokens=measured.tokens,
            step_ms=measured.step_ms,
            tokens_per_s=measured.tokens_per_s,
            offload=measured.offload,
            val_loss=evaluation.loss if evaluation else None,
            extra={f"stages.{stage}_ms": value for stage, value in measured.stages_ms.items()}
            | {"epoch": epoch, **measured.use()}
            | _evaluated(evaluation)
            | {f"loss.{name}": loss for name, loss in measured.source_losses.items()}
            | {f"tokens.{name}": each.tokens for name, each in seen.items()}
            | {f"epoch.{name}": each.epochs for name, each in seen.items()}
            | ({"skipped_steps": self._skipped.count} if self._skipped.count else {}),
        )
        self._metrics.log(metrics)
        self._progress.update(metrics)

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        """A step that was recorded before, without the evaluation that was due."""
        if self._progress:
            self._metrics.add(step, {"val_loss": evaluation.loss} | _evaluated(evaluation))
            self.message(f"step {step}: validation loss {evaluation.loss:.4f}, which a signal had cut short")

    def saved(self, path: Path) -> None:
        """A checkpoint was written."""
        if self._state:
            self._state.saved(str(path))
        self.message(f"saved {path}")

    def chose(self, choice: Choice) -> None:
        """The run has chosen its look-ahead."""
        if self._state:
            self._state.chose(choice.depth)
        self.message(str(choice))

    def refused(self, step: int, result: StepResult, loss: float, batch: dict[str, Any]) -> None:
        """A step was not applied; `loss` is that of all ranks, `batch` what it was to train on."""
        if self._progress:
            self._skipped.add(step, result.refused or "", loss, result.grad_norm, batch)
            self.message(f"step {step} was skipped on all ranks: {result.refused}; batch {batch['batch']}")

    def message(self, text: str) -> None:
        """A line that stays on the screen and in the log."""
        if self._progress:
            self._progress.message(text)


def _evaluated(evaluation: Evaluation | None) -> dict[str, float]:
    """All of an evaluation but its loss."""
    if evaluation is None:
        return {}
    bits = {} if evaluation.bits_per_byte is None else {"val_bits_per_byte": evaluation.bits_per_byte}
    return bits | {f"val_loss.{name}": each.loss for name, each in evaluation.by_source.items()}
