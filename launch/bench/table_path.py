"""Our contender: the table path of a training step, without a model."""

import gc
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.gather import gather
from launch.bench.devices import finish
from launch.bench.workload import DrawnSteps
from offload.config import OffloadConfig
from offload.rows.records import RowInit
from offload.tables import EngramTables
from offload.window.interface import Traffic

_LEARNING_RATE = 1e-3
_INIT_STD = 0.02
_LOADED_ROWS = 1 << 16


class TablePath:
    """Lookup, backward and update through `offload.tables.EngramTables`, as the trainer calls them.

    Args:
        name: for the report.
        drawn: the ids of all steps.
        config: the `offload` section.
        gradient_ND: fp32, what arrives at every lookup.
        compute: stands for the model, between the lookup and its backward.
        device: where the model would compute.

    Raises:
        Unavailable: host memory does not suffice.
    """

    def __init__(
        self,
        name: str,
        drawn: DrawnSteps,
        config: OffloadConfig,
        gradient_ND: Tensor,
        compute: Callable[[], None] = lambda: None,
        device: torch.device | None = None,
    ) -> None:
        self.name = name
        self._device = device or torch.device("cpu")
        host_group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.tables = EngramTables(
            config,
            drawn,  # type: ignore[arg-type]  # asked for what an address book is asked for
            dim=drawn.workload.dim,
            init=RowInit(drawn.workload.seed, _INIT_STD),
            batches=drawn.batches,
            num_steps=drawn.steps,
            host_group=host_group,
            device=self._device,
        )
        self.traffic: list[Traffic] = []
        self._drawn, self._gradient_ND, self._compute = drawn, gradient_ND.to(self._device), compute

    def train_once(self) -> None:
        """Before the first step: makes every row of the steps one that was updated once.

        Rows that come into the window then travel from the first step on, as they do late in a run.
        """
        state = self.tables.optimizer_state()
        self.tables.load_optimizer_state(state | {"learning_rates": [_LEARNING_RATE]})
        for ids in self._drawn.ids_PN.unique().split(_LOADED_ROWS):
            records = torch.zeros(len(ids), self.tables.record_bytes // 4)
            records.view(torch.int32)[:, -1] = 1
            self.tables.load_rows(ids, records)

    def step(self, step: int) -> None:
        """One step: rows of the window, expanded to the lookups; their gradient; one update of each row."""
        begun = self.tables.begin(step)
        ((rows_UD, index),) = begun.rows.of(0)
        looked_up_ND = gather(rows_UD, index)
        self._compute()
        looked_up_ND.backward(self._gradient_ND)
        begun.reduce()
        begun.apply(lr=_LEARNING_RATE)
        finish(self._device)
        self.traffic.append(self.tables.take_traffic())

    def close(self) -> None:
        """Ends the background work and frees the tables."""
        self.tables.close()
        gc.collect()
