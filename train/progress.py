"""How far a piece of work is: a bar on a terminal, a line now and then elsewhere."""

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

import rich.progress
from rich.console import Console
from rich.text import Text

_REFRESH_S = 0.1
_BAR_WIDTH = 12


class Progress:
    """A context manager; silent unless `active`.

    The bar is drawn by the calls alone: a thread that refreshes it would work while others are timed.

    Args:
        name: of the work.
        total: how much there is of it, in any unit.
        done: how much was done before.
        active: whether to show anything.
        stream: standard error by default.
        transient: whether the bar goes away at the end.
        line_every_s: minimum seconds between two lines where there is no terminal.
        clock: counts seconds.
    """

    def __init__(
        self,
        name: str,
        total: int = 0,
        *,
        done: int = 0,
        active: bool = True,
        stream: TextIO | None = None,
        transient: bool = True,
        line_every_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._total, self._done, self._active = name, total, done, active
        self._stream, self._line_every_s, self._clock = stream or sys.stderr, line_every_s, clock
        self.on_terminal = active and self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._bar = rich.progress.Progress(
            rich.progress.BarColumn(bar_width=_BAR_WIDTH),
            rich.progress.TextColumn("{task.description}", markup=False),
            console=Console(file=self._stream),
            auto_refresh=False,
            transient=transient,
            disable=not self.on_terminal,
        )
        self._task = self._bar.add_task(name, total=total, completed=done)
        self._drawn = self._told = clock()

    def __enter__(self) -> Self:
        self._bar.start()
        self._bar.refresh()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    @property
    def room(self) -> int:
        """Characters that a terminal has beside the bar."""
        return self._bar.console.width - _BAR_WIDTH - 1

    def expect(self, steps: int) -> None:
        """Announces `steps` more steps."""
        self._total += steps
        self._bar.update(self._task, total=self._total)

    def advance(self, steps: int = 1) -> None:
        """Counts `steps` more as done."""
        done = self._done + steps
        self.show(done, f"{self._name}: {done} of {self._total}")

    def show(self, done: int, text: str, *, at_once: bool = False) -> None:
        """Shows how much is done, in words too; at most ten times a second on a terminal, unless `at_once`."""
        self._done, now = done, self._clock()
        self._bar.update(self._task, completed=done, description=text)
        if at_once or now - self._drawn >= _REFRESH_S:
            self._bar.refresh()
            self._drawn = now
        if not self.on_terminal and now - self._told >= self._line_every_s:
            self.line(text)
            self._told = now

    def line(self, text: str) -> None:
        """Prints a line that stays, above the bar if there is one."""
        if self.on_terminal:
            self._bar.console.print(Text(text), soft_wrap=True)
        elif self._active:
            print(text, file=self._stream, flush=True)


def duration(seconds: float) -> str:
    """Whole seconds as `1:32`, `2:05:09` or `3d 04:00`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
