"""Continues a text with a saved run.

Shape suffixes: B batch (1), T tokens of a call, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from model.decoding import decoding
from model.transformer import LanguageModel
from train.checkpoint.saved_tables import SavedTables
from train.use.saved_run import SavedRun


class Decoder:
    """A text that grows token by token, and the logits of what comes next.

    Logits are those of training's forward over the text: from the same hidden states, bit by bit, for what is given
    first; later ones are computed for the new token alone, and are equal up to the rounding of other matrix shapes.
    Only a new token's rows are looked up; its n-grams reach back over all that is there, a prompt included.

    Args:
        model: in evaluation mode; its forward belongs to the decoder while it is open.
        tables: None without Engram.
        max_length: tokens that the model looks back over at most. Where the text outgrows it, the newer half stays,
            as the rest of a document, which is what training makes of documents that it cuts.

    Example:
        >>> with Decoder(model, tables, max_length=256) as decoder:
        ...     logits_V = decoder.append(prompt)
        ...     logits_V = decoder.append([int(logits_V.argmax())])
    """

    def __init__(self, model: LanguageModel, tables: SavedTables | None, max_length: int) -> None:
        self._model, self._tables, self._max_length = model, tables, max_length
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

    @torch.inference_mode()
    def append(self, ids: Sequence[int]) -> Tensor:
        """Adds tokens, any number at first and one at a time then; returns the next token's logits, fp32 [V], on the
        CPU."""
        self._ids += ids
        if len(self._ids) > self._max_length:
            self._ids = self._ids[-max(1, self._max_length // 2) :] if self._done else self._ids[-self._max_length :]
            self._restart()
        hidden_BTD = self._forward()
        self._done = len(self._ids)
        # The head alone of what the forward computes needs no more than the last token.
        return self._model.lm_head(hidden_BTD[:, -1:])[0, 0].float().cpu()

    def _forward(self) -> Tensor:
        tokens_BT = torch.tensor([self._ids])
        positions_BT = torch.arange(len(self._ids)).unsqueeze(0)
        memory = []
        if self._tables:
            first = max(0, self._done + 1 - self._tables.longest_order)
            memory = self._tables.look_up(
                tokens_BT[:, first:], positions_BT[:, first:], self._device, skip=self._done - first
            )
        new = slice(self._done, None)
        hidden_BTD: Tensor = self._model.model(
            tokens_BT[:, new].to(self._device), positions_BT[:, new].to(self._device), memory
        )[0]
        return hidden_BTD

    def _restart(self) -> None:
        self._caches.close()
        self._caches.enter_context(decoding(self._model))
        self._done = 0


def continuation(
    run: SavedRun, prompt: Sequence[int], *, num_tokens: int, temperature: float, top_k: int | None, seed: int
) -> Iterator[int]:
    """Up to `num_tokens` tokens after a prompt, one by one; ends early where the document does.

    Args:
        run: the checkpoint.
        prompt: token ids; for none, the text starts after an end of document.
        temperature: 0 takes the likeliest token.
        top_k: draws from this many likeliest tokens only; None from all.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    new = list(prompt) or [run.tokenizer.eos_id]
    with Decoder(run.model(), run.tables(), run.job.data.sequence_length) as decoder:
        for _ in range(num_tokens):
            # A vocabulary may be padded beyond the tokenizer's.
            logits_V = decoder.append(new)[: run.tokenizer.vocab_size]
            token = draw(logits_V, temperature, top_k, generator)
            if token == run.tokenizer.eos_id:
                return
            yield token
            new = [token]


def draw(logits_V: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """A token id drawn from softmax(logits / temperature), among the `top_k` likeliest; the likeliest at 0."""
    if temperature == 0:
        return int(logits_V.argmax())
    if top_k is not None and top_k < len(logits_V):
        likeliest = logits_V.topk(top_k)
        chosen = torch.multinomial(torch.softmax(likeliest.values / temperature, dim=0), 1, generator=generator)
        return int(likeliest.indices[chosen])
    return int(torch.multinomial(torch.softmax(logits_V / temperature, dim=0), 1, generator=generator))
