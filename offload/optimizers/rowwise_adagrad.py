"""Adagrad with one accumulator per row."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from offload.optimizers.resting import RestingOptimizer, UpdateKernel

if TYPE_CHECKING:
    from torch import Tensor


class RowwiseAdagrad(RestingOptimizer):
    """See `kernels.rows.rowwise.rowwise_adagrad`. A step without a gradient changes nothing at all."""

    name, title, keeps = "rowwise_adagrad", "Adagrad, a number a row", "one number a row"

    @staticmethod
    def state_size(dim: int) -> int:
        """The accumulator."""
        return 1

    def step(
        self, weights_BD: Tensor, state_BS: Tensor, grad_BD: Tensor, scratch_BD: Tensor, *, step: int, lr: float
    ) -> None:
        """See `RowOptimizer.step`."""
        from kernels.rows.rowwise import rowwise_adagrad

        rowwise_adagrad(weights_BD, state_BS, grad_BD, lr=lr, eps=self.settings.eps, scratch_UD=scratch_BD)

    def triton_update(self) -> UpdateKernel:
        """See `RestingOptimizer.triton_update`."""
        from kernels.rows.rowwise_triton import rowwise_adagrad

        return partial(rowwise_adagrad, eps=self.settings.eps)

    def compiled_update(self) -> UpdateKernel:
        """See `RestingOptimizer.compiled_update`."""
        from kernels.rows.rowwise_numba import rowwise_adagrad

        return partial(rowwise_adagrad, eps=self.settings.eps)
