"""The row optimizers at the sizes of a training step.

Shape suffixes: U rows of a step, C slots, D columns of a row, W words of a record, X words of a record in fp32.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.rows.rate_history import RateHistory
from launch.bench.kernels.cases import Case, Sizes
from launch.bench.optimizers import OPTIMIZERS as NAMED
from offload.config import TableOptimizerConfig
from offload.optimizers import OPTIMIZERS
from offload.rows.records import RecordLayout
from offload.rows.rule import RowRule
from offload.rows.updater import RowUpdater

_DIM = 80
_STEPS = 40  # applied before
_MISSED = 8
_LR = 1e-3


def optimizer_cases(sizes: Sizes) -> Iterator[Case]:
    """A step's work in its slots, for every optimizer."""
    configs = dict(_configs())
    for name, config in configs.items():
        yield _Update(name, config, sizes, missed=0).case()
    for name, config in configs.items():
        if OPTIMIZERS[config.type](config).replays:
            yield _Update(name, config, sizes, missed=_MISSED).case()


def _configs() -> Iterator[tuple[str, TableOptimizerConfig]]:
    for section in NAMED.values():
        config = TableOptimizerConfig(**section)
        told = f", {config.untouched_rows}" if "untouched_rows" in section else ""
        told += f", {config.state_dtype} state" if "state_dtype" in section else ""
        yield OPTIMIZERS[config.type].title + told, config


class _Update:
    """The read and the update of a step's rows, scattered over a window twice as large."""

    def __init__(self, name: str, config: TableOptimizerConfig, sizes: Sizes, missed: int) -> None:
        self._name, self._config, self._sizes, self._missed = name, config, sizes, missed
        self._layout, self._optimizer = RecordLayout.of(_DIM, config), OPTIMIZERS[config.type](config)
        _, self._unique = sizes.index
        records_CX = sizes.random(2 * self._unique, self._layout.unpacked.words, scale=1e-2).abs_()
        records_CW = records_CX.new_empty(len(records_CX), self._layout.stride(sizes.device))[:, : self._layout.words]
        self._records_CW = self._layout.pack(records_CX, records_CW)
        generator = torch.Generator().manual_seed(0)
        self._slots_U = torch.randperm(2 * self._unique, generator=generator)[: self._unique].to(sizes.device)
        self._gradient_UD = sizes.random(self._unique, _DIM, scale=1e-3)
        self._ids_U = torch.arange(self._unique, device=sizes.device)
        self._updater = RowUpdater(config, self._layout, device=sizes.device)
        self._before = RateHistory([_LR] * (_STEPS - 1))

    def case(self) -> Case:
        missed = f", {self._missed} steps missed" if self._missed else ""
        nbytes = self._unique * (2 * self._layout.bytes + 8 * _DIM + 8)
        sizes = f"{self._unique:,} records of {self._layout.bytes} bytes{missed}"
        return Case(f"read and update, {self._name}", sizes, nbytes, self._ours, self._reference, self._prepare)

    def _prepare(self) -> None:
        """Resets the versions and the steps so far, so that every run has the same steps to make up for."""
        self._layout.version(self._records_CW).fill_(_STEPS - 1 - self._missed)
        self._updater.load_state(self._updater.state() | {"learning_rates": [_LR] * (_STEPS - 1)})
        self._updater.read(self._records_CW, self._slots_U[:1])  # makes what is made once per run

    def _ours(self) -> None:
        rows = self._updater.read(self._records_CW, self._slots_U)
        lr = _LR / self._config.lr_factor
        self._updater.update_at(rows, self._gradient_UD, lr, self._ids_U)

    def _reference(self) -> Tensor:
        """The same in plain PyTorch: records copied out, updated, and copied back."""
        rule = RowRule(self._optimizer, self._layout, seed=0)
        records_UX = self._layout.unpack(self._records_CW.index_select(0, self._slots_U))
        scratch_4UD = records_UX.new_empty(4, len(records_UX), _DIM)
        if self._optimizer.replays and self._missed:
            rule.replay(records_UX, [_STEPS - 1 - self._missed] * len(records_UX), self._before, scratch_4UD)
        rule.step(records_UX, self._gradient_UD, self._ids_U, scratch_4UD[0], step=_STEPS, lr=_LR)
        return self._records_CW.index_copy_(0, self._slots_U, self._layout.pack(records_UX))
