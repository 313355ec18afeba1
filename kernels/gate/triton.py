"""The context gate of Engram in Triton. Formulas, shapes and dtypes: kernels/gate/__init__.py.

Forward, one program for some tokens of one branch: a pass over hidden states and keys for the score, a pass over the
value for the result. The backward is two kernels, which together touch every number once:

    tokens      reads the gradient of all branches and the value; writes dL/ds, and the gradient of the value
    elements    reads hidden states and keys; writes their gradients, and sums that of the weights over its own tokens

The two norm weights act only by their product, which is made before. Its gradient is summed in a fixed order: over
tokens within a program, then over programs. No atomics; the same bits on every run.

Shape suffixes: N tokens (batch x sequence), M branches, D hidden, C chunks of tokens.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gate.reference import CLAMP

_CLAMP = tl.constexpr(CLAMP)

_TILE = 2048
"""Numbers of each input that a program holds at a time: 16 a thread with four warps, two loads of 16 bytes in bf16."""
_COLUMNS = 512
"""Widest tile: small enough to waste little where D is no power of two."""
_CHUNKS, _CHUNK_TOKENS = 512, 64
"""Most partial sums of the weights' gradient, and fewest tokens in one: small beside the other gradients."""


def gate_forward(
    hidden_BTMD: Tensor,
    key_BTMD: Tensor,
    value_BTD: Tensor,
    query_weight_MD: Tensor,
    key_weight_MD: Tensor,
    eps: float,
    signed_sqrt: bool,
) -> tuple[Tensor, Tensor]:
    """The gated values [B, T, M, D], and fp32 [3, B, T, M] for the backward: both norms' scales and the score."""
    batch, length, branches, width = hidden_BTMD.shape
    gated = value_BTD.new_empty((batch, length, branches, width))
    saved = hidden_BTMD.new_empty((3, batch, length, branches), dtype=torch.float32)
    tokens = batch * length
    if gated.numel() == 0:
        return gated, saved
    hidden, key, value = (_rows(t) for t in (hidden_BTMD, key_BTMD, value_BTD))
    tile, columns = _tile(width)
    with torch.cuda.device_of(hidden):
        _gate_forward_kernel[(branches * triton.cdiv(tokens, tile),)](
            hidden, key, value, _product(query_weight_MD, key_weight_MD), gated, *saved,
            tokens, eps, 1 / math.sqrt(width),
            *hidden.stride()[:2], *key.stride()[:2], value.stride(0),
            SIGNED_SQRT=signed_sqrt, M=branches, D=width, TOKENS=tile, COLUMNS=columns,
            num_warps=_warps(tile * columns),
        )  # fmt: skip
    return gated, saved


