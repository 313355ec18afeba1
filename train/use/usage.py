"""Which rows a text uses most, and the n-grams behind them."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from train.use.inspection import Inspector


@dataclass(frozen=True)
class UsedRow:
    """A row that a text looks up.

    Attributes:
        layer: of the Engram module, from 0.
        order, head: of the sub-table; heads from 0.
        row: of the module's table.
        lookups: of the text.
        count: updates that the row has had, 255 for more; -1 where that was not saved.
        ngrams: distinct texts behind it with how often each stands there, most frequent first.
    """

    layer: int
    order: int
    head: int
    row: int
    lookups: int
    count: int
    ngrams: list[tuple[str, int]]


def most_used(inspector: Inspector, text: str, top: int) -> list[UsedRow]:
    """The `top` most used rows of every layer, most used first."""
    pieces = list(inspector.pieces(text))
    rows = [inspector.rows_of(ids) for ids in pieces]
    return [
        used for module in range(len(inspector.layers)) for used in _of_module(inspector, module, pieces, rows, top)
    ]


def _of_module(
    inspector: Inspector, module: int, pieces: list[list[int]], rows: list[torch.Tensor], top: int
) -> Iterable[UsedRow]:
    all_TS = torch.cat([part[module] for part in rows])
    found_U, lookups_U = all_TS.unique(return_counts=True)
    best = lookups_U.argsort(descending=True, stable=True)[:top]
    chosen = dict(zip(found_U[best].tolist(), lookups_U[best].tolist(), strict=True))
    counts = dict(zip(chosen, inspector.update_counts(module, torch.tensor(list(chosen))).tolist(), strict=True))
    heads = all_TS.shape[1] // len(inspector.orders)
    places: dict[int, int] = {}
    ngrams: dict[int, Counter[str]] = defaultdict(Counter)
    for ids, part in zip(pieces, rows, strict=True):
        for at, place in torch.isin(part[module], torch.tensor(list(chosen))).nonzero().tolist():
            row = int(part[module, at, place])
            places[row] = place
            ngrams[row][inspector.ngram(ids, at, inspector.orders[place // heads])] += 1
    for row, lookups in chosen.items():
        order, head = divmod(places[row], heads)
        yield UsedRow(
            inspector.layers[module],
            inspector.orders[order],
            head,
            row,
            lookups,
            counts[row],
            ngrams[row].most_common(),
        )
