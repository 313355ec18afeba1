"""What the optimizer does to a block of rows.

Shape suffixes: B rows of a block, D columns of a row, S numbers of state, X words of a record in fp32.
"""

from collections.abc import Sequence

from torch import Tensor

from kernels.rows.rate_history import RateHistory
from kernels.rows.row_update import rounded_by
from kernels.rows.stochastic_rounding import stochastic_round_bf16_
from offload.optimizers.row_optimizer import RowOptimizer
from offload.rows.records import RecordLayout


class RowRule:
    """One step, or missed steps, of the optimizer on records in fp32.

    Args:
        optimizer: whose steps these are.
        layout: of the records as they are stored; decides what is rounded.
        seed: of the rounding.
    """

    def __init__(self, optimizer: RowOptimizer, layout: RecordLayout, seed: int) -> None:
        self._optimizer, self._seed = optimizer, seed
        self._layout, self._stored = layout.unpacked, layout

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
        """Applies step number `step` of the applied ones, with the rows' own learning rate, in place, version included.

        Raises:
            ValueError: something is rounded, and there are no row ids.
        """
        weights_BD, state_BS = self._layout.weights(rows_BX), self._layout.state(rows_BX)
        self._optimizer.step(weights_BD, state_BS, grad_BD, scratch_BD, step=step, lr=lr)
        if self._stored.packed:
            self._round(weights_BD, state_BS, row_ids_B, step)
        self._layout.version(rows_BX).fill_(step)

    def _round(self, weights_BD: Tensor, state_BS: Tensor, row_ids_B: Tensor | None, step: int) -> None:
        ids_B = rounded_by(row_ids_B)
        if self._stored.row_dtype == "bf16":
            stochastic_round_bf16_(weights_BD, ids_B, seed=self._seed, step=step)
        if self._stored.state_dtype == "bf16":
            stochastic_round_bf16_(state_BS, ids_B, seed=self._seed, step=step, part="state")

    def replay(self, rows_BX: Tensor, last_steps: Sequence[int], rates: RateHistory, scratch_4BD: Tensor) -> None:
        """Applies the steps without gradient after each row's last (ascending), in place; versions stay."""
        parts = self._layout.weights(rows_BX), self._layout.state(rows_BX)
        self._optimizer.replay(*parts, last_steps, rates, scratch_4BD)
