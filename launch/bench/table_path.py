"""Our contender: the table path of a training step, without a model."""

import torch

from kernels.gather import gather
from launch.bench.workload import DrawnSteps
from offload.config import OffloadConfig
from offload.records import RowInit
from offload.store import Traffic
from offload.tables import EngramTables

_LEARNING_RATE = 1e-3
_INIT_STD = 0.02


class TablePath:
    """Lookup, backward and update through `offload.tables.EngramTables`, as the trainer calls them.

    Args:
        name: for the report.
        drawn: the ids of all steps.
        config: the `offload` section.
        gradient_ND: fp32, what arrives at every lookup.
        steps: no step at or after this one will be taken.
    """

    def __init__(
        self, name: str, drawn: DrawnSteps, config: OffloadConfig, gradient_ND: torch.Tensor, steps: int
    ) -> None:
        self.name = name
        self.tables = EngramTables(
            config,
            drawn,  # type: ignore[arg-type]  # asked for what an address book is asked for
            dim=drawn.workload.dim,
            init=RowInit(drawn.workload.seed, _INIT_STD),
            batches=drawn.batches,
            num_steps=steps,
        )
        self.traffic: list[Traffic] = []
        self._drawn, self._gradient_ND = drawn, gradient_ND

    def step(self, step: int) -> None:
        """One step: rows of the window, expanded to the lookups; their gradient; one update of each row."""
        rows = self.tables.begin(step, [tokens for tokens, _ in self._drawn.batches(step)])
        looked_up_ND = gather(rows.leaves[0], rows.indices[0][0])
        self.compute()
        looked_up_ND.backward(self._gradient_ND)
        self.tables.reduce_gradients()
        self.tables.apply(lr=_LEARNING_RATE)
        self.traffic.append(self.tables.take_traffic())

    def compute(self) -> None:
        """Where the model would compute."""

    def close(self) -> None:
        """Ends the background work."""
        self.tables.close()
