"""Muon on partitioned matrices: momentum where the elements are, orthogonalisation where a whole matrix is.

Momentum and the step are elementwise and need no communication. In between, every matrix is put together on one rank of
its group, orthogonalised there, and its parts go back to whoever holds them: two all-to-alls per step, whatever the
ZeRO stage, and no matrix is orthogonalised twice. A matrix that one rank holds alone never travels.

Jordan et al. 2024, "Muon"; scaled as in Liu et al. 2025, "Muon is scalable for LLM training" (arXiv 2502.16982).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from model.parameters import matrices_fused
from train.optim.flat_parts import Run

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_MAX_BATCH_ELEMENTS = 1 << 27
_NORM_FLOOR = 1e-7

MatrixKey = tuple[str, int, int, int]
"""Logical name of the parameter, number of the matrix in it, rows, columns."""


class Piece(NamedTuple):
    """Consecutive elements of one matrix in a rank's flat tensor."""

    matrix: MatrixKey
    start: int
    numel: int
    offset: int


def newton_schulz(matrices_NRC: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Moves the singular values of each matrix close to 1 (between about 0.7 and 1.2), keeping its singular vectors.

    Quintic Newton-Schulz iteration with Jordan's coefficients, in `dtype`.

    Args:
        matrices_NRC: N matrices [N, R, C], any float dtype.
        steps: iterations; 5 is usual.
        dtype: number format of the iteration.

    Returns:
        [N, R, C] in `dtype`. A zero matrix stays zero.
    """
    a, b, c = _COEFFICIENTS
    norms = torch.linalg.vector_norm(matrices_NRC.float(), dim=(-2, -1), keepdim=True).clamp_min(_NORM_FLOOR)
    x = (matrices_NRC / norms).to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.mT if tall else x


def matrix_shape(run: Run) -> tuple[int, int]:
    """Rows and columns of the matrices a parameter consists of.

    The last two dimensions; a fused gate and up projection counts as the two matrices it stands for, so that the
    result is the same with expert parallelism, which stores them apart.
    """
    rows, columns = run.shape[-2:]
    return rows // matrices_fused(run.name), columns


def pieces_of(runs: Iterable[Run]) -> Iterator[Piece]:
    """Cuts runs at the borders of the matrices."""
    for run in runs:
        rows, columns = matrix_shape(run)
        position, end = run.start, run.start + run.numel
        while position < end:
            number, start = divmod(position, rows * columns)
            numel = min(end - position, rows * columns - start)
            yield Piece((run.name, number, rows, columns), start, numel, run.offset + position - run.start)
            position += numel


class Orthogonalizer:
    """The fixed plan by which the ranks of one group orthogonalise the matrices of one part."""

    def __init__(self, runs: Sequence[Sequence[Run]], group: dist.ProcessGroup, device: torch.device) -> None:
        """
        Args:
            runs: the runs of every rank of `group`, in the order of its ranks.
            group: the ranks that share the part.
            device: where matrices are exchanged and orthogonalised.
        """
        self._group, self._device = group, device
        self._rank = dist.get_rank(group)
        pieces = [list(pieces_of(rank_runs)) for rank_runs in runs]
        owners = _owners(pieces)
        complete = [{p.matrix for p in held if p.numel == p.matrix[2] * p.matrix[3]} for held in pieces]

        def towards(source: int, owner: int) -> list[Piece]:
            needed = (p for p in pieces[source] if owners[p.matrix] == owner and source != owner)
            return [p for p in needed if p.matrix not in complete[owner]]

        def back(owner: int, holder: int) -> list[Piece]:
            return [p for p in pieces[holder] if owners[p.matrix] == owner and holder != owner]

        ranks, me = range(len(pieces)), self._rank
        self._collect_sends = [towards(me, other) for other in ranks]
        self._collect_receives = [towards(other, me) for other in ranks]
        self._return_sends = [back(me, other) for other in ranks]
        self._return_receives = [back(other, me) for other in ranks]
        self._own = [p for p in pieces[me] if owners[p.matrix] == me]
        self._collects = any(towards(source, owner) for source in ranks for owner in ranks)
        self._returns = any(back(owner, holder) for owner in ranks for holder in ranks)

    @torch.no_grad()
    def __call__(self, update: Tensor, steps: int, dtype: torch.dtype, rms: float) -> None:
        """Replaces the matrices in `update` by orthogonal ones with a root mean square of about `rms`. Collective.

        Args:
            update: this rank's elements, fp32, flat, laid out as its runs; overwritten.
            steps: Newton-Schulz iterations.
            dtype: number format of the iterations.
            rms: target root mean square of the elements of an update.
        """
        parts: dict[MatrixKey, list[tuple[int, Tensor]]] = defaultdict(list)
        for piece in self._own:
            parts[piece.matrix].append((piece.start, _slice(update, piece).to(self._device)))
        if self._collects:
            sends = [[_slice(update, piece) for piece in pieces] for pieces in self._collect_sends]
            for piece, values in self._exchange(sends, self._collect_receives):
                parts[piece.matrix].append((piece.start, values))
        results = _orthogonalize(parts, steps, dtype, rms)
        for piece in self._own:
            _slice(update, piece).copy_(_part(results, piece))
        if self._returns:
            sends = [[_part(results, piece) for piece in pieces] for pieces in self._return_sends]
            for piece, values in self._exchange(sends, self._return_receives):
                _slice(update, piece).copy_(values)

    def _exchange(
        self, sends: Sequence[Sequence[Tensor]], receives: Sequence[Sequence[Piece]]
    ) -> list[tuple[Piece, Tensor]]:
        """All-to-all of the lists of values for every rank; returns what came, piece by piece."""
        outgoing = [values for values_for_rank in sends for values in values_for_rank]
        packed = torch.cat(outgoing) if outgoing else torch.empty(0)
        expected = [piece for pieces in receives for piece in pieces]
        received = torch.empty(sum(piece.numel for piece in expected), device=self._device)
        dist.all_to_all_single(
            received,
            packed.to(self._device),
            output_split_sizes=[sum(piece.numel for piece in pieces) for pieces in receives],
            input_split_sizes=[sum(values.numel() for values in values_for_rank) for values_for_rank in sends],
            group=self._group,
        )
        return list(zip(expected, received.split([piece.numel for piece in expected]), strict=True))


def _slice(flat: Tensor, piece: Piece) -> Tensor:
    return flat.view(-1)[piece.offset : piece.offset + piece.numel]


def _part(results: dict[MatrixKey, Tensor], piece: Piece) -> Tensor:
    return results[piece.matrix].reshape(-1)[piece.start : piece.start + piece.numel]


def _owners(pieces: Sequence[Sequence[Piece]]) -> dict[MatrixKey, int]:
    """Gives every matrix to one of the ranks that hold most of it, and among those to the least busy so far."""
    held: dict[MatrixKey, dict[int, int]] = {}
    for rank, rank_pieces in enumerate(pieces):
        for piece in rank_pieces:
            by_rank = held.setdefault(piece.matrix, {})
            by_rank[rank] = by_rank.get(rank, 0) + piece.numel
    owners, busy = {}, [0] * len(pieces)
    for matrix, by_rank in held.items():
        most = max(by_rank.values())
        owners[matrix] = min((rank for rank in by_rank if by_rank[rank] == most), key=lambda rank: busy[rank])
        busy[owners[matrix]] += matrix[2] * matrix[3] * min(matrix[2:])
    return owners


def _orthogonalize(
    parts: dict[MatrixKey, list[tuple[int, Tensor]]], steps: int, dtype: torch.dtype, rms: float
) -> dict[MatrixKey, Tensor]:
    """Puts the matrices together from their parts and orthogonalises those of a shape in one batch."""
    by_shape: dict[tuple[int, int], list[MatrixKey]] = defaultdict(list)
    for key in parts:
        by_shape[key[2:]].append(key)
    results: dict[MatrixKey, Tensor] = {}
    for (rows, columns), keys in by_shape.items():
        batch = max(1, _MAX_BATCH_ELEMENTS // (rows * columns))
        for first in range(0, len(keys), batch):
            chunk = keys[first : first + batch]
            whole = [torch.cat([values for _, values in sorted(parts[key], key=lambda part: part[0])]) for key in chunk]
            orthogonal = newton_schulz(torch.stack(whole).view(-1, rows, columns), steps, dtype)
            scale = rms * max(rows, columns) ** 0.5
            results.update(zip(chunk, (orthogonal.float() * scale).unbind(), strict=True))
    return results
