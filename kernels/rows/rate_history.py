"""The learning rate of every step, for steps that are made up for later."""

from bisect import bisect_right
from collections.abc import Iterable


class RateHistory:
    """Learning rates of steps 1, 2, ..., with the largest rate after any step in logarithmic time.

    Args:
        rates: those so far.
    """

    def __init__(self, rates: Iterable[float] = ()) -> None:
        self._rates: list[float] = []
        # Steps with a rate that no later one reaches: steps in ascending, hence rates in descending order.
        self._peak_steps: list[int] = []
        for rate in rates:
            self.append(rate)

    def append(self, rate: float) -> None:
        """Adds the next step's rate."""
        while self._peak_steps and self[self._peak_steps[-1]] <= rate:
            self._peak_steps.pop()
        self._rates.append(rate)
        self._peak_steps.append(len(self._rates))

    def __len__(self) -> int:
        return len(self._rates)

    def __getitem__(self, step: int) -> float:
        """The rate of `step`, counted from 1."""
        return self._rates[step - 1]

    def peak_after(self, step: int) -> float:
        """The largest rate of any step after `step` (rates rise in a warm-up, too); 0 if there is none."""
        place = bisect_right(self._peak_steps, step)
        return self[self._peak_steps[place]] if place < len(self._peak_steps) else 0.0

    def to_list(self) -> list[float]:
        """The rates of all steps."""
        return list(self._rates)
