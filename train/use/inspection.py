"""What a saved run's memory does for a text: rows looked up, gates, and predictions with the memory and without it.

Shape suffixes: B batch (1), T tokens of a piece, M branches, S lookups a token, U unique rows, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from model.engram import Engram, MemoryRows
from model.transformer import LanguageModel
from train.checkpoint.saved_tables import SavedTables
from train.errors import UserError
from train.use.saved_run import SavedRun

UNKNOWN = -1
"""Update count of a row whose count was not saved."""


@dataclass(frozen=True)
class Ngram:
    """An n-gram that was looked up.

    Attributes:
        text: of its tokens, those before the document's first left out.
        rows: of the module's table, one a head.
        counts: how often each of them was updated, 255 for more.
    """

    text: str
    rows: list[int]
    counts: list[int]


@dataclass(frozen=True)
class LayerView:
    """What a token read in one Engram layer.

    Attributes:
        layer: from 0.
        openings: of the gate, 0 to 1, by branch.
        ngrams: by order, the shortest first.
        next_without: probability of the token that follows, with this layer's memory switched off; None for the last.
    """

    layer: int
    openings: list[float]
    ngrams: list[Ngram]
    next_without: float | None

    @property
    def opening(self) -> float:
        """The branches' mean."""
        return sum(self.openings) / len(self.openings)


@dataclass(frozen=True)
class TokenView:
    """A token of the text, and what is predicted after it.

    Attributes:
        token: its id.
        text: of it.
        layers: one entry for each Engram layer.
        next_with, next_without: probability of the token that follows, with the memory and with all of it switched off;
            None for the last token.
        likeliest_with, likeliest_without: the likeliest next tokens, with their probabilities.
    """

    token: int
    text: str
    layers: list[LayerView]
    next_with: float | None
    next_without: float | None
    likeliest_with: list[tuple[str, float]]
    likeliest_without: list[tuple[str, float]]

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return asdict(self)


class Inspector:
    """A saved run, opened to be looked into.

    Args:
        run: the checkpoint.

    Raises:
        UserError: the run has no memory, or is damaged.
    """

    def __init__(self, run: SavedRun) -> None:
        tables, engram = run.tables(), run.job.model.engram
        if tables is None or engram is None:
            raise UserError(f"{run.folder}: has no memory to look into (model.engram is null)")
        self._tables: SavedTables = tables
        self.layers, self.orders, self._heads = list(engram.layers), list(engram.orders), engram.heads
        self._run, self._tokenizer = run, run.tokenizer
        self._model: LanguageModel = run.model()

    @property
    def table_rows(self) -> list[int]:
        """Rows of each module's table."""
        return list(self._tables.num_rows)

    def pieces(self, text: str) -> Iterator[list[int]]:
        """A text's tokens in pieces as long as the run's sequences; each stands for a document, as in training.

        Raises:
            UserError: the text is empty.
        """
        ids, length = self._tokenizer.encode(text), self._run.job.data.sequence_length
        if not ids:
            raise UserError("the text is empty: give one of at least one token")
        for start in range(0, len(ids), length):
            yield ids[start : start + length]

    def rows_of(self, ids: Sequence[int]) -> Tensor:
        """The rows that a piece's tokens read: int64 [L, T, S]."""
        return self._tables.addresses.all_rows(*_batch(ids))[:, 0]

    def update_counts(self, module: int, rows: Tensor) -> Tensor:
        """How often rows of a module (int64, any shape) were updated, in the same shape."""
        rows_U, index = rows.unique(return_inverse=True)
        return self._tables.update_counts(module, rows_U)[index]

    def ngram(self, ids: Sequence[int], at: int, order: int) -> str:
        """The text of the n-gram that ends with token `at`."""
        return self._text(ids[max(0, at + 1 - order) : at + 1])

    @torch.no_grad()
    def look(self, ids: Sequence[int], *, likeliest: int = 3) -> list[TokenView]:
        """What the memory does for each token of a piece, with so many of the likeliest next tokens."""
        rows_LTS, memory = self.rows_of(ids), self._tables.look_up(*_batch(ids))
        counts_LTS = torch.stack([self.update_counts(module, rows) for module, rows in enumerate(rows_LTS)])
        with _gates(self._model) as openings:
            with_TV = self._predict(ids, memory)
        openings_LTM = [part[0].tolist() for part in openings]
        off = [_switched_off(part) for part in memory]
        without_TV = self._predict(ids, off)
        one_off = [
            self._predict(ids, [*memory[:module], off[module], *memory[module + 1 :]])
            if len(memory) > 1
            else without_TV
            for module in range(len(memory))
        ]
        return [
            TokenView(
                token,
                self._text([token]),
                [
                    LayerView(
                        layer,
                        openings_LTM[module][at],
                        self._ngrams(ids, at, rows_LTS[module, at].tolist(), counts_LTS[module, at].tolist()),
                        _of_next(one_off[module], ids, at),
                    )
                    for module, layer in enumerate(self.layers)
                ],
                _of_next(with_TV, ids, at),
                _of_next(without_TV, ids, at),
                self._likeliest(with_TV[at], likeliest),
                self._likeliest(without_TV[at], likeliest),
            )
            for at, token in enumerate(ids)
        ]

    def _ngrams(self, ids: Sequence[int], at: int, rows: list[int], counts: list[int]) -> list[Ngram]:
        ends = [self._heads * number for number in range(len(self.orders) + 1)]
        return [
            Ngram(self.ngram(ids, at, order), rows[start:end], counts[start:end])
            for order, (start, end) in zip(self.orders, pairwise(ends), strict=True)
        ]

    def _predict(self, ids: Sequence[int], memory: Sequence[MemoryRows]) -> Tensor:
        """Probabilities of the next tokens, fp32 [T, V], on the CPU."""
        device = next(self._model.parameters()).device
        logits_BTV = self._model(*(part.to(device) for part in _batch(ids)), [part.to(device) for part in memory])
        # A vocabulary may be padded beyond the tokenizer's.
        return logits_BTV[0, :, : self._tokenizer.vocab_size].float().softmax(-1).cpu()

    def _likeliest(self, share_V: Tensor, number: int) -> list[tuple[str, float]]:
        best = share_V.topk(min(number, len(share_V)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [(self._text([token]), share) for token, share in pairs]

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids) or "".join(str(self._tokenizer.backend.id_to_token(token)) for token in ids)


def _batch(ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Tokens and positions of a document, int64 [1, T]."""
    return torch.tensor([list(ids)]), torch.arange(len(ids)).unsqueeze(0)


def _switched_off(memory: MemoryRows) -> MemoryRows:
    """Rows of zeros: values are zero then, and so is all that the layer adds, whatever its gate and convolution."""
    return MemoryRows(torch.zeros_like(memory.rows_UD), memory.index)


def _of_next(share_TV: Tensor, ids: Sequence[int], at: int) -> float | None:
    return float(share_TV[at, ids[at + 1]]) if at + 1 < len(ids) else None


@contextmanager
def _gates(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the openings [B, T, M] of all gates, in the order of the layers, while a forward runs inside."""
    openings: list[Tensor] = []

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, Engram)
        openings.append(module.openings(*inputs[:2]).float().cpu())

    register: Callable[..., Any] = nn.Module.register_forward_pre_hook
    hooks = [register(module, note) for module in model.modules() if isinstance(module, Engram)]
    try:
        yield openings
    finally:
        for hook in hooks:
            hook.remove()
