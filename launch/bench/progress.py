"""How far a measurement is, on standard error."""

import time
from types import TracebackType
from typing import Self

import rich.progress
from rich.console import Console

_SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """A bar on a terminal, a line now and then elsewhere. A context manager."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        columns = (rich.progress.BarColumn(), rich.progress.MofNCompleteColumn(), rich.progress.TimeElapsedColumn())
        # Without a refreshing thread: it would work while others are timed.
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            *columns,
            console=self._console,
            transient=True,
            auto_refresh=False,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("")
        self._name, self._total, self._done = "", 0, 0
        self._told = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def begin(self, name: str) -> None:
        """What is measured next; of unknown length until `expect`."""
        self._name, self._total, self._done = name, 0, 0
        self._bar.reset(self._task, description=name, total=None)
        self._bar.refresh()

    def expect(self, steps: int) -> None:
        """So many more steps will come."""
        self._total += steps
        self._bar.update(self._task, total=self._total)

    def advance(self, steps: int = 1) -> None:
        """So many steps were taken."""
        self._done += steps
        self._bar.update(self._task, advance=steps, refresh=True)
        if not self._console.is_terminal and time.monotonic() - self._told >= _SECONDS_BETWEEN_LINES:
            self._told = time.monotonic()
            self._console.print(f"{self._name}: {self._done} of {self._total} steps")
