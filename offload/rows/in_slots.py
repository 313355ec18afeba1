"""Rows read and updated in their slots by the row optimizer's own kernels, in one pass over memory.

Shape suffixes: U rows, D columns of a row, S numbers of state.
"""

import torch
from torch import Tensor

from kernels.gather.values import RowValues
from kernels.rows.caught_up import CaughtUp
from offload.optimizers.row_optimizer import RowKernels
from offload.rows.placed import PlacedRecords


class KernelUpdates:
    """See `offload.rows.updater.RowPass`. Nothing is allocated except for a step with more rows than any before.

    Args:
        kernels: for these records, where they lie.
        dim: columns of a row.
        state_size: numbers of state for which a read makes up missed steps; None if it makes up for none.
        device: of the records.
    """

    def __init__(self, kernels: RowKernels, dim: int, state_size: int | None, device: torch.device) -> None:
        self._kernels = kernels
        # Kept from step to step: fresh memory would cost page faults.
        self._weights_UD = torch.empty(0, dim, device=device)
        self._state_US = None if state_size is None else torch.empty(0, state_size, device=device)
        in_place = state_size is not None and device.type == "cpu"
        self._places_U = torch.empty(0, dtype=torch.int64) if in_place else None

    def read(self, placed: PlacedRecords) -> tuple[RowValues, CaughtUp]:
        """See `RowPass.read`."""
        got = self._room(len(placed))
        places_U = self._kernels.read(placed.records_CW, placed.slots_U, got)
        if places_U is None:
            return RowValues(got.weights_UD), got
        return RowValues(placed.records_CW, places_U, got.weights_UD, placed.layout.row_dtype == "bf16"), got

    def update(
        self,
        placed: PlacedRecords,
        got: CaughtUp,
        gradient_UD: Tensor,
        row_ids_U: Tensor | None,
        gradient_scale: float,
    ) -> None:
        """See `RowPass.update`."""
        self._kernels.update(placed.records_CW, placed.slots_U, got, gradient_UD, row_ids_U, gradient_scale)

    def _room(self, rows: int) -> CaughtUp:
        if len(self._weights_UD) < rows:
            room = rows + rows // 4
            self._weights_UD = self._weights_UD.new_empty(room, self._weights_UD.shape[1])
            if self._places_U is not None:
                self._places_U = self._places_U.new_empty(room)
            if self._state_US is not None:
                self._state_US = self._state_US.new_empty(room, self._state_US.shape[1])
        state_US = None if self._state_US is None else self._state_US[:rows]
        places_U = None if self._places_U is None else self._places_U[:rows]
        return CaughtUp(self._weights_UD[:rows], state_US, places_U)