def gate_backward(
    grad_BTMD: Tensor,
    hidden_BTMD: Tensor,
    key_BTMD: Tensor,
    value_BTD: Tensor,
    query_weight_MD: Tensor,
    key_weight_MD: Tensor,
    saved: Tensor,
    signed_sqrt: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the five inputs, each contiguous and in its input's dtype."""
    batch, length, branches, width = hidden_BTMD.shape
    tokens = batch * length
    if hidden_BTMD.numel() == 0:
        return _zeros(hidden_BTMD), _zeros(key_BTMD), _zeros(value_BTD), _zeros(query_weight_MD), _zeros(key_weight_MD)
    dhidden, dkey, dvalue = (t.new_empty(t.shape) for t in (hidden_BTMD, key_BTMD, value_BTD))
    grad, hidden, key, value = (_rows(t) for t in (grad_BTMD, hidden_BTMD, key_BTMD, value_BTD))
    tile, columns = _tile(width)
    per_chunk, chunks = _chunk(tokens)
    dscore_NM = saved.new_empty((tokens, branches))
    partial_CMD = saved.new_empty((chunks, branches, width))
    all_branches = triton.next_power_of_2(branches)
    with torch.cuda.device_of(hidden):
        _gate_backward_tokens[(tokens,)](
            grad, value, saved[2], dscore_NM, dvalue,
            *grad.stride()[:2], value.stride(0),
            SIGNED_SQRT=signed_sqrt, M=branches, D=width, BRANCHES=all_branches, COLUMNS=columns,
            num_warps=min(2, _warps(all_branches * columns)),
        )  # fmt: skip
        _gate_backward_elements[(triton.cdiv(width, columns), branches, chunks)](
            hidden, key, _product(query_weight_MD, key_weight_MD), *saved, dscore_NM, dhidden, dkey, partial_CMD,
            tokens, 1 / math.sqrt(width),
            *hidden.stride()[:2], *key.stride()[:2],
            M=branches, D=width, CHUNK=per_chunk, TOKENS=tile, COLUMNS=columns,
            num_warps=_warps(tile * columns),
        )  # fmt: skip
    dweight_MD = partial_CMD.sum(0)
    dquery_weight = (dweight_MD * key_weight_MD).to(query_weight_MD.dtype)
    dkey_weight = (dweight_MD * query_weight_MD).to(key_weight_MD.dtype)
    return dhidden, dkey, dvalue, dquery_weight, dkey_weight


def _rows(tensor: Tensor) -> Tensor:
    """[B, T, ...] as [N, ...], any strides but one between neighbours: copied only where that cannot be had."""
    tensor = tensor.flatten(0, 1)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _zeros(tensor: Tensor) -> Tensor:
    return tensor.new_zeros(tensor.shape)


def _product(query_weight_MD: Tensor, key_weight_MD: Tensor) -> Tensor:
    return (query_weight_MD.float() * key_weight_MD.float()).contiguous()


def _tile(width: int) -> tuple[int, int]:
    """Tokens and columns of a tile."""
    columns = min(_COLUMNS, max(16, triton.next_power_of_2(width)))
    return min(16, _TILE // columns), columns


def _chunk(tokens: int) -> tuple[int, int]:
    """Tokens in a partial sum of the weights' gradient, and the number of such sums."""
    size = max(_CHUNK_TOKENS, triton.next_power_of_2(triton.cdiv(tokens, _CHUNKS)))
    return size, triton.cdiv(tokens, size)


def _warps(numbers: int) -> int:
    """Warps for a tile of so many numbers: 16 a thread, up to four warps."""
    return max(1, min(4, numbers // 512))


@triton.jit
def _gate(score: tl.tensor, SIGNED_SQRT: tl.constexpr) -> tl.tensor:
    """Gate of a score. Comparisons are such that NaN stays NaN, which tl.maximum would turn into the clamp."""
    if SIGNED_SQRT:
        size = tl.abs(score)
        root = tl.sqrt(tl.where(size < _CLAMP, _CLAMP, size))
        score = tl.where(score < 0, -root, tl.where(score == 0, 0.0, root))
    return tl.sigmoid(score)


@triton.jit
def _gate_forward_kernel(
    hidden_ptr: tl.tensor, key_ptr: tl.tensor, value_ptr: tl.tensor, weight_ptr: tl.tensor, gated_ptr: tl.tensor,
    h_scale_ptr: tl.tensor, k_scale_ptr: tl.tensor, score_ptr: tl.tensor, tokens: tl.tensor, eps: tl.tensor,
    inverse_root_width: tl.tensor, hidden_token: tl.tensor, hidden_branch: tl.tensor, key_token: tl.tensor,
    key_branch: tl.tensor, value_token: tl.tensor,
    SIGNED_SQRT: tl.constexpr, M: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    # Branches are neighbours in the grid: they read one value, from the cache.
    branch = (tl.program_id(0) % M).to(tl.int64)
    token = (tl.program_id(0) // M).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    token_live = token < tokens
    column = tl.arange(0, COLUMNS)
    hidden_row = hidden_ptr + (token * hidden_token + branch * hidden_branch)[:, None]
    key_row = key_ptr + (token * key_token + branch * key_branch)[:, None]
    hh = tl.zeros([TOKENS, COLUMNS], tl.float32)
    kk = tl.zeros([TOKENS, COLUMNS], tl.float32)
    hk = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for start in range(0, D, COLUMNS):
        at = start + column
        live = token_live[:, None] & (at < D)[None, :]
        h = tl.load(hidden_row + at[None, :], mask=live, other=0.0).to(tl.float32)
        k = tl.load(key_row + at[None, :], mask=live, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + branch * D + at, mask=at < D, other=0.0)
        hh += h * h
        kk += k * k
        hk += h * k * weight[None, :]
    h_scale = tl.rsqrt(tl.sum(hh, 1) / D + eps)
    k_scale = tl.rsqrt(tl.sum(kk, 1) / D + eps)
    score = tl.sum(hk, 1) * h_scale * k_scale * inverse_root_width
    row = token * M + branch
    tl.store(h_scale_ptr + row, h_scale, mask=token_live)
    tl.store(k_scale_ptr + row, k_scale, mask=token_live)
    tl.store(score_ptr + row, score, mask=token_live)
    gate = _gate(score, SIGNED_SQRT)
    for start in range(0, D, COLUMNS):
        at = start + column
        live = token_live[:, None] & (at < D)[None, :]
        v = tl.load(value_ptr + (token * value_token)[:, None] + at[None, :], mask=live, other=0.0).to(tl.float32)
        tl.store(gated_ptr + (row * D)[:, None] + at[None, :], gate[:, None] * v, mask=live)


@triton.jit
def _gate_backward_tokens(
    grad_ptr: tl.tensor, value_ptr: tl.tensor, score_ptr: tl.tensor, dscore_ptr: tl.tensor, dvalue_ptr: tl.tensor,
    grad_token: tl.tensor, grad_branch: tl.tensor, value_token: tl.tensor,
    SIGNED_SQRT: tl.constexpr, M: tl.constexpr, D: tl.constexpr, BRANCHES: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    branch = tl.arange(0, BRANCHES).to(tl.int64)
    branch_live = branch < M
    column = tl.arange(0, COLUMNS)
    score = tl.load(score_ptr + token * M + branch, mask=branch_live, other=0.0)
    gate = _gate(score, SIGNED_SQRT)
    grad_row = grad_ptr + (token * grad_token + branch * grad_branch)[:, None]
    dot = tl.zeros([BRANCHES, COLUMNS], tl.float32)
    for start in range(0, D, COLUMNS):
        at = start + column
        live = branch_live[:, None] & (at < D)[None, :]
        g = tl.load(grad_row + at[None, :], mask=live, other=0.0).to(tl.float32)
        v = tl.load(value_ptr + token * value_token + at, mask=at < D, other=0.0).to(tl.float32)
        dot += g * v[None, :]
        tl.store(dvalue_ptr + token * D + at, tl.sum(gate[:, None] * g, 0), mask=at < D)
    dscore = tl.sum(dot, 1) * gate * (1 - gate)
    if SIGNED_SQRT:
        size = tl.abs(score)
        slope = 0.5 * tl.rsqrt(tl.where(size < _CLAMP, _CLAMP, size))
        dscore = tl.where(size < _CLAMP, 0.0, dscore * slope)
    tl.store(dscore_ptr + token * M + branch, dscore, mask=branch_live)


@triton.jit
def _gate_backward_elements(
    hidden_ptr: tl.tensor, key_ptr: tl.tensor, weight_ptr: tl.tensor, h_scale_ptr: tl.tensor, k_scale_ptr: tl.tensor,
    score_ptr: tl.tensor, dscore_ptr: tl.tensor, dhidden_ptr: tl.tensor, dkey_ptr: tl.tensor, partial_ptr: tl.tensor,
    tokens: tl.tensor, inverse_root_width: tl.tensor, hidden_token: tl.tensor, hidden_branch: tl.tensor,
    key_token: tl.tensor, key_branch: tl.tensor,
    M: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    branch = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(2).to(tl.int64)
    weight = tl.load(weight_ptr + branch * D + at, mask=at < D, other=0.0)[None, :]
    total = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for start in range(0, CHUNK, TOKENS):
        token = chunk * CHUNK + start + tl.arange(0, TOKENS)
        token_live = token < tokens
        live = token_live[:, None] & (at < D)[None, :]
        h_at = hidden_ptr + (token * hidden_token + branch * hidden_branch)[:, None] + at[None, :]
        k_at = key_ptr + (token * key_token + branch * key_branch)[:, None] + at[None, :]
        h = tl.load(h_at, mask=live, other=0.0).to(tl.float32)
        k = tl.load(k_at, mask=live, other=0.0).to(tl.float32)
        row = token * M + branch
        h_scale = tl.load(h_scale_ptr + row, mask=token_live, other=0.0)
        k_scale = tl.load(k_scale_ptr + row, mask=token_live, other=0.0)
        score = tl.load(score_ptr + row, mask=token_live, other=0.0)
        dscore = tl.load(dscore_ptr + row, mask=token_live, other=0.0)
        ddot = (dscore * h_scale * k_scale * inverse_root_width)[:, None]
        dnorm = dscore * score / D
        total += ddot * h * k
        dh = ddot * k * weight - (dnorm * h_scale * h_scale)[:, None] * h
        dk = ddot * h * weight - (dnorm * k_scale * k_scale)[:, None] * k
        out = (row * D)[:, None] + at[None, :]
        tl.store(dhidden_ptr + out, dh, mask=live)
        tl.store(dkey_ptr + out, dk, mask=live)
    tl.store(partial_ptr + (chunk * M + branch) * D + at, tl.sum(total, 0), mask=at < D)
