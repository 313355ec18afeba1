"""Continues a text, token by token.

Shape suffixes: B batch (1), T tokens of a call, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from model.decoding import decoding
from model.transformer import LanguageModel
from train.data.tokenizer import Tokenizer
from train.errors import UserError
from train.evaluation import Model, RowSource

NOT_FINITE = -1
"""Stands for a token where none can be drawn."""


class NotFinite(UserError):
    """A model whose logits are NaN or infinite, from which no token can be drawn."""


class Decoder:
    """A text that grows token by token, and the logits of what comes next.

    Logits are those of training's forward over the text: from the same hidden states, bit by bit, for what is given
    first; later ones are computed for the new token alone, and are equal up to the rounding of other matrix shapes.
    Only a new token's rows are looked up; its n-grams reach back over everything before it, a prompt included.

    Args:
        model: in evaluation mode; its forward belongs to the decoder while it is open.
        source: of the rows; None without Engram.
        max_length: the most tokens that the model looks back over. Where the text outgrows it, the newer half stays, as
            the rest of a document, which is what training makes of documents that it cuts.
        forward: of the model, if not its own: an engine's around it.

    Example:
        >>> with Decoder(model, tables, max_length=256) as decoder:
        ...     logits_V = decoder.append(prompt)
        ...     logits_V = decoder.append([int(logits_V.argmax())])
    """

    def __init__(
        self, model: LanguageModel, source: RowSource | None, max_length: int, forward: Model | None = None
    ) -> None:
        self._model, self._source, self._max_length = model, source, max_length
        self._forward = forward or model
        engram = model.config.engram
        self._reach = max(engram.orders) - 1 if engram else 0
        self._device = next(model.parameters()).device
        self._caches = ExitStack()
        self._ids: list[int] = []
        self._done = 0

    def __enter__(self) -> Self:
        self._caches.enter_context(decoding(self._model))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._caches.close()

    @torch.no_grad()
    def append(self, ids: Sequence[int]) -> Tensor:
        """Adds tokens, any number at first and then one at a time; returns the next token's logits, fp32 [V], on the
        CPU."""
        self._ids += ids
        if len(self._ids) > self._max_length:
            self._ids = self._ids[-max(1, self._max_length // 2) :] if self._done else self._ids[-self._max_length :]
            self._restart()
        tokens_BT = torch.tensor([self._ids])
        positions_BT = torch.arange(len(self._ids)).unsqueeze(0)
        first = max(0, self._done - self._reach)
        memory = []
        if self._source:
            memory = self._source.look_up(tokens_BT[:, first:], positions_BT[:, first:], skip=self._done - first)
        new = slice(self._done, None)
        logits_BTV = self._forward(
            tokens_BT[:, new].to(self._device),
            positions_BT[:, new].to(self._device),
            [part.to(self._device) for part in memory],
        )
        self._done = len(self._ids)
        return logits_BTV[0, 0].float().cpu()

    def _restart(self) -> None:
        self._caches.close()
        self._caches.enter_context(decoding(self._model))
        self._done = 0


def continuation(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    *,
    num_tokens: int,
    temperature: float,
    top_k: int | None,
    generator: torch.Generator,
    top_p: float = 1.0,
    agreed: Callable[[int], int] = int,
) -> Iterator[int]:
    """Up to `num_tokens` tokens after a prompt, one by one; ends early where the document does.

    Args:
        decoder: of no text so far.
        tokenizer: of the model.
        prompt: token ids; for none, the text starts after an end of document.
        temperature: 0 takes the likeliest token.
        top_k: draws from only this many likeliest tokens; None from all.
        generator: of the draws, on the CPU.
        top_p: draws from the likeliest tokens only, as few as have this probability together.
        agreed: what all ranks take for a token that this one has drawn.

    Raises:
        NotFinite: on all ranks: a token cannot be drawn.
    """
    new = list(prompt) or [tokenizer.eos_id]
    for _ in range(num_tokens):
        # A vocabulary may be padded beyond the tokenizer's.
        logits_V = decoder.append(new)[: tokenizer.vocab_size]
        token = agreed(draw(logits_V, temperature, top_k, generator, top_p))
        if token == NOT_FINITE:
            raise NotFinite("the model's logits are not finite: its training has diverged; take an earlier checkpoint")
        if token == tokenizer.eos_id:
            return
        yield token
        new = [token]


def draw(
    logits_V: Tensor, temperature: float, top_k: int | None, generator: torch.Generator, top_p: float = 1.0
) -> int:
    """A token id drawn from softmax(logits / temperature), among the `top_k` likeliest; the likeliest at 0.

    With `top_p`, among as few of these as together have at least this probability, given the choice among them.
    NOT_FINITE for logits that give no distribution.
    """
    if not logits_V.isfinite().all():
        return NOT_FINITE
    if temperature == 0:
        return int(logits_V.argmax())
    count = len(logits_V) if top_k is None else min(top_k, len(logits_V))
    likeliest = None if count == len(logits_V) and top_p == 1 else logits_V.topk(count)
    share = torch.softmax((logits_V if likeliest is None else likeliest.values) / temperature, dim=0)
    if not share.isfinite().all():  # so low a temperature that the quotient overflows
        return int(logits_V.argmax())
    if top_p < 1:
        share = share * (share.cumsum(0) - share < top_p)
    chosen = torch.multinomial(share, 1, generator=generator)
    return int(chosen if likeliest is None else likeliest.indices[chosen])
