"""Rows read and updated in their slots by compiled kernels, in one pass over memory.

Shape suffixes: U rows, D columns of a row, X words of a record.
"""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kernels import compiled_loops
from kernels.rows.adam_rates import AdamRates
from kernels.rows.rate_history import RateHistory
from offload.config import TableOptimizerConfig
from offload.rows.placed import PlacedRecords
from offload.rows.records import RecordLayout


def adam_rates(config: TableOptimizerConfig, rates: RateHistory, device: torch.device) -> AdamRates:
    """What Adam's steps so far multiply with, on the device of the kernels."""
    return AdamRates(rates, (config.beta1, config.beta2), config.eps, device)


class CompiledAdamUpdates:
    """fp32 rows under Adam, on a CPU. See `offload.updates.RowPass`.

    Args:
        config: Adam's settings.
        layout: of fp32 records.
        rates: of all applied steps.
    """

    def __init__(self, config: TableOptimizerConfig, layout: RecordLayout, rates: RateHistory) -> None:
        self._rates = adam_rates(config, rates, torch.device("cpu"))
        self._replays = config.untouched_rows == "exact"
        self._layout = layout
        # Kept from step to step: fresh memory would cost page faults.
        self._weights_UD, self._caught_up_UX = torch.empty(0, layout.dim), torch.empty(0, layout.words)

    @staticmethod
    def fits(config: TableOptimizerConfig, layout: RecordLayout, device: torch.device) -> bool:
        """Whether the kernels take such records."""
        return (
            compiled_loops.available() and config.type == "adam" and layout.row_dtype == "fp32" and device.type == "cpu"
        )

    def read(self, placed: PlacedRecords) -> Tensor:
        """See `RowPass.read`."""
        from kernels.rows.adam_numba import read_rows

        self._weights_UD = at_least(self._weights_UD, placed)
        if self._replays:
            self._caught_up_UX = at_least(self._caught_up_UX, placed)
        weights_UD = self._weights_UD[: len(placed)]
        read_rows(placed.records_CW, placed.slots_U, self._rates, weights_UD, self._caught_up)
        return weights_UD

    def update(
        self, placed: PlacedRecords, gradient_UD: Tensor, row_ids_U: Tensor | None, gradient_scale: float
    ) -> None:
        """See `RowPass.update`."""
        from kernels.rows.adam_numba import update_rows

        rows = placed.records_CW, placed.slots_U
        update_rows(*rows, self._rates, gradient_UD, self._caught_up, gradient_scale=gradient_scale)

    @property
    def _caught_up(self) -> Tensor | None:
        return self._caught_up_UX if self._replays else None


class TritonUpdates:
    """Rows of any dtype under any row optimizer, on a GPU. See `offload.updates.RowPass`.

    Nothing here waits for the device, and nothing is allocated but for a step with more rows than any before.

    Args:
        config: which optimizer, and its settings.
        layout: of the records.
        rates: of all applied steps.
        seed: of the stochastic rounding of bf16 rows.
        device: of the records.
    """

    def __init__(
        self,
        config: TableOptimizerConfig,
        layout: RecordLayout,
        rates: RateHistory,
        seed: int,
        device: torch.device,
    ) -> None:
        self._config, self._layout, self._history, self._seed, self._device = config, layout, rates, seed, device
        self._bf16, self._exact = layout.row_dtype == "bf16", config.untouched_rows == "exact"
        self._weights_UD = torch.empty(0, layout.dim, device=device)

    def read(self, placed: PlacedRecords) -> Tensor:
        """See `RowPass.read`."""
        self._weights_UD = at_least(self._weights_UD, placed)
        weights_UD = self._weights_UD[: len(placed)]
        rows = placed.records_CW, placed.slots_U
        if self._config.type == "adam":
            from kernels.rows.adam_triton import read_rows as read_adam_rows

            read_adam_rows(*rows, self._rates, weights_UD, bf16=self._bf16, replays=self._exact)
        else:
            from kernels.rows.records_triton import read_rows

            read_rows(*rows, weights_UD, bf16=self._bf16)
        return weights_UD

    def update(
        self, placed: PlacedRecords, gradient_UD: Tensor, row_ids_U: Tensor | None, gradient_scale: float
    ) -> None:
        """See `RowPass.update`."""
        common: dict[str, Any] = {"bf16": self._bf16, "seed": self._seed, "gradient_scale": gradient_scale}
        rows = placed.records_CW, placed.slots_U
        if self._config.type == "adam":
            from kernels.rows.adam_triton import update_rows

            update_rows(*rows, self._rates, gradient_UD, row_ids_U, replays=self._exact, **common)
            return
        from kernels.rows.rowwise_triton import rowwise_adagrad, rowwise_rmsprop

        step = len(self._history)
        common |= {"step": step, "lr": self._history[step], "eps": self._config.eps}
        if self._config.type == "rowwise_adagrad":
            rowwise_adagrad(*rows, gradient_UD, row_ids_U, **common)
        else:
            common |= {"beta2": self._config.beta2, "decays": self._exact}
            rowwise_rmsprop(*rows, gradient_UD, row_ids_U, **common)

    @cached_property
    def _rates(self) -> AdamRates:
        return adam_rates(self._config, self._history, self._device)


def at_least(memory_UX: Tensor, placed: PlacedRecords) -> Tensor:
    """Memory like the given, for so many rows at least: the same, if it suffices."""
    if len(memory_UX) < len(placed):
        return memory_UX.new_empty(len(placed) + len(placed) // 4, memory_UX.shape[1])
    return memory_UX
