"""The training loop."""

import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from model.balance import reset_counts, update_balance
from offload.step import Step
from offload.tables import EngramTables, WindowTooSmall
from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.together import Failed
from train.config.job import JobConfig
from train.data.loader import Batch, Loader
from train.engine import Engine
from train.errors import UserError
from train.evaluation import Evaluation, TrainedRows, batches, evaluate, evaluating, forward, memory_of
from train.optim.clipping import clip_scale
from train.optim.schedule import lr_factor
from train.report.meter import Meter
from train.report.profile import StepProfiler
from train.report.reporter import Reporter
from train.report.step import StepResult

_WORTH_TELLING_S = 1.0
"""That a save waited for the one before."""


class Trainer:
    """Takes a job from step `start` to its end.

    Args:
        job: its config.
        engine: the backbone under DeepSpeed.
        tables: the Engram tables; None for a model without.
        train_loader, validation_loader: the two splits.
        checkpoints: where states are saved.
        reporter: told of everything that a user may want to see.
        profiler: of some steps; None for none.
    """

    def __init__(
        self,
        job: JobConfig,
        *,
        engine: Engine,
        tables: EngramTables | None,
        train_loader: Loader,
        validation_loader: Loader,
        checkpoints: Checkpoints,
        reporter: Reporter,
        profiler: StepProfiler | None = None,
    ) -> None:
        self._job, self._engine, self._tables = job, engine, tables
        self._profiler = profiler or StepProfiler(None, Path(), engine.device)
        self._train_loader, self._validation_loader = train_loader, validation_loader
        self._checkpoints, self._reporter = checkpoints, reporter
        self._skipped_in_a_row = 0
        self._meter = Meter(job.train.global_batch_size * job.data.sequence_length, tables, engine.device)

    def fit(self, start: int) -> Evaluation:
        """Trains steps `start` to the last, and returns the evaluation at the end. Collective.

        Raises:
            UserError: too many steps in a row without a finite gradient, or a window that a step does not fit into.
            Failed: the last checkpoint cannot be written; without an earlier one training goes on.
        """
        with _what_is_built_uncollected():
            try:
                evaluation = self._fit(start)
            except UserError:
                # Raised on all ranks alike: a save under way can come to its end.
                self._tell_saves(wait=True)
                raise
        self._profiler.close()
        return evaluation or self.evaluate()

    def _fit(self, start: int) -> Evaluation | None:
        """The steps; returns the last one's evaluation, or None if nothing was left to train."""
        job, total = self._job, self._job.train.steps
        evaluation = None
        for step in range(start, total):
            with self._profiler.step(step + 1):
                result = self._train_step_or_save(step)
            done = step + 1
            self._meter.count(result.loss)
            self._check_skips(step, result)
            due = done % job.eval.every == 0 or done == total
            if due or done % job.train.log_every == 0:
                measured = self._meter.measure()
                evaluation = self.evaluate() if due else None
                self._reporter.step(done, result, measured, evaluation)
                self._meter.restart()
            self._reporter.advance(done)
            self._tell_saves()
            every = job.checkpoint.every
            if every and (done % every == 0 or done == total):
                with self._meter.pause():
                    self._save(done)
        return evaluation

    @property
    def rows_moved(self) -> int:
        """Rows of all ranks that travelled between host memory and the windows."""
        return self._meter.rows_moved

    def evaluate(self) -> Evaluation:
        """Evaluates the model as it is. Collective."""
        engine, loader = self._engine, self._validation_loader
        rows = TrainedRows(self._tables) if self._tables else None
        with evaluating(engine.module):
            sums = evaluate(engine, rows, batches(loader, self._job.eval.sequences), loader.bytes_of, engine.device)
        sums = sums.to(engine.device)
        dist.all_reduce(sums)
        return Evaluation.of(sums)

    def _save(self, done: int) -> None:
        if self._job.checkpoint.asynchronous and done < self._job.train.steps:
            self._checkpoints.save_beside(done, self._engine, self._tables, self._skipped_in_a_row)
            return
        self._tell_saves(wait=True)
        try:
            self._reporter.saved(self._checkpoints.save(done, self._engine, self._tables, self._skipped_in_a_row))
        except Failed as error:
            if done == self._job.train.steps:
                raise
            self._tell_unsaved(done, error)

    def _tell_saves(self, *, wait: bool = False) -> None:
        """Tells of the saves beside the loop that have ended, or with `wait` of all."""
        for ended in self._checkpoints.take_ended(wait=wait):
            if ended.path:
                self._reporter.saved(ended.path)
            else:
                self._tell_unsaved(ended.step, ended.error)
            if ended.waited_s > _WORTH_TELLING_S:
                self._reporter.message(
                    f"the save after that of step {ended.step} waited {ended.waited_s:.0f} s for it: the disk does not "
                    "keep up, raise checkpoint.every"
                )

    def _tell_unsaved(self, step: int, error: object) -> None:
        self._reporter.message(f"step {step} was not saved: {error}; training goes on")

    def _train_step_or_save(self, step: int) -> StepResult:
        try:
            return self.train_step(step)
        except WindowTooSmall as error:
            if self._job.checkpoint.every is None:
                raise UserError(str(error)) from None
            # Raised on every rank before the step began, and no part of a run's identity: nothing needs to be lost.
            path = self._checkpoints.save(step, self._engine, self._tables, self._skipped_in_a_row)
            raise UserError(f"{error}; {step} steps are saved in {path}, the same command goes on from there") from None

    def train_step(self, number: int) -> StepResult:
        """One optimizer step, without anything around it: no record, no evaluation, no checkpoint. Collective.

        Raises:
            WindowTooSmall: on every rank, before the step has begun.
        """
        step = self._tables.begin(number) if self._tables else None
        batches = cast(Sequence[Batch], step.batches) if step else self._train_loader.batch(number)
        num_labels = self._count_labels(batches)
        loss = torch.zeros((), dtype=torch.float64, device=self._engine.device)
        for place, batch in enumerate(batches):
            memory = memory_of(step.rows if step else None, place)
            part = forward(self._engine, batch, memory, self._engine.device) / num_labels
            # The engine averages over ranks, but the loss is the mean over the labels of all ranks.
            self._engine.backward(part * dist.get_world_size())
            loss += part.detach()
        return self._update(number, step, loss)

    def _update(self, number: int, step: Step | None, loss: Tensor) -> StepResult:
        # Given to the device first: the step's only wait, for the backbone's norm, is then one for both.
        of_rows = step.reduce() if step else 0.0
        norm_squared = float(self._engine.gradient_norm_squared()) + float(of_rows)
        factor = lr_factor(self._job.schedule, number, self._job.train.steps)
        result = StepResult(loss, math.sqrt(norm_squared), self._job.optimizer.learning_rate * factor)
        if not result.applied:
            self._skip(step)
            return result
        scale = clip_scale(norm_squared, self._job.train.gradient_clipping)
        self._engine.step(lr_factor=factor, gradient_scale=scale)
        if step:
            step.apply(lr=result.lr, gradient_scale=scale)
        if self._job.model.moe:
            update_balance(self._engine.module, self._job.model.moe.balance_rate, dist.all_reduce)
        return result

    def _skip(self, step: Step | None) -> None:
        self._engine.skip_step()
        if step:
            step.skip()
        reset_counts(self._engine.module)

    def _count_labels(self, batches: Sequence[Batch]) -> Tensor:
        """The labels of all ranks' batches, on the device: reading the number would wait for the step before."""
        mine = sum(int((batch.labels_BT >= 0).sum()) for batch in batches)
        count = torch.full((), mine, dtype=torch.int64, device=self._engine.device)
        dist.all_reduce(count)
        return count.clamp(min=1)

    def _check_skips(self, step: int, result: StepResult) -> None:
        self._skipped_in_a_row = 0 if result.applied else self._skipped_in_a_row + 1
        if self._skipped_in_a_row:
            self._reporter.message(f"step {step + 1} was skipped on all ranks: its gradient is not finite")
        if self._skipped_in_a_row > self._job.train.max_skipped_steps:
            raise UserError(
                f"train.max_skipped_steps: {self._skipped_in_a_row} steps in a row had no finite gradient, the last "
                f"one step {step + 1}; lower optimizer.learning_rate or raise schedule.warmup_steps"
            )


@contextmanager
def _what_is_built_uncollected() -> Iterator[None]:
    """What has been built stays for the whole run: the collector need not look through it again and again."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
