"""The row optimizer at work on records: one update a row and step, by the row's owner.

Shape suffixes: U rows, D columns of a row, W words of a record.
"""

from typing import Any

from torch import Tensor

from kernels.row_optimizer import adam, replay_adam, rowwise_adagrad
from offload.config import TableOptimizerConfig
from offload.records import RecordLayout


class RowUpdater:
    """Updates records, and brings those of long unused rows up to date.

    Args:
        config: which optimizer, and its settings.
        layout: of the records.
    """

    def __init__(self, config: TableOptimizerConfig, layout: RecordLayout) -> None:
        self._config, self._layout = config, layout
        # Every applied step's rate: dense Adam's zero-gradient steps can be replayed at any later time.
        self._learning_rates: list[float] = []

    def catch_up(self, records_UW: Tensor) -> None:
        """Replays, in place, the applied steps that the rows missed (`untouched_rows: exact`)."""
        if self._config.type != "adam" or self._config.untouched_rows != "exact":
            return
        replay_adam(
            *self._adam_parts(records_UW),
            self._layout.version(records_UW),
            self._learning_rates,
            betas=(self._config.beta1, self._config.beta2),
            eps=self._config.eps,
        )

    def update(self, records_UW: Tensor, gradient_UD: Tensor, lr: float) -> None:
        """Applies one step, in place, and sets the records' version to its number among the applied steps.

        Args:
            records_UW: up to date.
            gradient_UD: fp32, summed over all lookups and ranks.
            lr: the backbone's learning rate.
        """
        lr *= self._config.lr_factor
        self._learning_rates.append(lr)
        step = len(self._learning_rates)
        if self._config.type == "adam":
            betas = (self._config.beta1, self._config.beta2)
            adam(*self._adam_parts(records_UW), gradient_UD, step=step, lr=lr, betas=betas, eps=self._config.eps)
        else:
            weights, state = self._layout.weights(records_UW), self._layout.state(records_UW)
            rowwise_adagrad(weights, state, gradient_UD, lr=lr, eps=self._config.eps)
        self._layout.version(records_UW).fill_(step)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold beside the records; JSON-able."""
        return {"optimizer": self._config.type, "learning_rates": self._learning_rates}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes over a saved state.

        Raises:
            ValueError: if it is another optimizer's.
        """
        if state["optimizer"] != self._config.type:
            raise ValueError(
                f"offload.optimizer.type: the checkpoint's tables were trained with {state['optimizer']}, "
                f"the config says {self._config.type}"
            )
        self._learning_rates = list(state["learning_rates"])

    def _adam_parts(self, records_UW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        exp_avg, exp_avg_sq = self._layout.state(records_UW).split(self._layout.dim, dim=1)
        return self._layout.weights(records_UW), exp_avg, exp_avg_sq
