"""Loss of the model on held-out text."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from model.balance import reset_counts
from model.engram import MemoryRows
from offload.step import Rows
from offload.tables import EngramTables
from train.data.loader import Batch, Loader
from train.engine import Engine


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        loss: mean cross-entropy of a token, in nats.
        bits_per_byte: the same information spread over the bytes of the text: comparable between tokenizers.
    """

    loss: float
    bits_per_byte: float


def memory_of(rows: Rows | None, micro_batch: int) -> list[MemoryRows]:
    """What the model reads for one micro-batch: for each Engram layer the tables' rows; nothing without Engram."""
    return [MemoryRows(*part) for part in rows.of(micro_batch)] if rows else []


def forward(engine: Engine, batch: Batch, memory: Sequence[MemoryRows]) -> Tensor:
    """Summed loss of a micro-batch."""
    parts = batch.tokens_BT, batch.positions_BT, batch.labels_BT
    tokens_BT, positions_BT, labels_BT = (_sent(part, engine.device) for part in parts)
    loss: Tensor = engine(tokens_BT, positions_BT, memory, labels_BT)
    return loss


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; nobody waits for it, as for a copy of memory that is not pinned."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def batches(loader: Loader, sequences: int) -> Iterator[Batch]:
    """This rank's micro-batches of the first `sequences` of a validation loader, or of all it has."""
    for step in range(min(-(-sequences // loader.global_batch_size), loader.steps_per_epoch)):
        yield from loader.batch(step)


@torch.no_grad()
def evaluate(engine: Engine, tables: EngramTables | None, loader: Loader, sequences: int) -> Evaluation:
    """Evaluates the first `sequences` of a validation loader, or all of them. Collective."""
    engine.module.eval()
    totals = torch.zeros(3, dtype=torch.float64)
    for batch in batches(loader, sequences):
        rows = tables.look_up([batch]) if tables else None
        loss = forward(engine, batch, memory_of(rows, 0)).double().cpu()
        totals += torch.stack([loss, (batch.labels_BT >= 0).sum(), torch.tensor(loader.bytes_of(batch.labels_BT))])
    engine.module.train()
    # Experts count the tokens they see, but balance on those of training alone.
    reset_counts(engine.module)
    totals = totals.to(engine.device)
    dist.all_reduce(totals)
    loss_sum, labels, text_bytes = totals.tolist()
    return Evaluation(loss_sum / labels, loss_sum / math.log(2) / text_bytes)
