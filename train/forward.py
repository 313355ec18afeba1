"""The model's forward over a micro-batch, as training and evaluation call it.

Shape suffixes: B sequences, T tokens of a sequence.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from model.engram import MemoryRows
from train.data.batches.batch import Batch

Model = Callable[..., Any]
"""The model's forward: its own, or an engine's around it."""


def forward(
    model: Model,
    batch: Batch,
    memory: Sequence[MemoryRows],
    device: torch.device,
    tell: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Summed loss of a micro-batch, on the model's device; `tell` hears of each label's loss."""
    parts = batch.tokens_BT, batch.positions_BT, batch.labels_BT
    tokens_BT, positions_BT, labels_BT = (sent(part, device) for part in parts)
    told = {} if tell is None else {"tell": tell}
    loss: Tensor = model(tokens_BT, positions_BT, [part.to(device) for part in memory], labels_BT, **told)
    return loss


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; nobody waits for it, as they would for a copy of memory that is not pinned."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
