"""Products of the small matrices of hyper-connections in Triton. Formulas and shapes: kernels/branches/maps.py.

Each thread of a program has one token, with all its matrices in registers.

Shape suffixes as there, and N tokens (batch x sequence).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.branches.parts_triton import load_weights, weights_of

_TOKENS = 32
"""Tokens per program: one warp, so that 8192 tokens occupy all SMs."""


def compose_forward(mapping_BTJM: Tensor, weights_BTMI: Tensor | None, written_BTJ: Tensor | None) -> Tensor:
    """H W, and beside it what is written, contiguous."""
    arguments, sizes = _matrices(mapping_BTJM, weights_BTMI, written_BTJ)
    composed = mapping_BTJM.new_empty((*mapping_BTJM.shape[:-1], sizes["I"] + sizes["WRITTEN"]))
    tokens = mapping_BTJM[..., 0, 0].numel()
    if tokens > 0:
        with torch.cuda.device_of(composed):
            _compose_kernel[(triton.cdiv(tokens, _TOKENS),)](
                *arguments, composed, tokens, TOKENS=_TOKENS, num_warps=1, **sizes
            )
    return composed


def compose_backward(
    grad: Tensor, mapping_BTJM: Tensor, weights_BTMI: Tensor | None, written_BTJ: Tensor | None
) -> list[Tensor]:
    """Gradients of H and, where given, of W and of what was written; contiguous."""
    arguments, sizes = _matrices(mapping_BTJM, weights_BTMI, written_BTJ)
    dmapping, dweights, dwritten = (
        None if tensor is None else tensor.new_empty(tensor.shape)
        for tensor in (mapping_BTJM, weights_BTMI, written_BTJ)
    )
    grad_NJI = grad.flatten(0, 1)
    if len(grad_NJI) > 0:
        with torch.cuda.device_of(grad):
            _compose_backward_kernel[(triton.cdiv(len(grad_NJI), _TOKENS),)](
                grad_NJI, *grad_NJI.stride(), *arguments[:8], dmapping, dweights, dwritten, len(grad_NJI),
                TOKENS=_TOKENS, num_warps=1, **sizes,
            )  # fmt: skip
    return [tensor for tensor in (dmapping, dweights, dwritten) if tensor is not None]


def _matrices(
    mapping_BTJM: Tensor, weights_BTMI: Tensor | None, written_BTJ: Tensor | None
) -> tuple[tuple[Any, ...], dict[str, int]]:
    """The matrices with their strides, and their sizes, as the kernels take them."""
    written: tuple[Any, ...] = (None, 0, 0)
    if written_BTJ is not None:
        written_NJ = written_BTJ.flatten(0, 1)
        written = written_NJ, *written_NJ.stride()
    rows, branches = mapping_BTJM.shape[-2:]
    parts = branches if weights_BTMI is None else weights_BTMI.shape[-1]
    sizes = {"J": rows, "M": branches, "I": parts, "WRITTEN": int(written_BTJ is not None)}
    return (*weights_of(mapping_BTJM), *weights_of(weights_BTMI), *written), sizes


@triton.jit
def _compose_kernel(
    mapping_ptr: tl.tensor, mapping_token: tl.tensor, mapping_row: tl.tensor, mapping_column: tl.tensor,
    weights_ptr: tl.tensor, weights_token: tl.tensor, weights_row: tl.tensor, weights_part: tl.tensor,
    written_ptr: tl.tensor, written_token: tl.tensor, written_row: tl.tensor, composed_ptr: tl.tensor,
    tokens: tl.tensor, J: tl.constexpr, M: tl.constexpr, I: tl.constexpr, WRITTEN: tl.constexpr, TOKENS: tl.constexpr,
) -> None:  # fmt: skip
    # Threads beyond the last token compute and write it again, with the same bits.
    token = tl.minimum(tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS), tokens - 1)
    mapping = load_weights(mapping_ptr, mapping_token, mapping_row, mapping_column, token, J, M)
    composed = mapping
    if weights_ptr is not None:
        weights = load_weights(weights_ptr, weights_token, weights_row, weights_part, token, M, I)
        composed = ()
        for j in tl.static_range(J):
            for i in tl.static_range(I):
                total = mapping[j * M] * weights[i]
                for m in tl.static_range(1, M):
                    total += mapping[j * M + m] * weights[m * I + i]
                composed += (total,)
    for j in tl.static_range(J):
        row = composed_ptr + (token * J + j) * (I + WRITTEN)
        for i in tl.static_range(I):
            tl.store(row + i, composed[j * I + i])
        if WRITTEN:
            tl.store(row + I, tl.load(written_ptr + token * written_token + j * written_row))


@triton.jit
def _compose_backward_kernel(
    grad_ptr: tl.tensor, grad_token: tl.tensor, grad_row: tl.tensor, grad_part: tl.tensor,
    mapping_ptr: tl.tensor, mapping_token: tl.tensor, mapping_row: tl.tensor, mapping_column: tl.tensor,
    weights_ptr: tl.tensor, weights_token: tl.tensor, weights_row: tl.tensor, weights_part: tl.tensor,
    dmapping_ptr: tl.tensor, dweights_ptr: tl.tensor, dwritten_ptr: tl.tensor, tokens: tl.tensor,
    J: tl.constexpr, M: tl.constexpr, I: tl.constexpr, WRITTEN: tl.constexpr, TOKENS: tl.constexpr,
) -> None:  # fmt: skip
    token = tl.minimum(tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS), tokens - 1)
    grad = load_weights(grad_ptr, grad_token, grad_row, grad_part, token, J, I)
    dmapping = grad
    if weights_ptr is not None:
        mapping = load_weights(mapping_ptr, mapping_token, mapping_row, mapping_column, token, J, M)
        weights = load_weights(weights_ptr, weights_token, weights_row, weights_part, token, M, I)
        dmapping = _times_transposed(grad, weights, J, M, I)
        for m in tl.static_range(M):
            for i in tl.static_range(I):
                total = mapping[m] * grad[i]
                for j in tl.static_range(1, J):
                    total += mapping[j * M + m] * grad[j * I + i]
                tl.store(dweights_ptr + (token * M + m) * I + i, total)
    for number in tl.static_range(J * M):
        tl.store(dmapping_ptr + token * (J * M) + number, dmapping[number])
    if WRITTEN:
        for j in tl.static_range(J):
            dwritten = tl.load(grad_ptr + token * grad_token + j * grad_row + I * grad_part)
            tl.store(dwritten_ptr + token * J + j, dwritten)


@triton.jit
def _times_transposed(grad: tl.tuple, weights: tl.tuple, J: tl.constexpr, M: tl.constexpr, I: tl.constexpr) -> tl.tuple:
    """The gradient [J, I] times the transposed weights [M, I]."""
    product: tl.tuple = ()
    for j in tl.static_range(J):
        for m in tl.static_range(M):
            total = grad[j * I] * weights[m * I]
            for i in tl.static_range(1, I):
                total += grad[j * I + i] * weights[m * I + i]
            product += (total,)
    return product
