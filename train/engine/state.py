"""The backbone as one logical image: pieces of whole tensors, by parameter name, of which each rank gives its own."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from train.optim.backbone import ADAM_STATES, MUON_STATES, BackboneOptimizer
from train.optim.flat_parts import FlatPart, Layout, Run
from train.optim.pieces import BUFFER, WEIGHT, Beginning, SavedState, StatePiece, TensorInfo

_KINDS = (WEIGHT, *ADAM_STATES, *MUON_STATES)


class LogicalState:
    """This rank's part of the image.

    Args:
        parts: this rank's.
        layout: of all ranks.
        owned: from `owned_runs`: what each rank gives.
        optimizer: holds the state of the parts.
        buffers: gives the model's persistent buffers by logical name; they are equal on all ranks.
    """

    def __init__(
        self,
        parts: Sequence[FlatPart],
        layout: Layout,
        owned: Layout,
        optimizer: BackboneOptimizer,
        buffers: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        self._parts, self._layout, self._optimizer, self._buffers = parts, layout, optimizer, buffers
        self._owned = owned[dist.get_rank()]

    def tensors(self) -> dict[str, TensorInfo]:
        """The image's tensors: the same on all ranks."""
        found = {
            f"{kind}/{run.name}": TensorInfo(torch.float32, run.shape)
            for rank in self._layout
            for runs, part in zip(rank, self._parts, strict=True)
            for kind in self._flats(part)
            for run in runs
        }
        of_buffers = {name: TensorInfo(buffer.dtype, tuple(buffer.shape)) for name, buffer in self._named_buffers()}
        return found | of_buffers

    def pieces(self, piece_bytes: int) -> Iterator[StatePiece]:
        """This rank's share of the image, in pieces up to a size: views of the live state, and of its own alone."""
        for part, runs in zip(self._parts, self._owned, strict=True):
            for kind, flat in self._flats(part).items():
                for run in runs:
                    values = flat.view(-1)[run.offset : run.offset + run.numel]
                    yield from _cut(f"{kind}/{run.name}", run.start, values, piece_bytes)
        if dist.get_rank() == 0:
            for name, buffer in self._named_buffers():
                yield from _cut(name, 0, buffer.detach().reshape(-1), piece_bytes)

    def check(self, saved: SavedState) -> None:
        """Raises ValueError, on all ranks alike, if an image lacks a tensor or has one of another shape."""
        for name, info in self.tensors().items():
            kind, _, parameter = name.partition("/")
            what = parameter if kind == BUFFER else f"{kind} of {parameter}"
            there = saved.tensors.get(name)
            if there is None and saved.beginning(name) is not None:
                continue
            if there is None:
                raise ValueError(f"the saved state has no {what}: it is from another model or optimizer")
            if there.shape != info.shape:
                raise ValueError(f"the saved {what} has shape {list(there.shape)}, this model's has {list(info.shape)}")

    @torch.no_grad()
    def load(self, saved: SavedState) -> None:
        """Loads this rank's part of an image, piece by piece. RuntimeError if a part of it did not come."""
        targets = {name: _Target(places) for name, places in self._targets().items()}
        for name in targets.keys() - saved.tensors.keys():
            if saved.beginning(name) is Beginning.ZERO:
                targets[name].clear()
            del targets[name]
        for piece in saved.pieces(lambda name, *span: name in targets and targets[name].overlaps(*span)):
            targets[piece.tensor].take(piece)
        if missing := [name for name, target in targets.items() if target.missing]:
            raise RuntimeError(f"a part of {missing[0]} was not given")
        self._optimizer.set_step_count(saved.steps)

    def _flats(self, part: FlatPart) -> dict[str, Tensor]:
        """What is saved of a part, each laid out as its runs."""
        state = self._optimizer.state[part.flat]
        return {WEIGHT: part.flat.data} | {kind: state[kind] for kind in _KINDS if kind in state}

    def _named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        return ((f"{BUFFER}/{name}", buffer) for name, buffer in self._buffers().items())

    def _targets(self) -> dict[str, list[tuple[Run, Tensor]]]:
        """By tensor, this rank's runs of it and the flat tensors that hold them."""
        found: dict[str, list[tuple[Run, Tensor]]] = {}
        for part in self._parts:
            for kind, flat in self._flats(part).items():
                for run in part.runs:
                    found.setdefault(f"{kind}/{run.name}", []).append((run, flat.view(-1)))
        for name, buffer in self._named_buffers():
            found[name] = [(Run(name, tuple(buffer.shape), 0, buffer.numel(), 0), buffer.view(-1))]
        return found


class _Target:
    """The places of one tensor's elements on this rank."""

    def __init__(self, places: list[tuple[Run, Tensor]]) -> None:
        self._places = sorted(places, key=lambda place: place[0].start)
        self._starts = [run.start for run, _ in self._places]
        self._ends = [run.start + run.numel for run, _ in self._places]
        self.missing = sum(run.numel for run, _ in self._places)
        """Elements that did not come yet."""

    def overlaps(self, start: int, count: int) -> bool:
        """Whether any element of a range has a place here."""
        return self._first(start) < self._last(start + count)

    def clear(self) -> None:
        """Makes all elements zero."""
        for run, flat in self._places:
            flat[run.offset : run.offset + run.numel].zero_()

    def take(self, piece: StatePiece) -> None:
        """Copies what has a place here."""
        end = piece.start + len(piece.values)
        for run, flat in self._places[self._first(piece.start) : self._last(end)]:
            low, high = max(run.start, piece.start), min(run.start + run.numel, end)
            place = run.offset + low - run.start
            flat[place : place + high - low].copy_(piece.values[low - piece.start : high - piece.start])
            self.missing -= high - low

    def _first(self, start: int) -> int:
        return bisect_right(self._ends, start)

    def _last(self, end: int) -> int:
        return bisect_left(self._starts, end)


def _cut(tensor: str, start: int, values: Tensor, piece_bytes: int) -> Iterator[StatePiece]:
    step = max(1, piece_bytes // values.element_size())
    for place in range(0, len(values), step):
        yield StatePiece(tensor, start + place, values[place : place + step])
