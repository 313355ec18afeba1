"""Progress of a preparation on standard error: a bar on a terminal, a line now and then elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class PrepareProgress:
    """Shows how many of the sources' bytes are done. A context manager; silent when `enabled` is False."""

    def __init__(self, total_bytes: int, *, enabled: bool) -> None:
        """Args: size of the sources, and whether to show anything."""
        self._total = total_bytes
        self._console = Console(stderr=True, quiet=not enabled, highlight=False, soft_wrap=True)
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if enabled and self._console.is_terminal:
            columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
            self._bar = Progress(TextColumn("tokenizing"), *columns, console=self._console, transient=True)
            self._task = self._bar.add_task("", total=total_bytes, note="")

    def __enter__(self) -> "PrepareProgress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def line(self, text: str) -> None:
        """Says something, above the bar if there is one."""
        self._console.print(text, markup=False)

    def update(self, bytes_done: int, documents: int, tokens: int) -> None:
        """Shows a new state; between lines elsewhere than on a terminal at least 10 s pass."""
        now = time.monotonic()
        rate = bytes_done / 1e6 / max(1e-9, now - self._started)
        note = f"{documents:,} documents, {tokens:,} tokens, {rate:.1f} MB/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=bytes_done, note=note)
        elif now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.line(f"tokenizing: {100 * bytes_done / max(1, self._total):.0f} %, {note}")
