"""Projections of a normalised stream on a GPU, forward and backward. Formulas and shapes: kernels/branches/__init__.py.

Triton does the work per token. Forward, one kernel mixes the stream and computes its norm's scale. Backward, one kernel
prepares the projections' gradient, and the mixtures' kernel includes the norm's part of the gradient in passing. The
products with P, which has few rows, are left to cuBLAS between the kernels. No atomics.

Shape suffixes as in kernels/branches/__init__.py, and N tokens (batch x sequence).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.branches.parts_triton import (
    columns_of,
    gradients_of,
    load_parts,
    load_weights,
    mixture,
    parts_of,
    weights_of,
)
from kernels.branches.reference import product
from kernels.branches.triton import mix_backward

_TOKENS = 32
"""Tokens per program that scales the projections' gradients."""


def project_forward(
    projection_KC: Tensor, weights_BTMI: Tensor | None, base_BTMD: Tensor, outputs_BTD: list[Tensor], eps: float
) -> tuple[Tensor, Tensor]:
    """P RMSNorm(vec x) [B, T, K] and the norm's scales [B, T], fp32. P and the parts have one dtype, any strides."""
    scale_BT = base_BTMD.new_empty(base_BTMD.shape[:2], dtype=torch.float32)
    shape = (*scale_BT.shape, len(projection_KC))
    if scale_BT.numel() == 0:
        return scale_BT.new_empty(shape), scale_BT
    stream_NC = _room_for_stream(weights_BTMI, base_BTMD)
    parts, options = parts_of(base_BTMD, outputs_BTD)
    columns, warps = columns_of(options["D"])
    with torch.cuda.device_of(scale_BT):
        _stream_kernel[(scale_BT.numel(),)](
            *weights_of(weights_BTMI), *parts, stream_NC, scale_BT, eps, COLUMNS=columns, num_warps=warps, **options
        )
    products_NK = product(_stream(stream_NC, base_BTMD), projection_KC.mT)
    return products_NK.view(shape).mul_(scale_BT.unsqueeze(-1)), scale_BT


def project_backward(
    grad_BTK: Tensor,
    projected_BTK: Tensor,
    scale_BT: Tensor,
    projection_KC: Tensor,
    weights_BTMI: Tensor | None,
    base_BTMD: Tensor,
    outputs_BTD: list[Tensor],
) -> list[Tensor]:
    """Gradients of P, of the weights if there are any, of the base and of every output, contiguous."""
    if scale_BT.numel() == 0:
        return [torch.zeros_like(projection_KC), *gradients_of(weights_BTMI, base_BTMD, outputs_BTD)]
    scaled_NK, pull_N = _scaled(grad_BTK, projected_BTK, scale_BT, projection_KC)
    dstream_BTMD = product(scaled_NK, projection_KC).view(base_BTMD.shape)
    stream_NC = _room_for_stream(weights_BTMI, base_BTMD)
    grads = mix_backward(dstream_BTMD, weights_BTMI, base_BTMD, outputs_BTD, pull_N, stream_NC)
    return [product(scaled_NK.mT, _stream(stream_NC, base_BTMD)).to(projection_KC.dtype), *grads]


def _room_for_stream(weights_BTMI: Tensor | None, base_BTMD: Tensor) -> Tensor | None:
    batch, length, branches, width = base_BTMD.shape
    return None if weights_BTMI is None else base_BTMD.new_empty((batch * length, branches * width))


def _stream(stream_NC: Tensor | None, base_BTMD: Tensor) -> Tensor:
    return base_BTMD.flatten(0, 1).flatten(1) if stream_NC is None else stream_NC


def _scaled(grad_BTK: Tensor, projected_BTK: Tensor, scale_BT: Tensor, projection_KC: Tensor) -> tuple[Tensor, Tensor]:
    """The projections' gradient times the norm's scale [N, K], in the dtype of P; and the pull [N]."""
    rows, width = projection_KC.shape
    grad_NK = grad_BTK.flatten(0, 1)
    scaled_NK = projection_KC.new_empty(grad_NK.shape)
    pull_N = scale_BT.new_empty(scale_BT.numel())
    with torch.cuda.device_of(pull_N):
        _scaled_kernel[(triton.cdiv(len(pull_N), _TOKENS),)](
            grad_NK, *grad_NK.stride(), projected_BTK, scale_BT, scaled_NK, pull_N, len(pull_N), width,
            ROWS=rows, ALL_ROWS=triton.next_power_of_2(rows), TOKENS=_TOKENS,
        )  # fmt: skip
    return scaled_NK, pull_N


@triton.jit
def _stream_kernel(
    weights_ptr: tl.tensor, weights_token: tl.tensor, weights_row: tl.tensor, weights_part: tl.tensor,
    base_ptr: tl.tensor, base_token: tl.tensor, base_branch: tl.tensor, outputs: tl.tuple, output_tokens: tl.tuple,
    stream_ptr: tl.tensor, scale_ptr: tl.tensor, eps: tl.tensor,
    M: tl.constexpr, K: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    MIXED: tl.constexpr = weights_ptr is not None
    token = tl.program_id(0).to(tl.int64)
    weights: tl.tuple = ()
    if MIXED:
        weights = load_weights(weights_ptr, weights_token, weights_row, weights_part, token, M, M + K)
    squares = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, D, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        live = at < D
        parts = load_parts(base_ptr, base_token, base_branch, outputs, output_tokens, token, at, live, M, K)
        for m in tl.static_range(M):
            branch = mixture(parts, weights, MIXED, m, M + K).to(parts[0].dtype)
            wide = branch.to(tl.float32)
            squares += wide * wide
            if MIXED:
                tl.store(stream_ptr + (token * M + m) * D + at, branch, mask=live)
    tl.store(scale_ptr + token, tl.rsqrt(tl.sum(squares, 0) / (M * D) + eps))


@triton.jit
def _scaled_kernel(
    grad_ptr: tl.tensor, grad_token: tl.tensor, grad_row: tl.tensor, projected_ptr: tl.tensor, scale_ptr: tl.tensor,
    scaled_ptr: tl.tensor, pull_ptr: tl.tensor, tokens: tl.tensor, width: tl.tensor,
    ROWS: tl.constexpr, ALL_ROWS: tl.constexpr, TOKENS: tl.constexpr,
) -> None:  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    row = tl.arange(0, ALL_ROWS)[None, :]
    live = (token < tokens)[:, None] & (row < ROWS)
    grad = tl.load(grad_ptr + token[:, None] * grad_token + row * grad_row, mask=live, other=0.0).to(tl.float32)
    projected = tl.load(projected_ptr + token[:, None] * ROWS + row, mask=live, other=0.0)
    scale = tl.load(scale_ptr + token, mask=token < tokens, other=0.0)
    tl.store(scaled_ptr + token[:, None] * ROWS + row, grad * scale[:, None], mask=live)
    # The norm's own part: d(scale)/dx = -scale^3 x / C, and the projections are proportional to the scale.
    tl.store(pull_ptr + token, tl.sum(grad * projected, 1) * scale * scale / width, mask=token < tokens)
