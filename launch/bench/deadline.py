"""The time that a part of the benchmark may take."""

import time


class Deadline:
    """Counts from its making.

    Args:
        seconds: how many there are; None for no limit.
    """

    def __init__(self, seconds: float | None) -> None:
        self._started, self._seconds = time.monotonic(), seconds

    @property
    def left(self) -> float:
        """Seconds that are left; infinite without a limit."""
        return float("inf") if self._seconds is None else self._seconds - (time.monotonic() - self._started)

    def allows(self, seconds: float) -> bool:
        """Whether something that takes so long would end in time."""
        return seconds <= self.left
