"""The time that a part of the benchmark may take."""

import time


class Deadline:
    """The clock starts at construction.

    Args:
        seconds: the time allowed; None for no limit.
    """

    def __init__(self, seconds: float | None) -> None:
        self._started, self._seconds = time.monotonic(), seconds

    @property
    def left(self) -> float:
        """Seconds left; infinite without a limit."""
        return float("inf") if self._seconds is None else self._seconds - (time.monotonic() - self._started)

    def allows(self, seconds: float) -> bool:
        """Whether something that takes `seconds` would end in time."""
        return seconds <= self.left
