"""What the steps of Adam multiply and divide by, step by step, for kernels that replay missed steps."""

import numpy as np
from numpy.typing import NDArray

from kernels.rate_history import RateHistory


class AdamSteps:
    """The applied steps of one Adam.

    Args:
        rates: learning rates of steps 1, 2, ...; seen as it grows.
        betas: decay of the first and of the second moments, per step.
        eps: added to the root of the corrected second moments.
    """

    def __init__(self, rates: RateHistory, betas: tuple[float, float], eps: float) -> None:
        self.betas, self.eps = betas, eps
        self._rates = rates
        self._known = 0
        self._step_sizes_T, self._roots_T = np.zeros((2, 1024), np.float32)

    def __len__(self) -> int:
        return len(self._rates)

    @property
    def peak_rate(self) -> float:
        """The largest learning rate of any step."""
        return self._rates.peak_after(0)

    def arrays(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """By step number (entry 0 means nothing): -lr / (1 - beta1^t), and sqrt(1 - beta2^t).

        Worked out in float64 and rounded once, as torch does with an optimizer's scalars.
        """
        if len(self) >= len(self._roots_T):
            grown = np.zeros((2, 2 * len(self) + 2), np.float32)
            grown[:, : len(self._roots_T)] = self._step_sizes_T, self._roots_T
            self._step_sizes_T, self._roots_T = grown
        for step in range(self._known + 1, len(self) + 1):
            self._step_sizes_T[step] = -(self._rates[step] / (1 - self.betas[0] ** step))
            self._roots_T[step] = (1 - self.betas[1] ** step) ** 0.5
        self._known = len(self)
        return self._step_sizes_T, self._roots_T
