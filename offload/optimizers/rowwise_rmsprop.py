"""RMSprop with one accumulator per row."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from offload.optimizers.resting import RestingOptimizer, UpdateKernel

if TYPE_CHECKING:
    from torch import Tensor


class RowwiseRmsprop(RestingOptimizer):
    """See `kernels.rows.rowwise.rowwise_rmsprop`. A step without a gradient only decays the accumulator."""

    name, title, keeps = "rowwise_rmsprop", "RMSprop, a number a row", "one number a row"

    @staticmethod
    def state_size(dim: int) -> int:
        """The accumulator."""
        return 1

    @property
    def state_decay(self) -> float | None:
        """See `RowOptimizer.state_decay`."""
        return self.settings.beta2 if self.makes_up else None

    def step(
        self, weights_BD: Tensor, state_BS: Tensor, grad_BD: Tensor, scratch_BD: Tensor, *, step: int, lr: float
    ) -> None:
        """See `RowOptimizer.step`."""
        from kernels.rows.rowwise import rowwise_rmsprop

        beta2, eps = self.settings.beta2, self.settings.eps
        rowwise_rmsprop(weights_BD, state_BS, grad_BD, lr=lr, beta2=beta2, eps=eps, scratch_UD=scratch_BD)

    def triton_update(self) -> UpdateKernel:
        """See `RestingOptimizer.triton_update`."""
        from kernels.rows.rowwise_triton import rowwise_rmsprop

        return partial(rowwise_rmsprop, beta2=self.settings.beta2, eps=self.settings.eps, decays=self.makes_up)

    def compiled_update(self) -> UpdateKernel:
        """See `RestingOptimizer.compiled_update`."""
        from kernels.rows.rowwise_numba import rowwise_rmsprop

        return partial(rowwise_rmsprop, beta2=self.settings.beta2, eps=self.settings.eps, decays=self.makes_up)
