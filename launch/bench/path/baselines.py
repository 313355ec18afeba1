"""What people use today: PyTorch's embeddings with their optimizers, and a bare gather of rows."""

import torch
from torch import Tensor, nn

from launch.bench.devices import finish
from launch.bench.workload import DrawnSteps

_LEARNING_RATE = 1e-3


class TorchEmbedding:
    """`nn.Embedding` under one of PyTorch's Adams.

    Args:
        drawn: the ids of all steps.
        gradient_ND: fp32, what arrives at every lookup.
        sparse: sparse gradients under `SparseAdam`, or dense ones under `Adam`.
        device: of the table.
    """

    def __init__(self, drawn: DrawnSteps, gradient_ND: Tensor, *, sparse: bool, device: torch.device) -> None:
        self.sparse = sparse
        self.name = "nn.Embedding(sparse=True), SparseAdam" if sparse else "nn.Embedding, Adam"
        self._device = device
        self._ids_PN, self._gradient_ND = drawn.ids_PN.to(device), gradient_ND.to(device)
        rows, dim = drawn.workload.table_rows, drawn.workload.dim
        self._embedding = nn.Embedding(rows, dim, sparse=sparse, device=device)
        optimizer = torch.optim.SparseAdam if sparse else torch.optim.Adam
        self._optimizer: torch.optim.Optimizer = optimizer(self._embedding.parameters(), lr=_LEARNING_RATE)

    def step(self, step: int) -> None:
        """Lookup, backward, update."""
        self._embedding(self._ids_PN[step]).backward(self._gradient_ND)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if step == 0:
            self._touch_state()
        finish(self._device)

    def close(self) -> None:
        """Frees the table."""
        del self._embedding, self._optimizer

    def _touch_state(self) -> None:
        # Moments are born as untouched zero pages; a long run has paid for them, so the timed steps must not.
        for moments in self._optimizer.state.values():
            for value in moments.values():
                if isinstance(value, Tensor) and value.dim() == 2:
                    value.add_(0.0)


class BareGather:
    """Reading the rows, `table[ids]`, and nothing else: the least that any lookup into memory takes."""

    name = "gather alone, table[ids]"

    def __init__(self, drawn: DrawnSteps, device: torch.device) -> None:
        self._device, self._ids_PN = device, drawn.ids_PN.to(device)
        self._table = torch.full((drawn.workload.table_rows, drawn.workload.dim), 0.5, device=device)

    def step(self, step: int) -> None:
        """Lookup only."""
        self._table[self._ids_PN[step]]
        finish(self._device)

    def close(self) -> None:
        """Frees the table."""
        del self._table
