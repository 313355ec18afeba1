"""Plain stochastic gradient descent, without momentum."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload.optimizers.resting import RestingOptimizer, UpdateKernel

if TYPE_CHECKING:
    from torch import Tensor


class Sgd(RestingOptimizer):
    """See `kernels.rows.sgd`. A step without a gradient changes nothing at all."""

    name, title, keeps = "sgd", "SGD", "nothing"

    @staticmethod
    def state_size(dim: int) -> int:
        """None."""
        return 0

    def step(
        self, weights_BD: Tensor, state_BS: Tensor, grad_BD: Tensor, scratch_BD: Tensor, *, step: int, lr: float
    ) -> None:
        """See `RowOptimizer.step`."""
        from kernels.rows.sgd import sgd

        sgd(weights_BD, grad_BD, lr=lr, scratch_UD=scratch_BD)

    def triton_update(self) -> UpdateKernel:
        """See `RestingOptimizer.triton_update`."""
        from kernels.rows.sgd_triton import update_rows

        return update_rows

    def compiled_update(self) -> UpdateKernel:
        """See `RestingOptimizer.compiled_update`."""
        from kernels.rows.sgd_numba import update_rows

        return update_rows
