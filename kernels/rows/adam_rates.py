"""The factors and divisors of Adam's steps, on the device whose kernels replay missed steps.

Shape suffix: T steps, entry 0 unused.
"""

import numpy as np
import torch
from torch import Tensor

from kernels.rows.adam_closed import GapSums
from kernels.rows.rate_history import RateHistory


class AdamRates:
    """The applied steps of one Adam.

    Args:
        history: learning rates of steps 1, 2, ...; followed as it grows.
        betas: decay of the first and of the second moments, per step.
        eps: added to the root of the corrected second moments.
        device: of the records.
        capacity: steps that memory is reserved for; it doubles when they exceed it.
        closed: whether gaps are evaluated at once.
    """

    def __init__(
        self,
        history: RateHistory,
        betas: tuple[float, float],
        eps: float,
        device: torch.device | str,
        capacity: int = 1 << 16,
        *,
        closed: bool = False,
    ) -> None:
        self.betas, self.eps = betas, eps
        self.gaps = GapSums(history, betas, eps, device) if closed else None
        """Evaluates gaps at once; None if their steps are replayed."""
        self._history = history
        self._known = 0
        self._reserve(capacity, torch.device(device))

    def __len__(self) -> int:
        """Number of applied steps."""
        return len(self._history)

    @property
    def peak_rate(self) -> float:
        """The largest learning rate of any step."""
        return self._history.peak_after(0)

    def scalars(self) -> Tensor:
        """Float32 [T, 2] by step number: -lr / (1 - beta1^t), and sqrt(1 - beta2^t).

        Computed in float64 and rounded once, as torch does with an optimizer's scalars. Steps that are new since the
        last call are copied on the current stream, and later kernels on it see them; the host does not wait. Nothing is
        allocated while the capacity suffices.
        """
        now = len(self)
        if now >= len(self._device_T2):
            self._reserve(2 * now, self._device_T2.device)
            self._known = 0
        if self._known < now:
            new = slice(self._known + 1, now + 1)
            for step in range(new.start, new.stop):
                self._host_T2[step] = self._of(step)
            # An entry never changes once it is written, so it does not matter when it is read.
            self._device_T2[new].copy_(self._pinned_T2[new], non_blocking=True)
            self._known = now
        return self._device_T2

    def _of(self, step: int) -> tuple[np.float32, np.float32]:
        beta1, beta2 = self.betas
        return np.float32(-(self._history[step] / (1 - beta1**step))), np.float32((1 - beta2**step) ** 0.5)

    def _reserve(self, capacity: int, device: torch.device) -> None:
        self._pinned_T2 = torch.zeros(capacity + 1, 2, pin_memory=device.type == "cuda")
        self._host_T2 = self._pinned_T2.numpy()
        self._device_T2 = torch.zeros(capacity + 1, 2, device=device)
