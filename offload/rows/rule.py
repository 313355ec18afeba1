"""What the optimizer does to a block of rows.

Shape suffixes: B rows of a block, D columns of a row, X words of a record with fp32 weights.
"""

from collections.abc import Sequence

from torch import Tensor

from kernels.rows.rate_history import RateHistory
from kernels.rows.stochastic_rounding import stochastic_round_bf16_
from offload.optimizers.row_optimizer import RowOptimizer
from offload.rows.records import RecordLayout


class RowRule:
    """One step, or missed steps, of the optimizer on records with fp32 weights.

    Args:
        optimizer: whose steps these are.
        layout: of the records as they are stored; decides on the rounding of the weights.
        seed: of the rounding.
    """

    def __init__(self, optimizer: RowOptimizer, layout: RecordLayout, seed: int) -> None:
        self._optimizer, self._seed = optimizer, seed
        self._layout, self._rounds = layout.unpacked, layout.row_dtype == "bf16"

    def step(
        self,
        rows_BX: Tensor,
        grad_BD: Tensor,
        row_ids_B: Tensor | None,
        scratch_BD: Tensor,
        *,
        step: int,
        lr: float,
    ) -> None:
        """Applies applied step number `step` with the rows' own learning rate, in place, version included.

        Raises:
            ValueError: row ids are missing for bf16 rows.
        """
        weights_BD = self._layout.weights(rows_BX)
        self._optimizer.step(weights_BD, self._layout.state(rows_BX), grad_BD, scratch_BD, step=step, lr=lr)
        if self._rounds:
            if row_ids_B is None:
                raise ValueError("bf16 rows are rounded by their ids, but none are given")
            stochastic_round_bf16_(weights_BD, row_ids_B, seed=self._seed, step=step)
        self._layout.version(rows_BX).fill_(step)

    def replay(self, rows_BX: Tensor, last_steps: Sequence[int], rates: RateHistory, scratch_4BD: Tensor) -> None:
        """Applies the steps without gradient after each row's last (ascending), in place; versions stay."""
        parts = self._layout.weights(rows_BX), self._layout.state(rows_BX)
        self._optimizer.replay(*parts, last_steps, rates, scratch_4BD)
