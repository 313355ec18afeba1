"""Sinkhorn-Knopp in Triton: one kernel forward, one backward. Formulas: kernels/branches/sinkhorn.py.

A program keeps some matrices, four numbers per thread, in registers through all iterations. The backward repeats the
iterations, keeping the intermediate matrices and their rows' sums, and then goes back through them. Where M is X
divided by the sums of its columns (or rows), and dlog X the gradient of log X, which is X times that of X,

    dlog X = dlog M - M sum(dlog M)          each column (or row) with its own sum

without a division. The gradient of log M_0 is that of L where L is not too low to count.

A GPU's fast division is less exact than a product. An error in 1 / s affects a whole row or column, so the next
iteration removes it; separate errors in every quotient would stay. The error of its exp is that of a logit which is off
by one in the last place, as the difference from its column's maximum already is.

Shape suffixes: M rows and columns, N matrices, S rows and columns of a tile: M, or the next power of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.branches.sinkhorn_reference import LOWEST

_LOWEST = tl.constexpr(LOWEST)
_NUMBERS = 4
"""Numbers per thread: 16 bytes in fp32 and, with 20 iterations kept, about half of the registers it can have."""
_WARP, _MOST_WARPS = 32, 32


def sinkhorn_forward(logits: Tensor, iterations: int) -> Tensor:
    """The doubly stochastic matrices [..., M, M], fp32, contiguous. Logits: any strides, any dtype but fp64."""
    matrices = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    if logits.numel() == 0:
        return matrices
    logits_NMM = logits.flatten(0, -3) if logits.dim() > 2 else logits.unsqueeze(0)
    grid, options = _launch(logits_NMM)
    with torch.cuda.device_of(logits):
        _forward_kernel[grid](
            logits_NMM, matrices, len(logits_NMM), *logits_NMM.stride(), ITERATIONS=iterations, **options
        )
    return matrices


def sinkhorn_backward(grad: Tensor, logits: Tensor, iterations: int) -> Tensor:
    """Gradient of the logits [..., M, M], contiguous and in their dtype, from that of the matrices. Any strides."""
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if logits.numel() == 0:
        return dlogits
    grad_NMM, logits_NMM = (t.flatten(0, -3) if t.dim() > 2 else t.unsqueeze(0) for t in (grad, logits))
    grid, options = _launch(logits_NMM)
    with torch.cuda.device_of(logits):
        _backward_kernel[grid](
            grad_NMM, logits_NMM, dlogits, len(logits_NMM), *grad_NMM.stride(), *logits_NMM.stride(),
            ITERATIONS=iterations, **options,
        )  # fmt: skip
    return dlogits


def _launch(logits_NMM: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """The grid and a program's shape. One warp waits for no other and needs no shared memory."""
    num_matrices, size, _ = logits_NMM.shape
    side = triton.next_power_of_2(size)
    block = max(1, _NUMBERS * _WARP // side**2)
    warps = min(_MOST_WARPS, max(1, side**2 // (_NUMBERS * _WARP)))
    return (triton.cdiv(num_matrices, block),), {"M": size, "S": side, "BLOCK": block, "num_warps": warps}


@triton.jit
def _places(
    num_matrices: tl.tensor, M: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """For every number of a tile: its matrix, row and column, and whether it is in the matrix, not padding."""
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None, None]
    row, column = tl.arange(0, S)[None, :, None], tl.arange(0, S)[None, None, :]
    within = (row < M) & (column < M)
    # Beyond the last matrix, that one is computed and written again, with the same bits: no zero sums, no masks.
    return tl.minimum(number, num_matrices - 1), row, column, within


@triton.jit
def _sums(matrix: tl.tensor, AXIS: tl.constexpr, M: tl.constexpr, S: tl.constexpr) -> tl.tensor:
    sums = tl.sum(matrix, AXIS, keep_dims=True)
    if M != S:
        sums = tl.where(sums == 0, 1.0, sums)  # of the tile's padding
    return sums


@triton.jit
def _start(logits: tl.tensor, within: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """M_0, and where a logit is too low to count. The comparisons keep NaN a NaN."""
    shifted = tl.where(within, logits - tl.max(logits, 1, keep_dims=True), 0.0)
    low = shifted < _LOWEST
    return tl.where(within, tl.exp(tl.where(low, _LOWEST, shifted)), 0.0), low


@triton.jit
def _forward_kernel(
    logits_ptr: tl.tensor, matrices_ptr: tl.tensor, num_matrices: tl.tensor,
    logits_matrix: tl.constexpr, logits_row: tl.constexpr, logits_column: tl.constexpr,
    ITERATIONS: tl.constexpr, M: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    number, row, column, within = _places(num_matrices, M, S, BLOCK)
    at = number * logits_matrix + row * logits_row + column * logits_column
    logits = tl.load(logits_ptr + at, mask=within, other=-float("inf")).to(tl.float32)
    matrix, _ = _start(logits, within)
    for _ in range(ITERATIONS):
        matrix = matrix * (1 / _sums(matrix, 1, M, S))
        matrix = matrix * (1 / _sums(matrix, 2, M, S))
    tl.store(matrices_ptr + number * (M * M) + row * M + column, matrix, mask=within)


@triton.jit
def _backward_kernel(
    grad_ptr: tl.tensor, logits_ptr: tl.tensor, dlogits_ptr: tl.tensor, num_matrices: tl.tensor,
    grad_matrix: tl.constexpr, grad_row: tl.constexpr, grad_column: tl.constexpr,
    logits_matrix: tl.constexpr, logits_row: tl.constexpr, logits_column: tl.constexpr,
    ITERATIONS: tl.constexpr, M: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    number, row, column, within = _places(num_matrices, M, S, BLOCK)
    at = number * logits_matrix + row * logits_row + column * logits_column
    logits = tl.load(logits_ptr + at, mask=within, other=-float("inf")).to(tl.float32)
    at = number * grad_matrix + row * grad_row + column * grad_column
    grad = tl.load(grad_ptr + at, mask=within, other=0.0).to(tl.float32)
    start, low = _start(logits, within)
    matrix = start
    kept: tl.tuple = ()
    kept_sums: tl.tuple = ()
    for _ in tl.static_range(ITERATIONS):
        matrix = matrix * (1 / _sums(matrix, 1, M, S))
        row_sums = _sums(matrix, 2, M, S)
        matrix = matrix * (1 / row_sums)
        kept += (matrix,)
        kept_sums += (row_sums,)
    dlog = grad * matrix
    for back in tl.static_range(ITERATIONS):
        rows_divided = kept[ITERATIONS - 1 - back]
        dlog -= rows_divided * tl.sum(dlog, 2, keep_dims=True)
        columns_divided = rows_divided * kept_sums[ITERATIONS - 1 - back]
        dlog -= columns_divided * tl.sum(dlog, 1, keep_dims=True)
    dlogits = tl.where(low, 0.0, dlog)
    tl.store(dlogits_ptr + number * (M * M) + row * M + column, dlogits, mask=within)
