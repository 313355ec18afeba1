"""What a user watches: a live bar on a terminal, one plain line a logged step anywhere else."""

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

import rich.progress
from rich.console import Console
from rich.text import Text

from train.report.metrics import StepMetrics

_REFRESH_S = 0.1
_BAR_WIDTH = 12


def step_line(metrics: StepMetrics, total_steps: int, eta_s: float) -> str:
    """`step 120/300  loss 3.412  lr 1.0e-3  5,812 tokens/s  eta 1:32  stall 0.4 ms  hit 81.2 %`."""
    width = len(str(total_steps))
    parts = [f"step {metrics.step:>{width}}/{total_steps}", *_numbers(metrics, eta_s)]
    return "  ".join(parts)


def _numbers(metrics: StepMetrics, eta_s: float) -> list[str]:
    parts = [f"loss {metrics.loss:.3f}"]
    if metrics.val_loss is not None:
        parts.append(f"val {metrics.val_loss:.3f}")
    parts += [f"lr {_scientific(metrics.lr)}", f"{metrics.tokens_per_s:,.0f} tokens/s", f"eta {duration(eta_s)}"]
    if metrics.offload is not None:
        parts += [f"stall {metrics.offload.stall_ms:.1f} ms", f"hit {100 * metrics.offload.hit_rate:.1f} %"]
    return parts


def _scientific(value: float) -> str:
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def duration(seconds: float) -> str:
    """Whole seconds as `1:32`, `2:05:09` or `3d 04:00`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class Progress:
    """Shows the run from `start_step` to `total_steps`; use it on one rank, as a context manager.

    On a terminal a bar stays at the bottom while messages and evaluations scroll past above it; else every call of
    `update` is one line. `log` gets the plain lines in both cases, so that a file keeps what the terminal forgets.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        stream: TextIO | None = None,
        log: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._step = total_steps, start_step
        self._stream, self._log, self._clock = stream or sys.stdout, log, clock
        self._first: tuple[int, float] | None = None
        self._drawn = clock()
        self._bar, self._task = self._live_bar(start_step)

    def _live_bar(self, start_step: int) -> tuple[rich.progress.Progress | None, rich.progress.TaskID]:
        if not self._stream.isatty() or os.environ.get("TERM") == "dumb":
            return None, rich.progress.TaskID(0)
        bar = rich.progress.Progress(
            rich.progress.BarColumn(bar_width=_BAR_WIDTH),
            rich.progress.TextColumn("step {task.completed:.0f}/{task.total:.0f}  {task.fields[numbers]}"),
            console=Console(file=self._stream),
            auto_refresh=False,
        )
        task = bar.add_task("train", total=self._total, completed=start_step, numbers="the first step is being taken")
        return bar, task

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, step: int) -> None:
        """Moves the bar to `step`; cheap enough for every step, logged or not."""
        self._step = step
        if self._first is None:
            # The first step compiles and warms up: it would spoil the estimate.
            self._first = (step, self._clock())
        if self._bar is not None and self._clock() - self._drawn >= _REFRESH_S:
            self._draw()

    def update(self, metrics: StepMetrics) -> None:
        """Shows a logged step."""
        self.advance(metrics.step)
        line = step_line(metrics, self._total, self.eta_s(metrics.step_ms / 1000))
        if self._bar is None or metrics.val_loss is not None:
            self.message(line)
        elif self._log is not None:
            print(line, file=self._log, flush=True)
        if self._bar is not None:
            parts = _numbers(metrics, self.eta_s(metrics.step_ms / 1000))
            room = self._bar.console.width - _BAR_WIDTH - len(f" step {self._total}/{self._total}  ")
            while len(parts) > 1 and len("  ".join(parts)) > room:
                parts.pop()
            self._bar.update(self._task, numbers="  ".join(parts))
            self._draw()

    def message(self, text: str) -> None:
        """Shows a line that stays: an evaluation, a checkpoint, a warning."""
        if self._log is not None:
            print(text, file=self._log, flush=True)
        if self._bar is not None:
            self._bar.console.print(Text(text), soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def eta_s(self, step_s: float) -> float:
        """Seconds to the end at the pace so far (evaluations and checkpoints included), or at `step_s` a step."""
        if self._first is not None and self._step > self._first[0]:
            step_s = (self._clock() - self._first[1]) / (self._step - self._first[0])
        return (self._total - self._step) * step_s

    def _draw(self) -> None:
        assert self._bar is not None
        self._bar.update(self._task, completed=self._step, refresh=True)
        self._drawn = self._clock()
