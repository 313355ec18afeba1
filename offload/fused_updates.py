"""Rows read and updated in their slots by compiled kernels, in one pass over memory: fp32 rows under Adam, on a CPU.

Shape suffixes: U rows, D columns of a row, X words of a record.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from kernels.adam_steps import AdamSteps
from kernels.rate_history import RateHistory
from offload.config import TableOptimizerConfig
from offload.placed_records import PlacedRecords
from offload.records import RecordLayout


class FusedAdamUpdates:
    """See `offload.updates.RowPass`.

    Args:
        config: Adam's settings.
        layout: of fp32 records.
        rates: of all applied steps.
    """

    def __init__(self, config: TableOptimizerConfig, layout: RecordLayout, rates: RateHistory) -> None:
        self._steps = AdamSteps(rates, (config.beta1, config.beta2), config.eps)
        self._replays = config.untouched_rows == "exact"
        self._dim = layout.dim
        # Kept from step to step: fresh memory would cost page faults.
        self._weights_UD: Tensor | None = None
        self._caught_up_UX: Tensor | None = None

    @staticmethod
    def can(config: TableOptimizerConfig, layout: RecordLayout, device: torch.device) -> bool:
        """Whether the kernels take these records here."""
        fits = config.type == "adam" and layout.row_dtype == "fp32" and device.type == "cpu"
        return fits and find_spec("numba") is not None

    def read(self, placed: PlacedRecords) -> Tensor:
        """See `RowPass.read`. The weights stand in memory that the next call overwrites."""
        from kernels.row_adam_numba import read_rows

        weights_UD = self._weights_UD = _at_least(self._weights_UD, placed, self._dim)
        if self._replays:
            self._caught_up_UX = _at_least(self._caught_up_UX, placed, placed.records_CW.shape[1])
        read_rows(placed.records_CW, placed.slots_U, self._steps, weights_UD[: len(placed)], self._caught_up_UX)
        return weights_UD[: len(placed)]

    def update(
        self, placed: PlacedRecords, gradient_UD: Tensor, row_ids_U: Tensor | None, gradient_scale: float
    ) -> None:
        """See `RowPass.update`."""
        from kernels.row_adam_numba import update_rows

        rows = placed.records_CW, placed.slots_U
        update_rows(*rows, self._steps, gradient_UD, self._caught_up_UX, gradient_scale=gradient_scale)


def _at_least(memory: Tensor | None, placed: PlacedRecords, words: int) -> Tensor:
    if memory is None or len(memory) < len(placed):
        return placed.records_CW.new_empty(len(placed) + len(placed) // 4, words)
    return memory
