"""The mappings of hyper-connections in Triton: sigmoids and logits of projections, and their gradients.

Formulas and shapes: kernels/branches/maps.py. The gradients of biases and factors are sums over the tokens: within each
program, then over the programs by one more program, in a fixed order.

Shape suffixes as there, and N tokens (batch x sequence), S programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS = 64
"""Tokens per program."""
_SUMMED = 64
"""Programs whose sums are added at once."""


def mappings_forward(
    projected_BTK: Tensor, alpha_3: Tensor, bias_K: Tensor, branches: int
) -> tuple[Tensor, Tensor, Tensor]:
    """H_pre, H_post and the logits of H_res, contiguous fp32."""
    shape = (*projected_BTK.shape[:-1], branches)
    pre, post = projected_BTK.new_empty(shape), projected_BTK.new_empty(shape)
    res = projected_BTK.new_empty((*shape, branches))
    projected_NK = projected_BTK.flatten(0, -2)
    tokens = len(projected_NK)
    if tokens > 0:
        with torch.cuda.device_of(pre):
            _mappings_kernel[(triton.cdiv(tokens, _TOKENS),)](
                projected_NK, *projected_NK.stride(), alpha_3.contiguous(), bias_K.contiguous(), pre, post, res,
                tokens, M=branches, **_rows(len(bias_K)),
            )  # fmt: skip
    return pre, post, res


def mappings_backward(
    dpre: Tensor,
    dpost: Tensor,
    dres: Tensor,
    pre_BTM: Tensor,
    post_BTM: Tensor,
    projected_BTK: Tensor,
    alpha_3: Tensor,
    bias_K: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the projections, of alpha and of b, contiguous and in their dtypes."""
    dprojected = projected_BTK.new_empty(projected_BTK.shape)
    dalpha, dbias = alpha_3.new_empty(alpha_3.shape), bias_K.new_empty(bias_K.shape)
    projected_NK, tokens = projected_BTK.flatten(0, -2), pre_BTM[..., 0].numel()
    if tokens == 0:
        return dprojected, dalpha.zero_(), dbias.zero_()
    dpre_NM, dpost_NM, dres_NMM = dpre.flatten(0, -2), dpost.flatten(0, -2), dres.flatten(0, -3)
    programs, branches = triton.cdiv(tokens, _TOKENS), pre_BTM.shape[-1]
    sums_S2K = projected_BTK.new_empty((programs, 2, len(bias_K)))
    with torch.cuda.device_of(pre_BTM):
        _mappings_backward_kernel[(programs,)](
            dpre_NM, *dpre_NM.stride(), dpost_NM, *dpost_NM.stride(), dres_NMM, *dres_NMM.stride(),
            pre_BTM, post_BTM, projected_NK, *projected_NK.stride(), alpha_3.contiguous(), dprojected, sums_S2K,
            tokens, M=branches, **_rows(len(bias_K)),
        )  # fmt: skip
        _sums_kernel[(1,)](
            sums_S2K, dalpha, dbias, programs, M=branches, ROWS=len(bias_K),
            ALL_ROWS=triton.next_power_of_2(len(bias_K)), SUMMED=_SUMMED,
        )  # fmt: skip
    return dprojected, dalpha, dbias


def _rows(rows: int) -> dict[str, int]:
    return {"ROWS": rows, "ALL_ROWS": triton.next_power_of_2(rows), "TOKENS": _TOKENS}


@triton.jit
def _places(tokens: tl.tensor, TOKENS: tl.constexpr, ROWS: tl.constexpr, ALL_ROWS: tl.constexpr) -> tl.tuple:
    token = (tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None]
    row = tl.arange(0, ALL_ROWS)[None, :]
    return token, row, (token < tokens) & (row < ROWS)


@triton.jit
def _factors(alpha_ptr: tl.tensor, row: tl.tensor, M: tl.constexpr) -> tl.tensor:
    kind = (row >= M).to(tl.int32) + (row >= 2 * M).to(tl.int32)
    return tl.load(alpha_ptr + kind).to(tl.float32)


