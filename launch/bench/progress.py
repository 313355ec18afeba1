"""How far a measurement is, on standard error."""

import time
from types import TracebackType
from typing import Self

import rich.progress
from rich.console import Console

_SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """A bar on a terminal, a line now and then elsewhere. A context manager.

    Args:
        name: of what is measured.
        active: whether to show anything.
    """

    def __init__(self, name: str, *, active: bool = True) -> None:
        self._name, self._total, self._done = name, 0, 0
        self._console = Console(stderr=True, highlight=False, quiet=not active)
        columns = (rich.progress.BarColumn(), rich.progress.MofNCompleteColumn(), rich.progress.TimeElapsedColumn())
        # Without a refreshing thread: it would work while others are timed.
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn(name),
            *columns,
            console=self._console,
            transient=True,
            auto_refresh=False,
            disable=not (active and self._console.is_terminal),
        )
        self._task = self._bar.add_task("", total=None)
        self._told = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        self._bar.refresh()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

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
