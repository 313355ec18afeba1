"""Loss of the model on held-out text."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from model.balance import reset_counts
from train.data.batches.batch import Batch
from train.data.batches.loader import Loader
from train.data.batches.packing import IGNORED
from train.forward import Model, forward
from train.row_source import RowSource


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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Surrounds what is done with a model between two steps of its training."""
    model.eval()
    yield
    model.train()
    # Experts count the tokens they see, but balance on those of training alone.
    reset_counts(model)


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
