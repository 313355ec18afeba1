"""The training loop."""

import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor

from model.balance import reset_counts, update_balance
from offload.step import Step
from offload.tables import EngramTables, WindowTooSmall
from train.checkpoint.checkpoints import Checkpoints, Resumed
from train.checkpoint.content import Now
from train.config.job import JobConfig
from train.data.batches.course import Seen
from train.data.batches.loader import Batch, Loader
from train.engine import Engine
from train.errors import UserError
from train.evaluation import Evaluation
from train.forward import forward
from train.loaders import HeldOut
from train.look_ahead import LookAhead
from train.optim.clipping import clip_scale
from train.optim.schedule import lr_factor
from train.refusals import Refusals, everyones
from train.report.gates import Gates
from train.report.meter import Meter
from train.report.profile import StepProfiler
from train.report.reporter import Reporter
from train.report.step import StepResult
from train.report.utilisation import ideal_s_per_token
from train.row_source import memory_of
from train.saving import RunSaves
from train.validation import Validation
from train.watch.watch import Watch


class Trainer:
    """Takes a job from step `start` to its end.

    Args:
        job: its config.
        engine: the backbone under DeepSpeed.
        tables: the Engram tables; None for a model without.
        train_loader: of the split that is trained on.
        held_out: what is evaluated, of each source.
        checkpoints: where states are saved.
        reporter: told of everything that a user may want to see.
        profiler: of some steps; None for none.
        watch: of the run; None for none.
        resumed: what the run continues from; None for a fresh start.
    """

    def __init__(
        self,
        job: JobConfig,
        *,
        engine: Engine,
        tables: EngramTables | None,
        train_loader: Loader,
        held_out: Sequence[HeldOut],
        checkpoints: Checkpoints,
        reporter: Reporter,
        profiler: StepProfiler | None = None,
        watch: Watch | None = None,
        resumed: Resumed | None = None,
    ) -> None:
        resumed = resumed or Resumed()
        self._job, self._engine, self._tables = job, engine, tables
        self._profiler = profiler or StepProfiler(None, Path(), engine.device)
        self._train_loader = train_loader
        self._reporter = reporter
        self._watch = watch or Watch()
        if tables:
            tables.tell_stages(self._enter)
        self._look_ahead = None
        if tables and job.offload.depth == "auto":
            self._look_ahead = LookAhead(tables, engine.device, job.train.steps, reporter.chose)
        self._start = resumed.step
        self._unevaluated = resumed.unevaluated  # the last step is still to be
        names = [source.name for source in train_loader.sources]
        self._meter = Meter(
            tables,
            engine.device,
            tokens=resumed.tokens,
            sources=names if len(names) > 1 else (),
            gates=Gates(engine.module, engine.device),
            ideal_s=ideal_s_per_token(job, engine.device, dist.get_world_size()),
        )
        self._validation = Validation(engine, tables, held_out, job.eval.sequences, self._watch)
        self._refusals = Refusals(job.train, train_loader, reporter, resumed.recent)
        self._saves = RunSaves(job, checkpoints, self._state, reporter, self._watch, self._meter, resumed.step)

    def fit(self) -> Evaluation | None:
        """Trains all steps that are left, and returns the evaluation at the end, if any text is held out. Collective.

        Raises:
            UserError: too many steps in a row were skipped, the config wants to stop at one, or a step does not fit
                into the window.
            Interrupted: on all ranks, by a signal; the run is saved.
            Failed: the last checkpoint cannot be written; if an earlier one cannot, training goes on.
        """
        with _what_is_built_uncollected():
            try:
                evaluation = self._fit(self._start)
            except UserError:
                # Raised on all ranks alike: a save under way can come to its end.
                self._saves.tell(wait=True)
                raise
        self._profiler.close()
        return evaluation or self.evaluate()

    def _fit(self, start: int) -> Evaluation | None:
        """The steps; returns the last one's evaluation, or None if nothing was left to train."""
        job, total = self._job, self._job.train.steps
        evaluation = None
        if self._unevaluated and start < total:
            if found := self.evaluate():
                self._reporter.evaluated(start, found)
            self._unevaluated = False
        for step in range(start, total):
            done = step + 1
            self._watch.ask(save=self._saves.overdue)
            with self._profiler.step(done), self._look_ahead.step(step) if self._look_ahead else nullcontext():
                result = self._train_step_or_save(step)
            if step == start:
                self._watch.begun()
            self._refusals.tell(step, result, self._saves.before)
            self._meter.count(result.loss, job.train.global_batch_size, self._train_loader.length(step))
            signum, overdue = self._watch.answer()
            due = done % job.eval.every == 0 or done == total
            if due or done % job.train.log_every == 0:
                evaluation, signum = self._record(done, result, signum, evaluate=due)
            self._reporter.advance(done)
            self._saves.tell()
            saved = None if signum and done < total else self._saves.in_time(done, overdue=overdue)
            if not signum and (due or saved):
                # These take long: a signal that came meanwhile need not wait for another step.
                self._watch.ask()
                signum = self._watch.answer().signum
            if signum and done < total:
                self._saves.interrupt(done, signum)
        return evaluation

    def _record(self, done: int, result: StepResult, signum: int, *, evaluate: bool) -> tuple[Evaluation | None, int]:
        """Records a step, evaluated if that is due and no signal hurries; returns the evaluation and the signal."""
        measured, evaluation = self._meter.measure(), None
        if evaluate and done == self._job.train.steps:
            evaluation = self.evaluate()
        elif evaluate and not signum:
            evaluation, signum = self._validation.evaluate_or_end()
        self._unevaluated = evaluate and evaluation is None
        self._reporter.step(done, result, measured, evaluation, self._train_loader.epochs(done), self._seen(done))
        self._meter.restart()
        return evaluation, signum

    @property
    def rows_moved(self) -> int:
        """Rows of all ranks that travelled between host memory and the windows."""
        return self._meter.rows_moved

    @property
    def tokens(self) -> int:
        """Tokens that the run was trained on, from its very start."""
        return self._meter.tokens

    def evaluate(self) -> Evaluation | None:
        """Evaluates the model as it is; None if there is nothing to predict. Collective."""
        return self._validation.evaluate()

    def _seen(self, done: int) -> Mapping[str, Seen]:
        """What was read of each source; nothing to be told without a mixture."""
        return self._train_loader.seen(done) if len(self._train_loader.sources) > 1 else {}

    def _state(self) -> Now:
        refusals = self._refusals
        return Now(self._engine, self._tables, refusals.in_a_row, refusals.recent, self._unevaluated, self.tokens)

    def _train_step_or_save(self, step: int) -> StepResult:
        try:
            return self.train_step(step)
        except WindowTooSmall as error:
            # Raised on every rank before the step began, and no part of a run's identity: nothing needs to be lost.
            raise UserError(f"{error}{self._saves.before(step)}") from None

    def train_step(self, number: int) -> StepResult:
        """One optimizer step, without anything around it: no record, no evaluation, no checkpoint. Collective.

        Raises:
            WindowTooSmall: on every rank, before the step has begun.
        """
        self._watch.enter("plan", number + 1)
        stages = self._meter.stages
        stages.enter("plan")
        step = self._tables.begin(number) if self._tables else None
        self._watch.enter("compute")
        batches = cast(Sequence[Batch], step.batches) if step else self._train_loader.batch(number)
        num_labels = self._count_labels(batches)
        loss = torch.zeros((), dtype=torch.float64, device=self._engine.device)
        for place, batch in enumerate(batches):
            stages.enter("forward")
            memory = memory_of(step.rows if step else None, place)
            tell = self._meter.losses(batch)
            part = forward(self._engine, batch, memory, self._engine.device, tell) / num_labels
            # The engine averages over ranks, but the loss is the mean over the labels of all ranks.
            stages.enter("backward")
            self._engine.backward(part * dist.get_world_size())
            loss += part.detach()
        try:
            return self._update(number, step, loss)
        finally:
            stages.enter("other")

    def _enter(self, stage: Literal["plan", "fetch", "exchange"]) -> None:
        self._watch.enter(stage)
        self._meter.stages.enter(stage)

    def _update(self, number: int, step: Step | None, loss: Tensor) -> StepResult:
        # Given to the device first: the step's only wait, for the backbone's norm, is then one for all.
        self._watch.enter("exchange")
        self._meter.stages.enter("reduce")
        of_rows = step.reduce() if step else 0.0
        of_all = everyones(loss) if self._refusals.need_loss else 0.0
        norm_squared = float(self._engine.gradient_norm_squared()) + float(of_rows)
        self._watch.enter("compute")
        self._meter.stages.enter("update")
        norm = math.sqrt(norm_squared)
        factor = lr_factor(self._job.schedule, number, self._job.train.steps)
        refused = self._refusals.judge(float(of_all), norm)
        result = StepResult(loss, norm, self._job.optimizer.learning_rate * factor, refused)
        if refused:
            self._skip(step)
            return result
        scale = clip_scale(norm_squared, self._job.train.gradient_clipping)
        self._engine.step(lr_factor=factor, gradient_scale=scale)
        if step:
            step.apply(lr=result.lr, gradient_scale=scale)
        if self._job.model.moe:
            self._meter.tokens_per_expert = update_balance(
                self._engine.module, self._job.model.moe.balance_rate, dist.all_reduce
            )
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


@contextmanager
def _what_is_built_uncollected() -> Iterator[None]:
    """What has been built stays for the whole run: the collector need not look through it again and again."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
