"""Loss of the model on held-out text."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from kernels.gather import row_index
from model.balance import reset_counts
from model.engram import MemoryRows
from offload.plan.plan import Tokens
from offload.step import Rows
from offload.tables import EngramTables
from train.data.batches.batch import Batch
from train.data.batches.loader import Loader
from train.data.batches.packing import IGNORED

Model = Callable[..., Any]
"""The model's forward: its own, or an engine's around it."""


@dataclass(frozen=True)
class Evaluation:
    """What the model makes of a text.

    Attributes:
        loss: mean cross-entropy of a predicted token, in nats.
        bits_per_byte: the same information spread over the bytes of the text: comparable between tokenizers. None
            where no predicted token stands for a byte.
        tokens: how many were predicted: all but the first of each document and sequence.
        text_bytes: that these stand for.
        by_source: the same of each source of a mixture, by name; empty without one.
    """

    loss: float
    bits_per_byte: float | None
    tokens: int
    text_bytes: float
    by_source: Mapping[str, "Evaluation"] = field(default_factory=dict)

    @classmethod
    def of(cls, sums: Tensor) -> "Evaluation | None":
        """Made from what `evaluate` returns; None where no token was predicted."""
        loss, tokens, text_bytes = sums.tolist()
        if not tokens:
            return None
        return cls(loss / tokens, loss / math.log(2) / text_bytes if text_bytes else None, int(tokens), text_bytes)

    @classmethod
    def of_sources(cls, parts: Sequence[tuple[str, float, Tensor]]) -> "Evaluation | None":
        """That of a mixture: each source's mean loss, weighted with its share.

        Args:
            parts: of each source its name, its share, and what `evaluate` returns; a single one is taken as it is.

        Returns:
            None where no source with a share has a predicted token.
        """
        if len(parts) == 1:
            return cls.of(parts[0][2])
        found = {name: (share, cls.of(sums)) for name, share, sums in parts}
        there = {name: (share, each) for name, (share, each) in found.items() if each is not None}
        if not (whole := sum(share for share, _ in there.values())):
            return None
        loss = sum(share * each.loss for share, each in there.values()) / whole
        text_bytes = sum(share * each.text_bytes / each.tokens for share, each in there.values()) / whole
        return cls(
            loss,
            loss / math.log(2) / text_bytes if text_bytes else None,
            sum(each.tokens for _, each in there.values()),
            sum(each.text_bytes for _, each in there.values()),
            {name: each for name, (_, each) in there.items()},
        )


class HeldOut(NamedTuple):
    """What is evaluated of a source."""

    name: str
    share: float
    """Of the mixture: 1 without one, 0 for a source that is not read in the first phase."""
    loader: Loader
    """Of its validation documents."""


class RowSource(Protocol):
    """Where a model's rows are read, without a step."""

    def look_up(self, tokens_BT: Tensor, positions_BT: Tensor, *, skip: int = 0) -> list[MemoryRows]:
        """What the model reads for a batch, one entry for each Engram layer, on any device.

        Args:
            tokens_BT: int64, on the CPU.
            positions_BT: int64 positions within documents.
            skip: leading tokens that are there only for n-grams to look back to: the model reads nothing for them.
        """


@dataclass(frozen=True)
class TrainedRows:
    """The rows of tables under training, as of now."""

    tables: EngramTables

    def look_up(self, tokens_BT: Tensor, positions_BT: Tensor, *, skip: int = 0) -> list[MemoryRows]:
        """See `RowSource`; the next call may overwrite what this one returned. Collective."""
        memory = memory_of(self.tables.look_up([Tokens(tokens_BT, positions_BT)]), 0)
        if not skip:
            return memory
        return [
            MemoryRows(rows_UD, row_index(index.index_N.view(*tokens_BT.shape, -1)[:, skip:], len(rows_UD)))
            for rows_UD, index in memory
        ]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Surrounds what is done with a model between two steps of its training."""
    model.eval()
    yield
    model.train()
    # Experts count the tokens they see, but balance on those of training alone.
    reset_counts(model)


def memory_of(rows: Rows | None, micro_batch: int) -> list[MemoryRows]:
    """What the model reads for one micro-batch: for each Engram layer the tables' rows; nothing without Engram."""
    return [MemoryRows(*part) for part in rows.of(micro_batch)] if rows else []


def forward(
    model: Model,
    batch: Batch,
    memory: Sequence[MemoryRows],
    device: torch.device,
    tell: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Summed loss of a micro-batch, on the model's device; `tell` hears of each label's loss."""
    parts = batch.tokens_BT, batch.positions_BT, batch.labels_BT
    tokens_BT, positions_BT, labels_BT = (_sent(part, device) for part in parts)
    told = {} if tell is None else {"tell": tell}
    loss: Tensor = model(tokens_BT, positions_BT, [part.to(device) for part in memory], labels_BT, **told)
    return loss


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; nobody waits for it, as they would for a copy of memory that is not pinned."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def batches(loader: Loader, sequences: int) -> Iterator[Batch]:
    """This rank's micro-batches of the first `sequences` of a validation loader, or of all it has."""
    for step in range(min(-(-sequences // loader.global_batch_size), loader.steps_per_epoch)):
        yield from loader.batch(step)


@torch.no_grad()
def evaluate(
    model: Model,
    source: RowSource | None,
    text: Iterable[Batch],
    bytes_of: Callable[[Tensor], float],
    device: torch.device,
) -> Tensor:
    """Evaluates micro-batches, one after another. Collective, if model or rows are.

    Args:
        model: in evaluation mode.
        source: of the rows; None without Engram.
        text: the micro-batches.
        bytes_of: bytes of text behind labels.
        device: of the model.

    Returns:
        fp64 [3], on the CPU: summed cross-entropy in nats, tokens that were predicted, bytes that they stand for. Those
        of several ranks may be added up, and `Evaluation.of` reads them.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for batch in text:
        memory = source.look_up(batch.tokens_BT, batch.positions_BT) if source else []
        loss = forward(model, batch, memory, device).double().cpu()
        labels_BT = batch.labels_BT
        sums += torch.stack([loss, (labels_BT != IGNORED).sum(), torch.tensor(bytes_of(labels_BT))])
    return sums
