"""A training run as its user watches it: a live bar on a terminal, one plain line per logged step anywhere else."""

import math
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from train.progress import Progress, duration
from train.report.metrics import StepMetrics

_GIVEN_UP = ("lr", "val", "rate", "eta", "hit", "stall")
"""What a narrow terminal's bar leaves out, the first one first; the loss stays."""


def step_line(metrics: StepMetrics, total_steps: int, eta_s: float) -> str:
    """`step 120/300  loss 3.412  lr 1.0e-3  5,812 tokens/s  eta 1:32  stall 0.4 ms  hit 81.2 %`."""
    width = len(str(total_steps))
    parts = [f"step {metrics.step:>{width}}/{total_steps}", *_numbers(metrics, eta_s)]
    return "  ".join(parts)


def _numbers(metrics: StepMetrics, eta_s: float, room: int | None = None) -> list[str]:
    """The numbers, or those that fit into so many characters: the first of `_GIVEN_UP` goes first."""
    parts = {"loss": f"loss {metrics.loss:.3f}"}
    if metrics.val_loss is not None:
        parts["val"] = f"val {metrics.val_loss:.3f}"
    parts |= {
        "lr": f"lr {_scientific(metrics.lr)}",
        "rate": f"{metrics.tokens_per_s:,.0f} tokens/s",
        "eta": f"eta {duration(eta_s)}",
    }
    if metrics.offload is not None:
        parts["stall"] = f"stall {metrics.offload.stall_ms:.1f} ms"
        parts["hit"] = f"hit {100 * metrics.offload.hit_rate:.1f} %"
    for name in _GIVEN_UP:
        if room is None or len("  ".join(parts.values())) <= room:
            break
        parts.pop(name, None)
    return [*parts.values()]


def _scientific(value: float) -> str:
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


class RunProgress:
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
        self._total, self._step, self._log, self._clock = total_steps, start_step, log, clock
        self._first: tuple[int, float] | None = None
        self._numbers = "the first step is being taken"
        self._shown = Progress(
            self._text(),
            total_steps,
            done=start_step,
            stream=stream or sys.stdout,
            transient=False,
            line_every_s=math.inf,
            clock=clock,
        )

    def __enter__(self) -> Self:
        self._shown.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._shown.__exit__(kind, error, at)

    def advance(self, step: int) -> None:
        """Moves the bar to `step`; cheap enough for every step, logged or not."""
        self._step = step
        if self._first is None:
            # The first step compiles and warms up: it would spoil the estimate.
            self._first = (step, self._clock())
        self._shown.show(step, self._text())

    def update(self, metrics: StepMetrics) -> None:
        """Shows a logged step."""
        self.advance(metrics.step)
        eta_s = self.eta_s(metrics.step_ms / 1000)
        line = step_line(metrics, self._total, eta_s)
        self._keep(line)
        if not self._shown.on_terminal or metrics.val_loss is not None:
            self._shown.line(line)
        self._numbers = "  ".join(_numbers(metrics, eta_s, room=self._shown.room - len(self._text(""))))
        self._shown.show(metrics.step, self._text(), at_once=True)

    def message(self, text: str) -> None:
        """Shows a line that stays: an evaluation, a checkpoint, a warning."""
        self._keep(text)
        self._shown.line(text)

    def eta_s(self, step_s: float) -> float:
        """Seconds to the end at the pace so far (evaluations and checkpoints included), or at `step_s` per step."""
        if self._first is not None and self._step > self._first[0]:
            step_s = (self._clock() - self._first[1]) / (self._step - self._first[0])
        return (self._total - self._step) * step_s

    def _text(self, numbers: str | None = None) -> str:
        return f"step {self._step}/{self._total}  {self._numbers if numbers is None else numbers}"

    def _keep(self, line: str) -> None:
        if self._log is not None:
            print(line, file=self._log, flush=True)
