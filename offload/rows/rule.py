"""What the optimizer does to a block of rows.

Shape suffixes: B rows of a block, D columns of a row, X words of a record with fp32 weights.
"""

from collections.abc import Sequence

from torch import Tensor

from kernels.rows.adam import adam, replay_adam
from kernels.rows.rate_history import RateHistory
from kernels.rows.rowwise import rowwise_adagrad, rowwise_rmsprop
from kernels.rows.stochastic_rounding import stochastic_round_bf16_
from offload.config import TableOptimizerConfig
from offload.rows.records import RecordLayout


class RowRule:
    """One step, or missed steps, of the optimizer on records with fp32 weights.

    Args:
        config: which optimizer, and its settings.
        layout: of the records as they are stored; decides on the rounding of the weights.
        seed: of the rounding.
    """

    def __init__(self, config: TableOptimizerConfig, layout: RecordLayout, seed: int) -> None:
        self._config, self._seed = config, seed
        self._betas = (config.beta1, config.beta2)
        self._layout, self._rounds = layout.unpacked, layout.row_dtype == "bf16"
        exact = config.untouched_rows == "exact"
        self.replays = exact and config.type == "adam"
        """Whether a step without gradient moves a row's weights."""
        self.decays = exact and config.type == "rowwise_rmsprop"
        """Whether a step without gradient changes a row's state alone."""

    @property
    def decay(self) -> float:
        """The factor of a decaying state for each step without gradient."""
        return self._config.beta2

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
        self._apply(rows_BX, grad_BD, scratch_BD, step, lr)
        if self._rounds:
            if row_ids_B is None:
                raise ValueError("bf16 rows are rounded by their ids, but none are given")
            stochastic_round_bf16_(self._layout.weights(rows_BX), row_ids_B, seed=self._seed, step=step)
        self._layout.version(rows_BX).fill_(step)

    def replay(self, rows_BX: Tensor, last_steps: Sequence[int], rates: RateHistory, scratch_4BD: Tensor) -> None:
        """Applies the steps without gradient after each row's last (ascending), in place; versions stay."""
        replay_adam(
            *self._adam_parts(rows_BX),
            last_steps,
            rates,
            betas=self._betas,
            eps=self._config.eps,
            scratch_4UD=scratch_4BD,
        )

    def _apply(self, rows_BX: Tensor, grad_BD: Tensor, scratch_BD: Tensor, step: int, lr: float) -> None:
        config, weights_BD, state_B1 = self._config, self._layout.weights(rows_BX), self._layout.state(rows_BX)
        match config.type:
            case "adam":
                parts = self._adam_parts(rows_BX)
                adam(*parts, grad_BD, step=step, lr=lr, betas=self._betas, eps=config.eps, scratch_UD=scratch_BD)
            case "rowwise_adagrad":
                rowwise_adagrad(weights_BD, state_B1, grad_BD, lr=lr, eps=config.eps, scratch_UD=scratch_BD)
            case "rowwise_rmsprop":
                rowwise_rmsprop(
                    weights_BD, state_B1, grad_BD, lr=lr, beta2=config.beta2, eps=config.eps, scratch_UD=scratch_BD
                )

    def _adam_parts(self, rows_BX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        exp_avg_BD, exp_avg_sq_BD = self._layout.state(rows_BX).split(self._layout.dim, dim=1)
        return self._layout.weights(rows_BX), exp_avg_BD, exp_avg_sq_BD
