"""How two checkpoints differ, part by part, in bounded memory.

Shape suffixes: U rows, W words of a record.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from offload.config import TableOptimizerConfig
from offload.rows.records import RecordLayout
from train.checkpoint.increment import rows_once
from train.checkpoint.saved_image import SavedImage, find_rows
from train.errors import UserError
from train.optim.pieces import StatePiece

ROWS = "rows"
_OPTIMIZER = "offload.optimizer."
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Difference:
    """How a part differs.

    Attributes:
        part: `weight`, a kind of optimizer state, `buffer`, or `rows`.
        compared: elements, or rows, that both have.
        differ: those of them that have other bits.
        largest: largest absolute difference of a value; of rows, of a weight as it was stored.
        only_first, only_second: elements, or rows, that the other one lacks.
    """

    part: str
    compared: int = 0
    differ: int = 0
    largest: float = 0.0
    only_first: int = 0
    only_second: int = 0

    def add(self, one: Tensor, other: Tensor) -> None:
        """Compares values that both have."""
        self.compared += one.numel()
        self.differ += int((bits(one) != bits(other)).sum())
        self.see(one, other)

    def see(self, one: Tensor, other: Tensor) -> None:
        """Takes note of how far apart values are."""
        if one.numel():
            self.largest = max(self.largest, float((one.double() - other.double()).abs().max()))


def differences(first: SavedImage, second: SavedImage) -> list[Difference]:
    """How two checkpoints differ, backbone first.

    Raises:
        Damaged: one is not what was saved.
        UserError: their rows are not of one kind.
    """
    found: dict[str, Difference] = {}
    for name in {**first.tensors, **second.tensors}:
        part = found.setdefault(slot := name.partition("/")[0], Difference(slot))
        infos = [image.tensors.get(name) for image in (first, second)]
        if infos[0] == infos[1]:
            for one, other in _aligned(_only(first, name), _only(second, name)):
                part.add(one, other)
            continue
        sizes = [0 if info is None else torch.Size(info.shape).numel() for info in infos]
        part.only_first, part.only_second = part.only_first + sizes[0], part.only_second + sizes[1]
    if first.spans or second.spans:
        found[ROWS] = _rows(first, second)
    return [*found.values()]


def bits(values: Tensor) -> Tensor:
    """The values' bits as integers: two NaNs may be equal, and two zeros differ."""
    return values.contiguous().view(_INTEGERS[values.element_size()])


def _only(image: SavedImage, name: str) -> Iterator[StatePiece]:
    return image.pieces(lambda other, *_: other == name)


def _aligned(first: Iterable[StatePiece], second: Iterable[StatePiece]) -> Iterator[tuple[Tensor, Tensor]]:
    """The same elements of one tensor from both, however each is cut."""
    others, other = iter(second), torch.empty(0)
    for piece in first:
        values = piece.values
        while len(values):
            if not len(other):
                other = next(others).values
            count = min(len(values), len(other))
            yield values[:count], other[:count]
            values, other = values[count:], other[count:]


def _rows(first: SavedImage, second: SavedImage) -> Difference:
    found, layouts = Difference(ROWS), [_layout(image) for image in (first, second)]
    layout = layouts[0] or layouts[1]
    assert layout is not None
    if None not in layouts and layouts[0] != layouts[1]:
        raise UserError(f"{first.path} and {second.path} have rows of other widths, dtypes or optimizers")
    for ids_U, records_UW, _ in rows_once(first):
        others_UW = torch.zeros_like(records_UW)
        there_U = find_rows(second, ids_U, others_UW)
        ones_UW, others_UW = records_UW[there_U], others_UW[there_U]
        found.compared += len(ones_UW)
        found.differ += int((bits(ones_UW) != bits(others_UW)).any(1).sum())
        found.see(layout.weights(ones_UW), layout.weights(others_UW))
        found.only_first += len(ids_U) - len(ones_UW)
    found.only_second = sum(len(rows.ids_N) for rows in rows_once(second)) - found.compared
    return found


def _layout(image: SavedImage) -> RecordLayout | None:
    """How the checkpoint's records are laid out; None without Engram."""
    if image.manifest.tables is None:
        return None
    settings = image.manifest.tables["settings"]
    optimizer = {k.removeprefix(_OPTIMIZER): value for k, value in settings.items() if k.startswith(_OPTIMIZER)}
    config = TableOptimizerConfig.model_validate(optimizer)
    return RecordLayout.of(settings["model.engram.row_dim"], config, settings["offload.row_dtype"])
