"""Applies the row optimizer to records: one update per row and step, by the row's owner.

The stored weights of bf16 rows and the stored moments of bf16 state are bfloat16, and all arithmetic is fp32: a use of
the row at step t replays the steps it missed in fp32 from what is stored, hands out the fp32 result, updates it, and
only then rounds once, keyed by (seed, row, t). So the bits depend neither on depth, window or resume nor on how often a
row was read. Equality with a dense optimizer is for records in fp32: a dense bf16 table would be rounded every step.

Shape suffixes: U rows, D columns of a row, C slots, W words of a record, X words of a record in fp32.
"""

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from kernels import compiled_loops
from kernels.gather.values import RowValues
from kernels.rows.rate_history import RateHistory
from offload.config import TableOptimizerConfig
from offload.optimizers import OPTIMIZERS
from offload.optimizers.row_optimizer import StoredRows
from offload.rows.blocks import BlockUpdates
from offload.rows.in_slots import KernelUpdates
from offload.rows.placed import PlacedRecords
from offload.rows.records import RecordLayout

_BEFORE_THERE_WAS_A_CHOICE = {"offload.optimizer.state_dtype": "fp32"}
"""Settings that old checkpoints do not name."""


Got = TypeVar("Got")


class RowPass(Protocol[Got]):
    """How rows are read and updated where they are. Every implementation gives the same bits."""

    def read(self, placed: PlacedRecords) -> tuple[RowValues, Got]:
        """The rows' weights with all applied steps, and what an update of the same rows starts from, until the next
        call. The slots are left as they are."""

    def update(
        self, placed: PlacedRecords, got: Got, gradient_UD: Tensor, row_ids_U: Tensor | None, gradient_scale: float
    ) -> None:
        """Applies the last of the applied steps to rows that were read."""


@dataclass(frozen=True)
class ReadRows:
    """Rows in their slots, as they were read.

    Attributes:
        placed: where they are.
        weights: with all applied steps, where they are stored if that is possible; the next read may overwrite others.
        got: what the update starts from.
    """

    placed: PlacedRecords
    weights: RowValues
    got: Any


class RowUpdater:
    """Updates records, and brings those of long unused rows up to date.

    Args:
        config: which optimizer, and its settings.
        layout: of the records.
        seed: of the stochastic rounding of bf16 rows.
        device: of the records in slots.
    """

    def __init__(
        self,
        config: TableOptimizerConfig,
        layout: RecordLayout,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self._config, self._layout = config, layout
        self._optimizer = OPTIMIZERS[config.type](config)
        self._stored = StoredRows(layout.row_dtype == "bf16", seed, torch.device(device))
        self._take_rates(RateHistory())

    def catch_up(self, records_UX: Tensor) -> None:
        """Replays, in place, the applied steps that the rows missed, unless `untouched_rows` is `lazy`.

        For unpacked records of U rows in order; `read` does the same for rows in their slots. Always in plain PyTorch
        on the CPU: what the kernels are compared with.
        """
        reference_UX = records_UX.cpu()
        self._in_order.catch_up(reference_UX)
        records_UX.copy_(reference_UX)

    def update(self, records_UX: Tensor, gradient_UD: Tensor, lr: float, row_ids_U: Tensor | None = None) -> None:
        """Applies one step, in place, and sets the records' version to its number among the applied steps.

        For unpacked records of U rows in order; `update_at` does the same for rows in their slots. Always in plain
        PyTorch on the CPU, like `catch_up`.

        Args:
            records_UX: up to date.
            gradient_UD: fp32, summed over all lookups and ranks.
            lr: the backbone's learning rate.
            row_ids_U: int64, job-wide; bf16 rows need them.
        """
        self._rates.append(lr * self._config.lr_factor)
        reference_UX = records_UX.cpu()
        self._in_order.update_current(reference_UX, gradient_UD.cpu(), None if row_ids_U is None else row_ids_U.cpu())
        records_UX.copy_(reference_UX)

    def read(self, records_CW: Tensor, slots_U: Tensor) -> ReadRows:
        """The weights of the rows in these slots with all applied steps. The slots are left as they are.

        Args:
            records_CW: a window or a whole shard.
            slots_U: int64, unique.
        """
        placed = PlacedRecords(self._layout, records_CW, slots_U)
        return ReadRows(placed, *self._in_slots.read(placed))

    def look_at(self, records_UW: Tensor) -> RowValues:
        """The weights with all applied steps, of records of U rows in order, which stay as they are.

        The next call may overwrite the weights; `read` does not. Nor does this overwrite what `update_at` works on.
        """
        weights, _ = self._aside.read(PlacedRecords.in_order(self._layout, records_UW))
        return weights

    def update_at(
        self,
        rows: ReadRows,
        gradient_UD: Tensor,
        lr: float,
        row_ids_U: Tensor | None = None,
        *,
        gradient_scale: float = 1.0,
    ) -> None:
        """Applies one step to rows in their slots, and sets their version to its number.

        Args:
            rows: that were read last, with no update since.
            gradient_UD: fp32, summed over all lookups and ranks.
            lr: the backbone's learning rate.
            row_ids_U: int64, job-wide; bf16 rows need them.
            gradient_scale: the gradient is first multiplied by it.
        """
        self._rates.append(lr * self._config.lr_factor)
        self._in_slots.update(rows.placed, rows.got, gradient_UD, row_ids_U, gradient_scale)

    @property
    def applied(self) -> int:
        """Updates so far: the version of the rows that had the last one."""
        return len(self._rates)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold beside the records, as a JSON object."""
        return {"settings": self._settings(), "learning_rates": self._rates.to_list()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Loads a saved state.

        Raises:
            ValueError: if records of that state mean something else under this config.
        """
        current = self._settings()
        for key, saved in (_BEFORE_THERE_WAS_A_CHOICE | state["settings"]).items():
            if saved != current[key]:
                raise ValueError(
                    f"{key}: the checkpoint's tables were trained with {saved}, the config says {current[key]}; "
                    "restore that setting"
                )
        self._take_rates(RateHistory(state["learning_rates"]))

    def _settings(self) -> dict[str, Any]:
        """What decides the meaning of a record, by config key. Replayed steps must use the settings of their time."""
        fixed = self._config.model_dump(exclude={"lr_factor"})
        settings = {f"offload.optimizer.{key}": value for key, value in fixed.items()}
        return settings | {"offload.row_dtype": self._layout.row_dtype, "model.engram.row_dim": self._layout.dim}

    def _take_rates(self, rates: RateHistory) -> None:
        # Every applied step's rate: dense Adam's zero-gradient steps can be replayed at any later time.
        self._rates = rates
        self._in_order = self._open_blocks(rates)
        self._in_slots, self._aside = self._open_pass(rates), self._open_pass(rates)

    def _open_blocks(self, rates: RateHistory) -> BlockUpdates:
        return BlockUpdates(self._optimizer, self._layout, rates, self._stored.seed)

    def _open_pass(self, rates: RateHistory) -> RowPass[Any]:
        stored = self._stored
        if stored.device.type == "cuda":
            kernels = self._optimizer.triton(rates, stored)
        elif compiled_loops.available():
            kernels = self._optimizer.compiled(rates, stored)
        else:
            return self._open_blocks(rates)
        dim = self._layout.dim
        state_size = self._optimizer.state_size(dim) if self._optimizer.replays else None
        return KernelUpdates(kernels, dim, state_size, stored.device)
