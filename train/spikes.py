"""Which steps are spikes: loss or gradient norm far above those of the updates before.

The rule of OLMo-core's SkipStepOptimizer, https://github.com/allenai/OLMo-core, which skips such steps as well.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence

Update = tuple[float, float]
"""Loss and gradient norm of a step that was applied."""


class Spikes:
    """The updates that a step is compared with. All ranks give the same numbers, so all come to the same verdict.

    Args:
        sigma: standard deviations above the mean from which a number is a spike.
        window: updates that count.
        recent: those before.
    """

    def __init__(self, sigma: float, window: int, recent: Iterable[Update] = ()) -> None:
        self._sigma, self._recent = sigma, deque(recent, window)

    @property
    def recent(self) -> list[Update]:
        """The updates that count now, oldest first."""
        return list(self._recent)

    def add(self, loss: float, grad_norm: float) -> None:
        """A step was applied."""
        self._recent.append((loss, grad_norm))

    def why(self, loss: float, grad_norm: float) -> str | None:
        """What is a spike in a step, in words; None if nothing is, or too little is known."""
        if len(self._recent) < self._recent.maxlen // 2:  # type: ignore[operator]
            return None
        losses, norms = zip(*self._recent, strict=True)
        return self._above("loss", loss, losses) or self._above("gradient norm", grad_norm, norms)

    def _above(self, name: str, value: float, before: Sequence[float]) -> str | None:
        mean, deviation = statistics.fmean(before), statistics.pstdev(before)
        if math.isfinite(value) and value <= mean + self._sigma * deviation:
            return None
        return f"its {name} {value:.4g} is a spike: the {len(before)} updates before had {mean:.4g} ± {deviation:.2g}"