@triton.jit
def _mappings_kernel(
    projected_ptr: tl.tensor, projected_token: tl.tensor, projected_row: tl.tensor, alpha_ptr: tl.tensor,
    bias_ptr: tl.tensor, pre_ptr: tl.tensor, post_ptr: tl.tensor, res_ptr: tl.tensor, tokens: tl.tensor,
    M: tl.constexpr, ROWS: tl.constexpr, ALL_ROWS: tl.constexpr, TOKENS: tl.constexpr,
) -> None:  # fmt: skip
    token, row, live = _places(tokens, TOKENS, ROWS, ALL_ROWS)
    projected = tl.load(projected_ptr + token * projected_token + row * projected_row, mask=live, other=0.0)
    bias = tl.load(bias_ptr + row, mask=row < ROWS, other=0.0).to(tl.float32)
    logits = projected * _factors(alpha_ptr, row, M) + bias
    gates = tl.sigmoid(logits)
    tl.store(pre_ptr + token * M + row, gates, mask=live & (row < M))
    tl.store(post_ptr + token * M + row - M, 2 * gates, mask=live & (row >= M) & (row < 2 * M))
    tl.store(res_ptr + token * (M * M) + row - 2 * M, logits, mask=live & (row >= 2 * M))


@triton.jit
def _mappings_backward_kernel(
    dpre_ptr: tl.tensor, dpre_token: tl.tensor, dpre_branch: tl.tensor, dpost_ptr: tl.tensor, dpost_token: tl.tensor,
    dpost_branch: tl.tensor, dres_ptr: tl.tensor, dres_token: tl.tensor, dres_row: tl.tensor, dres_column: tl.tensor,
    pre_ptr: tl.tensor, post_ptr: tl.tensor, projected_ptr: tl.tensor, projected_token: tl.tensor,
    projected_row: tl.tensor, alpha_ptr: tl.tensor, dprojected_ptr: tl.tensor, sums_ptr: tl.tensor, tokens: tl.tensor,
    M: tl.constexpr, ROWS: tl.constexpr, ALL_ROWS: tl.constexpr, TOKENS: tl.constexpr,
) -> None:  # fmt: skip
    token, row, live = _places(tokens, TOKENS, ROWS, ALL_ROWS)
    is_pre, is_post, is_res = live & (row < M), live & (row >= M) & (row < 2 * M), live & (row >= 2 * M)
    dpre = tl.load(dpre_ptr + token * dpre_token + row * dpre_branch, mask=is_pre, other=0.0)
    pre = tl.load(pre_ptr + token * M + row, mask=is_pre, other=0.0)
    dpost = tl.load(dpost_ptr + token * dpost_token + (row - M) * dpost_branch, mask=is_post, other=0.0)
    post = tl.load(post_ptr + token * M + row - M, mask=is_post, other=0.0)
    number = row - 2 * M
    place = token * dres_token + (number // M) * dres_row + (number % M) * dres_column
    dres = tl.load(dres_ptr + place, mask=is_res, other=0.0)
    # Each number has only one of the three; the other two are zero. H_post is twice a sigmoid.
    dlogits = dpre * pre * (1 - pre) + dpost * post * (1 - 0.5 * post) + dres
    tl.store(dprojected_ptr + token * ROWS + row, dlogits * _factors(alpha_ptr, row, M), mask=live)
    projected = tl.load(projected_ptr + token * projected_token + row * projected_row, mask=live, other=0.0)
    column = tl.arange(0, ALL_ROWS)
    sums = sums_ptr + tl.program_id(0) * (2 * ROWS) + column
    tl.store(sums, tl.sum(dlogits * projected, 0), mask=column < ROWS)
    tl.store(sums + ROWS, tl.sum(dlogits, 0), mask=column < ROWS)


@triton.jit
def _sums_kernel(
    sums_ptr: tl.tensor, dalpha_ptr: tl.tensor, dbias_ptr: tl.tensor, programs: tl.tensor,
    M: tl.constexpr, ROWS: tl.constexpr, ALL_ROWS: tl.constexpr, SUMMED: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.arange(0, ALL_ROWS)
    dfactors = tl.zeros([SUMMED, ALL_ROWS], tl.float32)
    dbias = tl.zeros([SUMMED, ALL_ROWS], tl.float32)
    for start in range(0, programs, SUMMED):
        program = (start + tl.arange(0, SUMMED))[:, None]
        place = sums_ptr + program * (2 * ROWS) + row[None, :]
        live = (program < programs) & (row < ROWS)[None, :]
        dfactors += tl.load(place, mask=live, other=0.0)
        dbias += tl.load(place + ROWS, mask=live, other=0.0)
    tl.store(dbias_ptr + row, tl.sum(dbias, 0), mask=row < ROWS)
    dfactor = tl.sum(dfactors, 0)
    tl.store(dalpha_ptr, tl.sum(tl.where(row < M, dfactor, 0.0), 0))
    tl.store(dalpha_ptr + 1, tl.sum(tl.where((row >= M) & (row < 2 * M), dfactor, 0.0), 0))
    tl.store(dalpha_ptr + 2, tl.sum(tl.where(row >= 2 * M, dfactor, 0.0), 0))
