"""The kernels of `kernels.gate.triton`, which says what each does."""

import triton
import triton.language as tl

from kernels.gate.reference import CLAMP

_CLAMP = tl.constexpr(CLAMP)


@triton.jit
def _gate(score: tl.tensor, SIGNED_SQRT: tl.constexpr) -> tl.tensor:
    """Gate of a score. The comparisons keep NaN a NaN; tl.maximum would turn it into the clamp."""
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
    """One program for some tokens of one branch."""
    # A token's branches are adjacent in the grid: they read its value from the cache.
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
    """One program for all branches of a token."""
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
    """One program for some columns of one branch and a chunk of tokens."""
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
