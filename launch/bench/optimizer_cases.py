"""The row optimizers at the sizes of a training step.

Shape suffixes: U rows of a step, C slots, D columns of a row, W words of a record.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.rows.adam_rates import AdamRates
from kernels.rows.rate_history import RateHistory
from launch.bench.clock import Run
from launch.bench.kernel_cases import Case, Sizes
from offload.config import TableOptimizerConfig
from offload.rows.records import RecordLayout
from offload.rows.rule import RowRule
from offload.rows.updater import RowUpdater

_DIM = 80
_STEPS = 40  # applied before
_MISSED = 8
_LR = 1e-3
_OPTIMIZERS = {
    "Adam, exact": TableOptimizerConfig(),
    "Adam, lazy": TableOptimizerConfig(untouched_rows="lazy"),
    "Adagrad, a number a row": TableOptimizerConfig(type="rowwise_adagrad"),
    "RMSprop, a number a row": TableOptimizerConfig(type="rowwise_rmsprop"),
}


def optimizer_cases(sizes: Sizes) -> Iterator[Case]:
    """One pass over the step's slots, for every optimizer."""
    for name, config in _OPTIMIZERS.items():
        yield _Update(name, config, sizes, missed=0).case()
    yield _Update("Adam, exact", _OPTIMIZERS["Adam, exact"], sizes, missed=_MISSED).case()


class _Update:
    """The update of a step's rows, scattered over a window twice as large."""

    def __init__(self, name: str, config: TableOptimizerConfig, sizes: Sizes, missed: int) -> None:
        self._name, self._config, self._sizes, self._missed = name, config, sizes, missed
        self._layout = RecordLayout.of(_DIM, config)
        _, self._unique = sizes.index
        stride = self._layout.stride(sizes.device)
        self._records_CW = sizes.random(2 * self._unique, stride, scale=1e-2).abs_()[:, : self._layout.words]
        generator = torch.Generator().manual_seed(0)
        self._slots_U = torch.randperm(2 * self._unique, generator=generator)[: self._unique].to(sizes.device)
        self._gradient_UD = sizes.random(self._unique, _DIM, scale=1e-3)
        self._history = RateHistory([_LR] * _STEPS)

    def case(self) -> Case:
        missed = f", {self._missed} steps missed" if self._missed else ""
        nbytes = self._unique * (2 * self._layout.bytes + 4 * _DIM + 8)
        ours, prepare = self._on_gpu() if self._sizes.on_gpu else self._on_cpu()
        sizes = f"{self._unique:,} records of {self._layout.bytes} bytes{missed}"
        return Case(f"update, {self._name}", sizes, nbytes, ours, self._reference, prepare)

    def _forget(self) -> None:
        """Sets the versions back: every run has the same steps to make up for."""
        self._layout.version(self._records_CW).fill_(_STEPS - 1 - self._missed)

    def _on_cpu(self) -> tuple[Run, Run]:
        updater = RowUpdater(self._config, self._layout)
        steps = [_STEPS - 1]

        def prepare() -> None:
            # The rows are caught up when they are read, before the model computes.
            self._layout.version(self._records_CW).fill_(steps[0] - self._missed)
            updater.load_state(updater.state() | {"learning_rates": [_LR] * steps[0]})
            updater.read(self._records_CW, self._slots_U)

        lr = _LR / self._config.lr_factor
        return lambda: updater.update_at(self._records_CW, self._slots_U, self._gradient_UD, lr), prepare

    def _on_gpu(self) -> tuple[Run, Run]:
        from kernels.rows import adam_triton as row_adam_triton
        from kernels.rows import rowwise_triton as row_optimizer_triton

        config, where = self._config, (self._records_CW, self._slots_U)
        rates = AdamRates(self._history, (config.beta1, config.beta2), config.eps, self._sizes.device)

        def adam() -> None:
            replays = config.untouched_rows == "exact"
            row_adam_triton.update_rows(*where, rates, self._gradient_UD, replays=replays)

        def adagrad() -> None:
            row_optimizer_triton.rowwise_adagrad(*where, self._gradient_UD, step=_STEPS, lr=_LR, eps=config.eps)

        def rmsprop() -> None:
            row_optimizer_triton.rowwise_rmsprop(
                *where, self._gradient_UD, step=_STEPS, lr=_LR, beta2=config.beta2, eps=config.eps
            )

        return {"adam": adam, "rowwise_adagrad": adagrad, "rowwise_rmsprop": rmsprop}[config.type], self._forget

    def _reference(self) -> Tensor:
        """The same by PyTorch's operations: records copied out, updated, and copied back."""
        rule = RowRule(self._config, self._layout, seed=0)
        records_UW = self._records_CW.index_select(0, self._slots_U)
        scratch_4UD = records_UW.new_empty(4, len(records_UW), _DIM)
        if rule.replays and self._missed:
            before = RateHistory([_LR] * (_STEPS - 1))
            rule.replay(records_UW, [_STEPS - 1 - self._missed] * len(records_UW), before, scratch_4UD)
        rule.step(records_UW, self._gradient_UD, None, scratch_4UD[0], step=_STEPS, lr=_LR)
        return self._records_CW.index_copy_(0, self._slots_U, records_UW)
