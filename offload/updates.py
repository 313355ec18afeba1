"""The row optimizer at work on records: one update a row and step, by the row's owner.

Rows are read and updated block by block, straight from and to their slots, so that a block's operations find it in the
processor's cache and no copy of all records is streamed through memory.

With bf16 rows a stored weight is a bfloat16, and all arithmetic is fp32: a use of the row at step t replays the steps
it missed in fp32 from the stored weight, hands out the fp32 result, updates it, and only then rounds once, keyed by
(seed, row, t). So the bits depend neither on depth, window or resume nor on how often a row was looked at. Equality
with a dense optimizer is for fp32 rows: a dense bf16 table would be rounded at every step.

Shape suffixes: U rows, D columns of a row, C slots, W words of a record, X words of a record with fp32 weights,
P rows that missed steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.rate_history import RateHistory
from kernels.row_optimizer import decay
from offload.config import TableOptimizerConfig
from offload.placed_records import PlacedRecords
from offload.records import RecordLayout
from offload.row_rule import RowRule


@dataclass(frozen=True)
class CurrentRows:
    """Rows with the effect of all applied steps, as `RowUpdater.read` gives them.

    Attributes:
        weights_UD: fp32; the caller's own.
        behind_P: int64; which of the U rows missed steps that move weights, those of the oldest update first.
        caught_up_PX: the records of these (the first P) after those steps. The update works in this memory, and
            takes it back.
        others: int64; which of the U rows did not, in ascending order.
    """

    weights_UD: Tensor
    behind_P: Tensor
    caught_up_PX: Tensor
    others: Tensor


class RowUpdater:
    """Updates records, and brings those of long unused rows up to date.

    Args:
        config: which optimizer, and its settings.
        layout: of the records.
        seed: of the stochastic rounding of bf16 rows.
    """

    def __init__(self, config: TableOptimizerConfig, layout: RecordLayout, *, seed: int = 0) -> None:
        self._config, self._layout = config, layout
        self._rule = RowRule(config, layout, seed)
        # Every applied step's rate: dense Adam's zero-gradient steps can be replayed at any later time.
        self._rates = RateHistory()
        self._spare: Tensor | None = None  # memory of the last step's rows: fresh memory would cost page faults

    def catch_up(self, records_UX: Tensor) -> None:
        """Replays, in place, the applied steps that the rows missed (`untouched_rows: exact`).

        For unpacked records of U rows in order; `read` does the same for rows in their slots.
        """
        rows = self._read(PlacedRecords.in_order(self._layout.unpacked, records_UX))
        records_UX.index_copy_(0, rows.behind_P, rows.caught_up_PX[: len(rows.behind_P)])
        self._spare = rows.caught_up_PX

    def update(self, records_UX: Tensor, gradient_UD: Tensor, lr: float, row_ids_U: Tensor | None = None) -> None:
        """Applies one step, in place, and sets the records' version to its number among the applied steps.

        For unpacked records of U rows in order; `update_at` does the same for rows in their slots.

        Args:
            records_UX: up to date.
            gradient_UD: fp32, summed over all lookups and ranks.
            lr: the backbone's learning rate.
            row_ids_U: int64, job-wide; bf16 rows need them.
        """
        placed = PlacedRecords.in_order(self._layout.unpacked, records_UX)
        nobody, nothing = placed.slots_U[:0], records_UX[:0]
        rows = CurrentRows(nothing, nobody, nothing, placed.everything())
        self._update(placed, rows, gradient_UD, lr, row_ids_U, 1.0)

    def read(self, records_CW: Tensor, slots_U: Tensor) -> CurrentRows:
        """The rows in these slots (int64, unique) with all applied steps. The slots are left as they are."""
        return self._read(PlacedRecords(self._layout, records_CW, slots_U))

    def update_at(
        self,
        records_CW: Tensor,
        slots_U: Tensor,
        rows: CurrentRows,
        gradient_UD: Tensor,
        lr: float,
        row_ids_U: Tensor | None = None,
        *,
        gradient_scale: float = 1.0,
    ) -> None:
        """Applies one step to the rows in these slots, and sets their version to its number among the applied steps.

        Args:
            records_CW: a window or a whole shard.
            slots_U: int64, unique.
            rows: what `read` gave for them, with no update since. Used up.
            gradient_UD: fp32, summed over all lookups and ranks.
            lr: the backbone's learning rate.
            row_ids_U: int64, job-wide; bf16 rows need them.
            gradient_scale: multiplied with the gradient first.
        """
        placed = PlacedRecords(self._layout, records_CW, slots_U)
        self._update(placed, rows, gradient_UD, lr, row_ids_U, gradient_scale)
        self._spare = rows.caught_up_PX

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold beside the records; JSON-able."""
        return {"settings": self._settings(), "learning_rates": self._rates.to_list()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes over a saved state.

        Raises:
            ValueError: if records of that state mean something else under this config.
        """
        current = self._settings()
        for key, saved in state["settings"].items():
            if saved != current[key]:
                raise ValueError(
                    f"{key}: the checkpoint's tables were trained with {saved}, the config says {current[key]}; "
                    "restore that setting"
                )
        self._rates = RateHistory(state["learning_rates"])

    def _settings(self) -> dict[str, Any]:
        """What decides the meaning of a record, by config key. Replayed steps must take the settings of their time."""
        fixed = self._config.model_dump(exclude={"lr_factor"})
        settings = {f"offload.optimizer.{key}": value for key, value in fixed.items()}
        return settings | {"offload.row_dtype": self._layout.row_dtype, "model.engram.row_dim": self._layout.dim}

    def _read(self, placed: PlacedRecords) -> CurrentRows:
        behind_P, last_steps, others = self._missed(placed)
        caught_up_PX = self._memory(placed, len(behind_P))
        weights_UD = caught_up_PX.new_empty(len(placed), self._layout.dim)
        scratch_4BD = placed.scratch(4, self._layout.dim)
        for block in placed.blocks(behind_P):
            rows_BX = placed.gather(behind_P[block], caught_up_PX[block])
            self._rule.replay(rows_BX, last_steps[block], self._rates, scratch_4BD[:, : len(rows_BX)])
            weights_UD.index_copy_(0, behind_P[block], self._layout.unpacked.weights(rows_BX))
        placed.copy_weights(others, weights_UD)
        return CurrentRows(weights_UD, behind_P, caught_up_PX, others)

    def _missed(self, placed: PlacedRecords) -> tuple[Tensor, list[int], Tensor]:
        """The rows that missed steps which move weights, in the order of their last step; these steps; other rows."""
        if not self._rule.replays:
            return placed.slots_U[:0], [], placed.everything()
        versions_U = placed.versions()
        # A row that never had a gradient has moments of 0, which move nothing.
        behind_U = (versions_U > 0) & (versions_U < len(self._rates))
        last_P, order_P = versions_U[behind_U].sort(stable=True)
        return behind_U.nonzero().squeeze(1)[order_P], last_P.tolist(), (~behind_U).nonzero().squeeze(1)

    def _memory(self, placed: PlacedRecords, rows: int) -> Tensor:
        spare, self._spare = self._spare, None
        if spare is None or len(spare) < rows or spare.device != placed.records_CW.device:
            spare = placed.records_CW.new_empty(rows + rows // 4, self._layout.unpacked.words)
        return spare

    def _update(
        self,
        placed: PlacedRecords,
        rows: CurrentRows,
        gradient_UD: Tensor,
        lr: float,
        row_ids_U: Tensor | None,
        gradient_scale: float,
    ) -> None:
        decayed_U = self._decayed_states(placed)
        lr *= self._config.lr_factor
        self._rates.append(lr)
        memory_2BD = placed.scratch(2, self._layout.dim)
        for places_B, rows_BX in _blocks(placed, rows):
            grad_BD, scratch_BD = memory_2BD[:, : len(places_B)]
            torch.index_select(gradient_UD, 0, places_B, out=grad_BD)
            if gradient_scale != 1:
                grad_BD.mul_(gradient_scale)
            if decayed_U is not None:
                self._layout.unpacked.state(rows_BX)[:, 0] = decayed_U[places_B]
            ids_B = None if row_ids_U is None else row_ids_U[places_B]
            self._rule.step(rows_BX, grad_BD, ids_B, scratch_BD, step=len(self._rates), lr=lr)
            placed.scatter(places_B, rows_BX)

    def _decayed_states(self, placed: PlacedRecords) -> Tensor | None:
        if not self._rule.decays:
            return None
        return decay(placed.row_states(), len(self._rates) - placed.versions(), self._rule.decay)


def _blocks(placed: PlacedRecords, rows: CurrentRows) -> Iterator[tuple[Tensor, Tensor]]:
    """All rows, in blocks: their places among the U rows, and their records [B, X] as of now."""
    for block in placed.blocks(rows.behind_P):
        yield rows.behind_P[block], rows.caught_up_PX[block]
    scratch_BX = placed.scratch(placed.layout.unpacked.words)
    for block in placed.blocks(rows.others):
        places_B = rows.others[block]
        yield places_B, placed.gather(places_B, scratch_BX[: len(places_B)])
