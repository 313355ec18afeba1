"""Continues texts, token by token.

Shape suffixes: B texts, T tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from model.decoding import Texts, decoding
from model.transformer import LanguageModel
from train.data.tokenization.tokenizer import Tokenizer
from train.errors import UserError
from train.forward import Model
from train.row_source import RowSource

NOT_FINITE = -1
"""Stands for a token where none can be drawn."""


class NotFinite(UserError):
    """A model whose logits are NaN or infinite, from which no token can be drawn."""


class TextBatch:
    """Texts that grow together, token by token, and the logits of what comes next of each.

    Logits are those of training's forward over each text: for a single text from the same hidden states, bit by bit,
    for what is given first; others are equal up to the rounding of other matrix shapes. Only new tokens' rows are
    looked up, those of all texts at once; their n-grams reach back over everything before them, a prompt included.

    Args:
        model: in evaluation mode; its forward belongs to the batch while it is open.
        source: of the rows; None without Engram.
        pad_id: token before the first one of a shorter text: the one that pads n-grams.
        forward: of the model, if not its own: an engine's around it.

    Example:
        >>> with TextBatch(model, tables, pad_id) as texts:
        ...     logits_BV = texts.append(prompts)
        ...     logits_BV = texts.append(logits_BV.argmax(dim=1, keepdim=True).tolist())
    """

    def __init__(
        self, model: LanguageModel, source: RowSource | None, pad_id: int, forward: Model | None = None
    ) -> None:
        self._model, self._source, self._pad_id = model, source, pad_id
        self._forward = forward or model
        engram = model.config.engram
        self._reach = max(engram.orders) - 1 if engram else 0
        self._device = next(model.parameters()).device
        self._caches = ExitStack()
        self._decoding: Texts | None = None
        self._tokens_BT = self._padding_B = torch.empty(0, dtype=torch.int64)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._caches.close()

    @torch.no_grad()
    def append(self, new: Sequence[Sequence[int]]) -> Tensor:
        """Adds tokens to each text, any number (but some) at first and then one at a time; returns the logits of each
        text's next token, fp32 [B, V], on the CPU."""
        done = 0
        if self._decoding is None:
            self._begin(new)
        else:
            done = self._tokens_BT.shape[1]
            self._tokens_BT = torch.cat([self._tokens_BT, torch.tensor(new)], dim=1)
        positions_BT = torch.arange(self._tokens_BT.shape[1]) - self._padding_B[:, None]
        # Padding is a document of its own.
        positions_BT = torch.where(positions_BT < 0, positions_BT + self._padding_B[:, None], positions_BT)
        first = max(0, done - self._reach)
        memory = []
        if self._source:
            memory = self._source.look_up(self._tokens_BT[:, first:], positions_BT[:, first:], skip=done - first)
        logits_BTV = self._forward(
            self._tokens_BT[:, done:].to(self._device),
            positions_BT[:, done:].to(self._device),
            [part.to(self._device) for part in memory],
        )
        return logits_BTV[:, 0].float().cpu()

    def keep(self, texts: Sequence[int]) -> None:
        """Drops all texts but these, by their numbers in the batch."""
        assert self._decoding is not None
        kept = torch.tensor(texts)
        self._tokens_BT, self._padding_B = self._tokens_BT[kept], self._padding_B[kept]
        self._decoding.keep(kept.to(self._device))

    def _begin(self, texts: Sequence[Sequence[int]]) -> None:
        longest = max(map(len, texts))
        padding = [longest - len(text) for text in texts]
        self._padding_B = torch.tensor(padding)
        self._tokens_BT = torch.tensor(
            [[self._pad_id] * count + [*text] for count, text in zip(padding, texts, strict=True)]
        )
        told = self._padding_B.to(self._device) if any(padding) else None
        self._decoding = self._caches.enter_context(decoding(self._model, told))


class Decoder:
    """A text that grows token by token, and the logits of what comes next: a `TextBatch` of one.

    Args:
        model, source, forward: as for `TextBatch`.
        max_length: the most tokens that the model looks back over. Where the text outgrows it, the newer half stays, as
            the rest of a document, which is what training makes of documents that it cuts.

    Example:
        >>> with Decoder(model, tables, max_length=256) as decoder:
        ...     logits_V = decoder.append(prompt)
        ...     logits_V = decoder.append([int(logits_V.argmax())])
    """

    def __init__(
        self, model: LanguageModel, source: RowSource | None, max_length: int, forward: Model | None = None
    ) -> None:
        self._open = lambda: TextBatch(model, source, pad_id=0, forward=forward)  # a text alone is not padded
        self._max_length = max_length
        self._texts = ExitStack()
        self._text: TextBatch | None = None
        self._ids: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._texts.close()

    def append(self, ids: Sequence[int]) -> Tensor:
        """Adds tokens, any number at first and then one at a time; returns the next token's logits, fp32 [V], on the
        CPU."""
        new = ids
        self._ids += ids
        if len(self._ids) > self._max_length:
            self._ids = self._ids[-max(1, self._max_length // 2) :] if self._text else self._ids[-self._max_length :]
            self._texts.close()
            self._text, new = None, self._ids
        if self._text is None:
            self._text = self._texts.enter_context(self._open())
        return self._text.append([new])[0]


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
        token = drawn(agreed(draw(logits_V, temperature, top_k, generator, top_p)))
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


def drawn(token: int) -> int:
    """What `draw` gave, where it is a token; otherwise raises NotFinite."""
    if token == NOT_FINITE:
        raise NotFinite("the model's logits are not finite: its training has diverged; take an earlier checkpoint")
    return token
