"""Steps of Adam without a gradient, all those of a gap at once: `untouched_rows: closed`.

After a row's last update at step l, with moments m and v, the k-th step without a gradient moves its weights by

    A_i r^k m / (sqrt(v) + eps z),   i = l + k,  r = beta1 / sqrt(beta2),  z = q_i beta2^(-k/2),
    A_i = -rate_i q_i / (1 - beta1^i),  q_i = sqrt(1 - beta2^i)

(the terms of `kernels.rows.adam.adam`, numerator and denominator times q_i beta2^(-k/2)). Only in z do an
element's v and the step meet, and 1 / (sqrt(v) + eps z) is given by its values at a dozen fixed z
(`kernels.rows.rational_nodes`). So a gap of any length moves a weight by

    m sum_p S[l, p] / (sqrt(v) + eps z_p)

where S[l] sums the steps since l: a row of numbers for all rows of the tables that were last updated at l. A step adds
only to the last few hundred of them, since r^k is negligible beyond.

The moments are multiplied by beta1^n and beta2^n for a gap of n steps.

Shape suffixes: U rows, D columns of a row, T steps, P nodes, K steps after which a gap moves nothing more.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kernels import ieee
from kernels.rows.rate_history import RateHistory
from kernels.rows.rational_nodes import RationalNodes

_LEAST_SHARE = 1e-8  # of a gap's move that its end may leave out, at a steady rate
_TOLERANCE = 1e-6  # of a step's move, as far as it counts
_FADING = 0.7  # how much a step counts: r^(0.7 k), a bit more than it does at a steady rate


class GapSums:
    """The effect on a row of gaps that begin at any step and last until now.

    Args:
        history: learning rates of steps 1, 2, ...; followed as it grows.
        betas: decay of the first and of the second moments, per step; beta1 at most 0.95 times the root of beta2.
        eps: added to the root of the corrected second moments.
        device: of the rows.
        capacity: steps that memory is reserved for; it doubles when they exceed it.
    """

    def __init__(
        self,
        history: RateHistory,
        betas: tuple[float, float],
        eps: float,
        device: torch.device | str,
        capacity: int = 1 << 12,
    ) -> None:
        self.history, self._betas = history, betas
        # The factors of the steps in float32.
        self._decays = 1 - float(np.float32(1 - betas[0])), float(np.float32(betas[1]))
        fading, shrink = self._decays[0] / self._decays[1] ** 0.5, self._decays[1] ** -0.5
        self._reach = max(1, math.ceil(math.log(_LEAST_SHARE * (1 - fading)) / math.log(fading)))
        power = _FADING * math.log(fading) / math.log(shrink)
        self._nodes = RationalNodes(
            self._root(2) * shrink, shrink**self._reach, lambda z: min(1.0, z**power), _TOLERANCE
        )
        nodes_P = torch.tensor(self._nodes.nodes, dtype=torch.float64)
        self.offsets_P = (eps * nodes_P).float().to(device)
        """Float32: eps z_p."""
        steps = range(self._reach, 0, -1)
        self._fading_K = torch.tensor([fading**step for step in steps], dtype=torch.float64)
        self._shrink_K = torch.tensor([shrink**step for step in steps], dtype=torch.float64)
        # Of the steps before this one, earliest first, for one root of the bias correction: none yet.
        self._shares_of, self._shares_KP = 0.0, torch.empty(self._reach, len(nodes_P), dtype=torch.float64)
        self._added_KP = torch.empty_like(self._shares_KP, device=device)
        self._known = 0
        self._sums_TP = self._added_KP[:0]
        self._reserve(capacity)

    def sums(self) -> Tensor:
        """Float64 [T, P] by a row's last step: S, as of now.

        The current stream computes it, and later kernels on it see it; the host does not wait.
        """
        now = len(self.history)
        if now >= len(self._sums_TP):
            self._reserve(2 * now)
        while self._known < now:
            self._known += 1
            self._add(self._known)
        return self._sums_TP

    @property
    def device(self) -> torch.device:
        """Where the sums are."""
        return self._sums_TP.device

    def decays(self) -> Tensor:
        """Float32 [T, 2] by the length of a gap: its factors of the first and the second moments."""
        return self._decays_T2

    def _add(self, step: int) -> None:
        root = self._root(step)
        if root != self._shares_of:  # it is 1 in the end: with a beta2 of 0.999, after 36,000 steps
            shares_KP = self._nodes.shares(root * self._shrink_K) * self._fading_K[:, None]
            # Computed here, as a GPU would need a hundred launches for it, and sent without a wait.
            pinned_KP = shares_KP.pin_memory() if self.device.type == "cuda" else shares_KP
            self._shares_of, self._shares_KP = root, pinned_KP.to(self.device, non_blocking=True)
        count = min(step - 1, self._reach)
        size = -self.history[step] * root / (1 - self._betas[0] ** step)
        self._sums_TP[step - count : step] += torch.mul(self._shares_KP, size, out=self._added_KP)[
            self._reach - count :
        ]

    def _root(self, step: int) -> float:
        return float((1 - self._betas[1] ** step) ** 0.5)

    def _reserve(self, capacity: int) -> None:
        grown_TP = self._sums_TP.new_zeros(capacity + 1, self._sums_TP.shape[1])
        grown_TP[: len(self._sums_TP)] = self._sums_TP
        self._sums_TP = grown_TP
        powers = [[decay**gap for decay in self._decays] for gap in range(capacity + 1)]
        self._decays_T2 = torch.tensor(powers, dtype=torch.float64).float().to(self.device)


def close_gaps(
    weights_UD: Tensor,
    exp_avg_UD: Tensor,
    exp_avg_sq_UD: Tensor,
    last_steps: Sequence[int],
    gaps: GapSums,
) -> None:
    """Brings rows up to date as `kernels.rows.adam.replay_adam` does, in place, up to a small error.

    The move of a weight over a gap is met within 1e-6 of itself or, where the rate rises a hundredfold within the gap,
    of the move at the highest rate; then the weight is rounded once, where replaying rounds it at every step.

    Args:
        weights_UD: float32, the rows, each after its own last step. So are the moments.
        exp_avg_UD: float32, first moments.
        exp_avg_sq_UD: float32, second moments.
        last_steps: U integers from 1 on: the applied step that each row is at.
        gaps: of all applied steps so far.
    """
    last_U = torch.tensor(last_steps, dtype=torch.int64, device=weights_UD.device)
    sums_UP = gaps.sums()[last_U].float()
    decays_U2 = gaps.decays()[len(gaps.history) - last_U]
    root_UD = ieee.sqrt(exp_avg_sq_UD)
    moves_UD = torch.zeros_like(root_UD)
    for sums_U, offset in zip(sums_UP.unbind(1), gaps.offsets_P, strict=True):
        moves_UD += sums_U[:, None] / (root_UD + offset)
    weights_UD += exp_avg_UD * moves_UD
    exp_avg_UD *= decays_U2[:, :1]
    exp_avg_sq_UD *= decays_U2[:, 1:]
