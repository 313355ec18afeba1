"""Continues several texts at once: a step of the batch gives each of them a token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from train.use.batches import in_batches
from train.use.generation import TextBatch, draw, drawn


@dataclass
class Asked:
    """A text to continue.

    Attributes:
        prompt: token ids, at least one.
        num_tokens: the most that are added.
        temperature, top_k, top_p, generator: as for `train.use.generation.draw`.
        ends: whether a continuation so far is the whole of it.
        found: the continuation so far.
    """

    prompt: list[int]
    num_tokens: int
    temperature: float
    generator: torch.Generator
    top_k: int | None = None
    top_p: float = 1.0
    ends: Callable[[list[int]], bool] = lambda _: False
    found: list[int] = field(default_factory=list)

    @property
    def longest(self) -> int:
        """The most tokens of the whole text."""
        return len(self.prompt) + self.num_tokens


def continue_together(
    open_batch: Callable[[], TextBatch],
    asked: Sequence[Asked],
    *,
    vocab_size: int,
    eos_id: int,
    batch_tokens: int,
    done: Callable[[int], object] = lambda count: None,
) -> None:
    """Continues every text as if it were alone, up to rounding; a text ends early where its document does.

    Args:
        open_batch: opens an empty batch.
        asked: in any order; `found` has the result.
        vocab_size: tokens that may be drawn; a vocabulary may be padded beyond them.
        eos_id: ends a document.
        batch_tokens: of a batch, padding included; a single text may have more.
        done: hears how many texts have ended.

    Raises:
        NotFinite: a token cannot be drawn.
    """
    for batch in in_batches(asked, lambda each: each.longest, batch_tokens):
        _continue(open_batch, batch, vocab_size, eos_id, done)


def _continue(
    open_batch: Callable[[], TextBatch],
    asked: list[Asked],
    vocab_size: int,
    eos_id: int,
    done: Callable[[int], object],
) -> None:
    growing, new = asked, [each.prompt for each in asked]
    with open_batch() as texts:
        while growing:
            logits_BV = texts.append(new)[:, :vocab_size]
            kept = [place for place, each in enumerate(growing) if not _ended(each, logits_BV[place], eos_id)]
            done(len(growing) - len(kept))
            if len(kept) < len(growing):
                growing = [growing[place] for place in kept]
                if growing:
                    texts.keep(kept)
            new = [each.found[-1:] for each in growing]


def _ended(asked: Asked, logits_V: torch.Tensor, eos_id: int) -> bool:
    """Draws a text's next token; returns whether the text ends there."""
    token = drawn(draw(logits_V, asked.temperature, asked.top_k, asked.generator, asked.top_p))
    if token == eos_id:
        return True
    asked.found.append(token)
    return len(asked.found) >= asked.num_tokens or asked.ends(asked.found)
