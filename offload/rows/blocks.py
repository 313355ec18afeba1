"""Rows read and updated in their slots by plain PyTorch, under any row optimizer and in any dtype.

Block by block, so that a block's operations find it in the processor's cache and no copy of all records is streamed
through memory.

Shape suffixes: U rows, D columns of a row, W words of a record, X words of a record in fp32, P rows that missed steps,
B rows of a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.gather.values import RowValues
from kernels.rows.rate_history import RateHistory
from kernels.rows.rowwise import decay
from offload.optimizers.row_optimizer import RowOptimizer
from offload.rows.placed import PlacedRecords
from offload.rows.records import RecordLayout
from offload.rows.rule import RowRule


@dataclass(frozen=True)
class Missed:
    """Which of the rows that were read missed earlier steps.

    Attributes:
        behind_P: int64; which of the U rows missed steps that move weights, those of the oldest update first.
        caught_up_PX: the records of these (the first P) after those steps, until the next read. The update works in
            this memory.
        others: int64; which of the U rows did not, in ascending order.
    """

    behind_P: Tensor
    caught_up_PX: Tensor
    others: Tensor


class BlockUpdates:
    """See `offload.rows.updater.RowPass`.

    Args:
        optimizer: of the rows.
        layout: of the records.
        rates: of all applied steps.
        seed: of the stochastic rounding of bf16 rows.
    """

    def __init__(self, optimizer: RowOptimizer, layout: RecordLayout, rates: RateHistory, seed: int) -> None:
        self._optimizer, self._layout, self._rates = optimizer, layout, rates
        self._rule = RowRule(optimizer, layout, seed)
        self._caught_up_PX: Tensor | None = None  # kept from step to step: fresh memory would cost page faults

    def read(self, placed: PlacedRecords) -> tuple[RowValues, Missed]:
        """See `RowPass.read`."""
        behind_P, last_steps, others = self._find_missed(placed)
        caught_up_PX = self._memory(placed, len(behind_P))
        weights_UD = caught_up_PX.new_empty(len(placed), self._layout.dim)
        scratch_4BD = placed.scratch(4, self._layout.dim)
        for block in placed.blocks(behind_P):
            rows_BX = placed.gather(behind_P[block], caught_up_PX[block])
            self._rule.replay(rows_BX, last_steps[block], self._rates, scratch_4BD[:, : len(rows_BX)])
            weights_UD.index_copy_(0, behind_P[block], self._layout.unpacked.weights(rows_BX))
        placed.copy_weights(others, weights_UD)
        return RowValues(weights_UD), Missed(behind_P, caught_up_PX, others)

    def update(
        self,
        placed: PlacedRecords,
        missed: Missed,
        gradient_UD: Tensor,
        row_ids_U: Tensor | None,
        gradient_scale: float,
    ) -> None:
        """See `RowPass.update`."""
        step, lr = len(self._rates), self._rates[len(self._rates)]
        decayed_U = self._decayed_states(placed)
        memory_2BD = placed.scratch(2, self._layout.dim)
        for indices_B, rows_BX in _blocks(placed, missed):
            grad_BD, scratch_BD = memory_2BD[:, : len(indices_B)]
            torch.index_select(gradient_UD, 0, indices_B, out=grad_BD)
            if gradient_scale != 1:
                grad_BD.mul_(gradient_scale)
            if decayed_U is not None:
                self._layout.unpacked.state(rows_BX)[:, 0] = decayed_U[indices_B]
            ids_B = None if row_ids_U is None else row_ids_U[indices_B]
            self._rule.step(rows_BX, grad_BD, ids_B, scratch_BD, step=step, lr=lr)
            placed.scatter(indices_B, rows_BX)

    def catch_up(self, records_UX: Tensor) -> None:
        """Replays, in place, the steps that the rows missed: unpacked records of U rows in order."""
        _, missed = self.read(PlacedRecords.in_order(self._layout.unpacked, records_UX))
        records_UX.index_copy_(0, missed.behind_P, missed.caught_up_PX[: len(missed.behind_P)])

    def update_current(self, records_UX: Tensor, gradient_UD: Tensor, row_ids_U: Tensor | None) -> None:
        """Applies the last of the applied steps, in place: unpacked records of U rows in order, up to date."""
        placed = PlacedRecords.in_order(self._layout.unpacked, records_UX)
        nobody = Missed(placed.slots_U[:0], records_UX[:0], placed.everything())
        self.update(placed, nobody, gradient_UD, row_ids_U, 1.0)

    def _find_missed(self, placed: PlacedRecords) -> tuple[Tensor, list[int], Tensor]:
        """The rows that missed steps which move weights, in the order of their last step; these steps; other rows."""
        if not self._optimizer.replays:
            return placed.slots_U[:0], [], placed.everything()
        versions_U = placed.versions()
        # A row that never had a gradient has moments of 0, which move nothing.
        behind_U = (versions_U > 0) & (versions_U < len(self._rates))
        last_P, order_P = versions_U[behind_U].sort(stable=True)
        return behind_U.nonzero().squeeze(1)[order_P], last_P.tolist(), (~behind_U).nonzero().squeeze(1)

    def _memory(self, placed: PlacedRecords, rows: int) -> Tensor:
        kept_PX = self._caught_up_PX
        if kept_PX is None or len(kept_PX) < rows or kept_PX.device != placed.records_CW.device:
            self._caught_up_PX = kept_PX = placed.records_CW.new_empty(rows + rows // 4, self._layout.unpacked.words)
        return kept_PX

    def _decayed_states(self, placed: PlacedRecords) -> Tensor | None:
        factor = self._optimizer.state_decay
        if factor is None:
            return None
        return decay(placed.row_states(), len(self._rates) - 1 - placed.versions(), factor)


def _blocks(placed: PlacedRecords, missed: Missed) -> Iterator[tuple[Tensor, Tensor]]:
    """All rows, in blocks: their indices among the U rows, and their records [B, X] as of now."""
    for block in placed.blocks(missed.behind_P):
        yield missed.behind_P[block], missed.caught_up_PX[block]
    scratch_BX = placed.scratch(placed.layout.unpacked.words)
    for block in placed.blocks(missed.others):
        indices_B = missed.others[block]
        yield indices_B, placed.gather(indices_B, scratch_BX[: len(indices_B)])
