"""Rows read and updated in their slots by the row optimizer's own kernels, in one pass over memory.

Shape suffixes: U rows, D columns of a row.
"""

import torch
from torch import Tensor

from offload.optimizers.row_optimizer import RowKernels
from offload.rows.placed import PlacedRecords


class KernelUpdates:
    """See `offload.rows.updater.RowPass`. Nothing is allocated but for a step with more rows than any before.

    Args:
        kernels: for these records, where they lie.
        dim: columns of a row.
        device: of the records.
    """

    def __init__(self, kernels: RowKernels, dim: int, device: torch.device) -> None:
        self._kernels = kernels
        self._weights_UD = torch.empty(0, dim, device=device)  # kept: fresh memory would cost page faults

    def read(self, placed: PlacedRecords) -> Tensor:
        """See `RowPass.read`."""
        if len(self._weights_UD) < len(placed):
            self._weights_UD = self._weights_UD.new_empty(len(placed) + len(placed) // 4, self._weights_UD.shape[1])
        weights_UD = self._weights_UD[: len(placed)]
        self._kernels.read(placed.records_CW, placed.slots_U, weights_UD)
        return weights_UD

    def update(
        self, placed: PlacedRecords, gradient_UD: Tensor, row_ids_U: Tensor | None, gradient_scale: float
    ) -> None:
        """See `RowPass.update`."""
        self._kernels.update(placed.records_CW, placed.slots_U, gradient_UD, row_ids_U, gradient_scale)
