"""Log-probabilities of continuations, in batches of texts of similar length.

Shape suffixes: B texts, T tokens, D hidden, N tokens that are predicted, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.transformer import LanguageModel
from train.checkpoint.saved_tables import SavedTables
from train.errors import UserError
from train.use.batches import in_batches

Pair = tuple[list[int], list[int]]
"""Token ids of a context, at least one, and of what continues it."""
Found = tuple[float, bool]
"""A continuation's log-probability in nats, and whether each of its tokens is the likeliest one."""

_CPU_TOKENS, _GPU_TOKENS = 2**12, 2**15
"""Of a batch. Without gradients, what a forward holds at a time is little more than its widest block."""
_CPU_LOGITS, _GPU_LOGITS = 2**22, 2**27
"""In memory at a time: 16 MiB and 512 MiB in fp32."""


def suitable_tokens(device: torch.device) -> int:
    """Tokens of a batch on a device, padding included, where nothing else is asked for."""
    return _GPU_TOKENS if device.type == "cuda" else _CPU_TOKENS


class Likelihood:
    """Scores continuations with a model.

    Args:
        model: in evaluation mode.
        source: of its rows; None without Engram.
        max_length: tokens of the model's longest sequence. Of a longer text the context is cut at its start.
        batch_tokens: tokens of a batch, padding included; a text is never cut for it. None takes what suits the device.
    """

    def __init__(
        self, model: LanguageModel, source: SavedTables | None, max_length: int, batch_tokens: int | None = None
    ) -> None:
        self._model, self._source, self._max_length = model, source, max_length
        self._device = next(model.parameters()).device
        self._batch_tokens = batch_tokens or suitable_tokens(self._device)
        logits = _GPU_LOGITS if self._device.type == "cuda" else _CPU_LOGITS
        self._chunk = max(1, logits // model.config.vocab_size)

    @torch.no_grad()  # not inference mode: the tables keep what they allocate here, for whoever reads them next
    def of(self, pairs: Sequence[Pair], done: Callable[[int], object] = lambda count: None) -> list[Found]:
        """What is found for each pair, in order. Pairs with the same input share a forward; `done` hears of progress.

        Raises:
            UserError: a continuation is empty, or longer than the model's sequences.
        """
        places: dict[tuple[int, ...], list[int]] = {}
        for number, (context, asked) in enumerate(pairs):
            self._check(asked)
            # The last token predicts nothing.
            places.setdefault(tuple((context + asked)[-self._max_length - 1 : -1]), []).append(number)
        found: dict[int, Found] = {}
        for batch in in_batches(sorted(places), len, self._batch_tokens):
            numbers = [(row, number) for row, ids in enumerate(batch) for number in places[ids]]
            found |= self._score(batch, [(row, number, pairs[number][1]) for row, number in numbers])
            done(len(numbers))
        return [found[number] for number in range(len(pairs))]

    def _check(self, asked: list[int]) -> None:
        if not asked:
            raise UserError("a text to score has no token: a choice or a target of the task is empty; correct the task")
        if len(asked) > self._max_length:
            raise UserError(
                f"a text to score has {len(asked)} tokens, and the model's sequences {self._max_length} "
                "(data.sequence_length): leave the task out, or evaluate a model of longer sequences"
            )

    def _score(self, batch: Sequence[tuple[int, ...]], asked: list[tuple[int, int, list[int]]]) -> dict[int, Found]:
        """By number: `asked` has rows of the batch, numbers, and the tokens that end there."""
        hidden_BTD = self._hidden(batch)
        hidden_ND = torch.cat([hidden_BTD[row, len(batch[row]) - len(ids) : len(batch[row])] for row, _, ids in asked])
        wanted_N = torch.tensor([token for *_, ids in asked for token in ids], device=self._device)
        parts = [
            self._predicted(*part)
            for part in zip(hidden_ND.split(self._chunk), wanted_N.split(self._chunk), strict=True)
        ]
        logs_N, best_N = (torch.cat(each).cpu() for each in zip(*parts, strict=True))
        lengths = [len(ids) for *_, ids in asked]
        ends = zip(asked, logs_N.split(lengths), best_N.split(lengths), strict=True)
        return {number: (float(logs.sum()), bool(best.all())) for (_, number, _), logs, best in ends}

    def _hidden(self, batch: Sequence[tuple[int, ...]]) -> Tensor:
        """Hidden states [B, T, D]. Padding on the right changes nothing before it: causal, and no token is dropped."""
        length = max(map(len, batch))
        tokens_BT = torch.tensor([[*ids, *[0] * (length - len(ids))] for ids in batch])
        positions_BT = torch.arange(length).expand_as(tokens_BT)
        memory = self._source.look_up(tokens_BT, positions_BT, self._device) if self._source else []
        hidden_BTD: Tensor = self._model.model(tokens_BT.to(self._device), positions_BT.to(self._device), memory)[0]
        return hidden_BTD

    def _predicted(self, hidden_ND: Tensor, wanted_N: Tensor) -> tuple[Tensor, Tensor]:
        logits_NV = self._model.lm_head(hidden_ND).float()
        logs_N = logits_NV.log_softmax(-1).gather(1, wanted_N.unsqueeze(1))[:, 0]
        return logs_N, logits_NV.argmax(-1) == wanted_N
