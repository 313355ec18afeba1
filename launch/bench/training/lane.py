"""One of the runs that are trained in turn, and the result of one of its turns."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, Self

import torch

from launch.bench.devices import finish
from launch.bench.options import BenchOptions
from train.config.file import load
from train.config.job import JobConfig
from train.config.report import ProfileConfig
from train.errors import UserError
from train.report.profile import TRACE_FILE, StepProfiler
from train.report.reporter import Reporter

RESIDENT = "resident"


@dataclass(frozen=True)
class Turn:
    """Some steps of one run, on this rank.

    Attributes:
        lane: its name: the engine that carries its rows, or `RESIDENT`.
        depth: the window's look-ahead; None for the resident run.
        step_ms: mean over the timed steps, from the device's end of the one before to its end of the last.
        stall_ms: per step, how long the loop waited for plans and rows.
        fetched, written_back: rows per step.
        phases_ms: per step, the host's time in parts of the loop, their waits for the device included.
    """

    lane: str
    depth: int | None
    step_ms: float
    stall_ms: float
    fetched: float
    written_back: float
    phases_ms: dict[str, float]

    def __str__(self) -> str:
        at = "" if self.depth is None else f" at depth {self.depth}"
        moved = f", {self.fetched:,.0f} rows in, {self.written_back:,.0f} out" if self.fetched else ""
        return f"{self.lane}{at} {self.step_ms:.2f} ms (stall {self.stall_ms:.2f}{moved})"


@dataclass
class Lane:
    """A run that takes turns with others. Made by `open`.

    Attributes:
        name: the engine that carries its rows, or `RESIDENT`.
        run, trainer: of the job.
        results: loss and gradient norm of every step so far, with all their bits.
    """

    name: str
    run: Any
    trainer: Any
    results: list[tuple[float, float]] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @classmethod
    def open(cls, name: str, steps: int, options: BenchOptions, folder: str) -> Self:
        """Builds a run of the job from its first step, once ranks have joined. Collective.

        Args:
            name: the engine that is to carry its rows, or `RESIDENT`.
            steps: how many it will have.
            options: name the job and its overrides.
            folder: where the run puts its own.

        Raises:
            UserError: the job cannot be trained, or has no tables.
        """
        mode = ["offload.mode=resident"] if name == RESIDENT else ["offload.mode=window", f"offload.engine={name}"]
        run, trainer = open_run(options.job, [*options.overrides, *mode], folder, name, steps)
        lane = cls(name, run, trainer)
        lane._watch()
        return lane

    def train(self, steps: range, untimed: int, depth: int) -> Turn:
        """Trains `steps`, a window's rows at look-ahead `depth`; the first `untimed` of them are not timed."""
        tables, device, losses = self.run.tables, self.run.engine.device, []
        at = self._look_ahead(depth)
        for step in steps:
            if step == steps.start + untimed:
                finish(device)
                self.phases.clear()
                tables.take_traffic()
                started = time.perf_counter()
            result = self.trainer.train_step(step)
            losses.append((result.loss, result.grad_norm))
        finish(device)
        taken, traffic, count = time.perf_counter() - started, tables.take_traffic(), len(steps) - untimed
        values = torch.stack([loss for loss, _ in losses]).tolist()
        self.results += [(loss, norm) for loss, (_, norm) in zip(values, losses, strict=True)]
        each = 1e3 / count
        phases = {name: each * seconds for name, seconds in self.phases.items()}
        moved = traffic.fetched / count, traffic.written_back / count
        return Turn(self.name, at, each * taken, each * traffic.waited_s, *moved, phases)

    def trace(self, steps: range, folder: Path | None, depth: int) -> None:
        """Trains `steps` under PyTorch's profiler, and writes what the device did to `folder`, if given."""
        profile = ProfileConfig(first=steps.start + 1, steps=len(steps)) if folder else None
        profiler = StepProfiler(profile, folder or Path(), self.run.engine.device)
        self._look_ahead(depth)
        for step in steps:
            with profiler.step(step + 1):
                result = self.trainer.train_step(step)
            self.results.append((result.loss.item(), result.grad_norm))
        if folder:
            (folder / TRACE_FILE).replace(folder / f"{self.name}.json.gz")

    def _look_ahead(self, depth: int) -> int | None:
        if self.name == RESIDENT:
            return None
        self.run.tables.look_ahead(depth)
        return depth

    def _watch(self) -> None:
        """Counts the host's time in the parts of the loop."""
        tables, engine = self.run.tables, self.run.engine
        begin = self._timed(tables.begin, "begin")

        def begin_watched(number: int) -> Any:
            step = begin(number)
            for name in ("reduce", "apply"):
                setattr(step, name, self._timed(getattr(step, name), name))
            return step

        tables.begin = begin_watched
        for name in ("gradient_norm_squared", "step"):
            setattr(engine, name, self._timed(getattr(engine, name), name))

    def _timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.phases[name] += time.perf_counter() - started

        return timed


def open_run(config: str, overrides: Sequence[str], folder: str, name: str, steps: int) -> tuple[Any, Any]:
    """Builds a run of a job from its first step, which nobody hears of, once ranks have joined. Collective.

    Args:
        config, overrides: the job.
        folder, name: where the run may keep something.
        steps: that it will have.

    Returns:
        Its `Parts` and its `Trainer`.

    Raises:
        UserError: the job cannot be trained, or has no tables.
    """
    # DeepSpeed takes seconds to import, and other parts of the benchmark do not need it.
    from train.parts import Parts
    from train.run import trainer_of

    plain = ["checkpoint.every=null", "wandb.mode=disabled", f"train.steps={steps}", f"eval.every={steps}"]
    job = load(config, [*overrides, f"run.dir={folder}", f"run.name={name}", *plain], JobConfig)
    if job.model.engram is None:
        raise UserError(f"{config}: a model without model.engram has no tables to measure")
    parts = Parts(job)
    parts.resume()
    return parts, trainer_of(parts, Reporter(job, parts.folder, start=0, active=False))
