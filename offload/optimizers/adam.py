"""Adam with two moments per element, dense or lazy.

Shape suffixes: as in `offload.optimizers.row_optimizer`.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from offload.optimizers.row_optimizer import RowKernels, RowOptimizer, Settings, StoredRows

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from kernels.rows.adam_closed import GapSums
    from kernels.rows.adam_rates import AdamRates
    from kernels.rows.caught_up import CaughtUp
    from kernels.rows.rate_history import RateHistory


class Adam(RowOptimizer):
    """See `kernels.rows.adam`. A step without a gradient moves a row along its old moments."""

    name, title, keeps = "adam", "Adam", "two moments an element"
    moves_resting_rows = True
    state_dtypes = ("fp32", "bf16")

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._known_gaps: GapSums | None = None  # of the rates, and on the device, of the last replay

    @staticmethod
    def state_size(dim: int) -> int:
        """Both moments."""
        return 2 * dim

    @classmethod
    def check(cls, settings: Settings) -> None:
        """See `RowOptimizer.check`: gaps have a closed form only under some settings."""
        super().check(settings)
        betas_fit = settings.beta2 >= 0.9 and 0.5 <= settings.beta1 <= 0.95 * settings.beta2**0.5
        if _closed(settings) and not (betas_fit and settings.eps >= 1e-12):
            raise ValueError(
                "untouched_rows=closed requires beta2 of at least 0.9, beta1 from 0.5 to 0.95 times its square root, "
                "and eps of at least 1e-12: set untouched_rows to exact"
            )

    def step(
        self, weights_BD: Tensor, state_BS: Tensor, grad_BD: Tensor, scratch_BD: Tensor, *, step: int, lr: float
    ) -> None:
        """See `RowOptimizer.step`."""
        from kernels.rows.adam import adam

        betas, eps = _betas(self.settings), self.settings.eps
        parts = _parts(weights_BD, state_BS)
        adam(*parts, grad_BD, step=step, lr=lr, betas=betas, eps=eps, scratch_UD=scratch_BD)

    def replay(
        self,
        weights_BD: Tensor,
        state_BS: Tensor,
        last_steps: Sequence[int],
        rates: RateHistory,
        scratch_4BD: Tensor,
    ) -> None:
        """See `RowOptimizer.replay`."""
        from kernels.rows.adam import replay_adam
        from kernels.rows.adam_closed import close_gaps

        betas, eps = _betas(self.settings), self.settings.eps
        parts = _parts(weights_BD, state_BS)
        if _closed(self.settings):
            close_gaps(*parts, last_steps, self._gaps(rates, weights_BD.device))
            return
        replay_adam(*parts, last_steps, rates, betas=betas, eps=eps, scratch_4UD=scratch_4BD)

    def _gaps(self, rates: RateHistory, device: torch.device) -> GapSums:
        from kernels.rows.adam_closed import GapSums

        known = self._known_gaps
        if known is None or known.history is not rates or known.device != device:
            known = self._known_gaps = GapSums(rates, _betas(self.settings), self.settings.eps, device)
        return known

    def triton(self, rates: RateHistory, rows: StoredRows) -> RowKernels:
        """See `RowOptimizer.triton`."""
        from kernels.rows.adam_triton import read_rows, update_rows

        return _AdamKernels(read_rows, update_rows, self.settings, rates, rows)

    def compiled(self, rates: RateHistory, rows: StoredRows) -> RowKernels:
        """See `RowOptimizer.compiled`."""
        from kernels.rows.adam_numba import find_rows, update_rows

        return _CompiledAdam(find_rows, update_rows, self.settings, rates, rows)


def _parts(weights_BD: Tensor, state_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    exp_avg_BD, exp_avg_sq_BD = state_BS.split(weights_BD.shape[1], dim=1)
    return weights_BD, exp_avg_BD, exp_avg_sq_BD


def _closed(settings: Settings) -> bool:
    return settings.untouched_rows == "closed"


def _betas(settings: Settings) -> tuple[float, float]:
    return settings.beta1, settings.beta2


class _AdamKernels:
    def __init__(self, read: Any, update: Any, settings: Settings, rates: RateHistory, rows: StoredRows) -> None:
        self._read, self._update = read, update
        self._settings, self._history, self._rows = settings, rates, rows
        self._dtypes = {"bf16": rows.bf16, "bf16_state": settings.state_dtype == "bf16"}

    @cached_property
    def _rates(self) -> AdamRates:  # pinned memory, which kernels that are never used do without
        from kernels.rows.adam_rates import AdamRates

        settings = self._settings
        closed = _closed(settings)
        return AdamRates(self._history, _betas(settings), settings.eps, self._rows.device, closed=closed)

    def read(self, records_CW: Tensor, slots_U: Tensor, got: CaughtUp) -> Tensor | None:
        self._read(records_CW, slots_U, self._rates, got, **self._dtypes)
        return got.places_U

    def update(
        self,
        records_CW: Tensor,
        slots_U: Tensor,
        got: CaughtUp,
        grad_UD: Tensor,
        row_ids_U: Tensor | None,
        gradient_scale: float,
    ) -> None:
        from kernels.rows.row_update import RowUpdate

        update = RowUpdate(
            records_CW, slots_U, grad_UD, row_ids_U, step=len(self._history), seed=self._rows.seed,
            gradient_scale=gradient_scale, **self._dtypes,
        )  # fmt: skip
        self._update(update, self._rates, got)


class _CompiledAdam(_AdamKernels):
    def read(self, records_CW: Tensor, slots_U: Tensor, got: CaughtUp) -> Tensor | None:
        # Lazy Adam makes up for no steps: all rows are as they are stored.
        return slots_U if got.state_US is None else super().read(records_CW, slots_U, got)
