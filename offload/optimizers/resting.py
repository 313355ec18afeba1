"""Row optimizers under which rows without a gradient rest: all they need is one kernel for a step.

Shape suffixes: as in `offload.optimizers.row_optimizer`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Protocol

from offload.optimizers.row_optimizer import RowKernels, RowOptimizer, StoredRows

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.rows.caught_up import CaughtUp
    from kernels.rows.rate_history import RateHistory
    from kernels.rows.row_update import RowUpdate


class UpdateKernel(Protocol):
    """One step on rows in their slots."""

    def __call__(self, update: RowUpdate, *, lr: float) -> None:
        """`lr` is the rows' own learning rate."""


class RestingOptimizer(RowOptimizer):
    """A row optimizer that moves no weights without a gradient: they are read as they are stored."""

    @abstractmethod
    def triton_update(self) -> UpdateKernel:
        """A step on a GPU."""

    @abstractmethod
    def compiled_update(self) -> UpdateKernel:
        """A step that Numba compiles for a CPU."""

    def triton(self, rates: RateHistory, rows: StoredRows) -> RowKernels:
        """See `RowOptimizer.triton`."""
        from kernels.rows.records_triton import read_rows

        return _RestingKernels(read_rows, self.triton_update(), rates, rows)

    def compiled(self, rates: RateHistory, rows: StoredRows) -> RowKernels:
        """See `RowOptimizer.compiled`."""
        return _RestingKernels(None, self.compiled_update(), rates, rows)


class _RestingKernels:
    def __init__(self, read: Any, update: UpdateKernel, rates: RateHistory, rows: StoredRows) -> None:
        self._read, self._update, self._rates, self._rows = read, update, rates, rows

    def read(self, records_CW: Tensor, slots_U: Tensor, got: CaughtUp) -> Tensor | None:
        if self._read is None:  # they are as they are stored
            return slots_U
        self._read(records_CW, slots_U, got.weights_UD, bf16=self._rows.bf16)
        return None

    def update(
        self,
        records_CW: Tensor,
        slots_U: Tensor,
        got: CaughtUp,
        grad_UD: Tensor,
        row_ids_U: Tensor | None,
        gradient_scale: float,
    ) -> None:
        from kernels.rows.row_update import RowUpdate

        step, stored = len(self._rates), self._rows
        update = RowUpdate(
            records_CW, slots_U, grad_UD, row_ids_U, step=step, bf16=stored.bf16, seed=stored.seed,
            gradient_scale=gradient_scale,
        )  # fmt: skip
        self._update(update, lr=self._rates[step])
