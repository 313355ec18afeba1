"""Mixtures of a stream's parts in Triton: one kernel forward, one backward. Formulas: `kernels.branches`.

Both are memory-bound: every part and every result is moved once, in its own dtype, 16 bytes per thread and load in
bf16; the mixing happens in registers, in fp32. A forward program has some columns of one token; a backward program is a
single warp with all columns of a token, so that it alone sums the gradients of the token's weights: first over each
thread's adjacent columns, then once, at the end, over the lanes. No atomics, the same bits on every run.

Shape suffixes as in `kernels.branches`, and N tokens (batch x sequence).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.branches.parts_triton import (
    VECTOR,
    WARP,
    columns_of,
    gradients_of,
    load_parts,
    load_weights,
    mixture,
    parts_of,
    rows_of,
    weights_of,
)


def mix_forward(weights_BTJI: Tensor, base_BTMD: Tensor, outputs_BTD: list[Tensor]) -> Tensor:
    """The mixtures [B, T, J, D], contiguous, in the dtype of the base. Arguments of any strides."""
    batch, length, mixtures, _ = weights_BTJI.shape
    width = base_BTMD.shape[-1]
    mixed = base_BTMD.new_empty((batch, length, mixtures, width))
    if mixed.numel() == 0:
        return mixed
    parts, options = parts_of(base_BTMD, outputs_BTD)
    columns, warps = columns_of(width)
    blocks = triton.cdiv(width, columns)
    with torch.cuda.device_of(mixed):
        _mix_kernel[(batch * length * blocks,)](
            *weights_of(weights_BTJI), *parts, mixed,
            J=mixtures, COLUMNS=columns, num_warps=warps, **options,
        )  # fmt: skip
    return mixed


def mix_backward(
    grad_BTJD: Tensor,
    weights_BTJI: Tensor | None,
    base_BTMD: Tensor,
    outputs_BTD: list[Tensor],
    pull_N: Tensor | None = None,
    stream_NC: Tensor | None = None,
) -> list[Tensor]:
    """Gradients of the weights (fp32), of the base and of every output, contiguous. Arguments of any strides.

    With `pull_N`, J = M: pull times the stream is first subtracted from the gradient, and the stream itself is written
    to `stream_NC`, [N, M * D] and contiguous. Without weights the stream is its base, which is not written again.
    """
    grads = gradients_of(weights_BTJI, base_BTMD, outputs_BTD)
    if base_BTMD.numel() == 0 or grad_BTJD.numel() == 0:
        return [grad.zero_() for grad in grads]
    grad_NJD = rows_of(grad_BTJD)
    dweights, dbase, *doutputs = grads if weights_BTJI is not None else [None, *grads]
    parts, options = parts_of(base_BTMD, outputs_BTD)
    lanes = min(WARP, triton.next_power_of_2(triton.cdiv(base_BTMD.shape[-1], VECTOR.value)))
    with torch.cuda.device_of(dbase):
        _mix_backward_kernel[(len(grad_NJD),)](
            grad_NJD, *grad_NJD.stride()[:2], pull_N, *weights_of(weights_BTJI), *parts,
            dweights, dbase, tuple(doutputs), stream_NC, J=grad_NJD.shape[1], LANES=lanes, num_warps=1, **options,
        )  # fmt: skip
    return grads


@triton.jit
def _mix_kernel(
    weights_ptr: tl.tensor, weights_token: tl.tensor, weights_row: tl.tensor, weights_part: tl.tensor,
    base_ptr: tl.tensor, base_token: tl.tensor, base_branch: tl.tensor, outputs: tl.tuple, output_tokens: tl.tuple,
    mixed_ptr: tl.tensor,
    J: tl.constexpr, M: tl.constexpr, K: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    BLOCKS: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    token = (tl.program_id(0) // BLOCKS).to(tl.int64)
    at = (tl.program_id(0) % BLOCKS) * COLUMNS + tl.arange(0, COLUMNS)
    live = at < D
    parts = load_parts(base_ptr, base_token, base_branch, outputs, output_tokens, token, at, live, M, K)
    weights = load_weights(weights_ptr, weights_token, weights_row, weights_part, token, J, M + K)
    for j in tl.static_range(J):
        tl.store(mixed_ptr + (token * J + j) * D + at, mixture(parts, weights, True, j, M + K), mask=live)


@triton.jit
def _load_grads(
    grad_ptr: tl.tensor, grad_token: tl.tensor, grad_row: tl.tensor, pull_ptr: tl.tensor, stream_ptr: tl.tensor,
    parts: tl.tuple, weights: tl.tuple, token: tl.tensor, at: tl.tensor, live: tl.tensor,
    MIXED: tl.constexpr, J: tl.constexpr, I: tl.constexpr, D: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """The mixtures' gradients; with a pull, minus pull times the stream, which is also written."""
    # All loads come before the first store: no load is moved across a store.
    loaded: tl.tuple = ()
    for j in tl.static_range(J):
        loaded += (tl.load(grad_ptr + token * grad_token + j * grad_row + at, mask=live, other=0.0),)
    grads = loaded
    if pull_ptr is not None:
        pull = tl.load(pull_ptr + token)
        grads = ()
        for j in tl.static_range(J):
            branch = mixture(parts, weights, MIXED, j, I).to(parts[0].dtype)
            grads += (loaded[j].to(tl.float32) - pull * branch.to(tl.float32),)
            if stream_ptr is not None:
                tl.store(stream_ptr + (token * J + j) * D + at, branch, mask=live)
    return grads


@triton.jit
def _add_products(sums: tl.tuple, grads: tl.tuple, parts: tl.tuple, J: tl.constexpr, I: tl.constexpr) -> tl.tuple:
    """Adds the products of every gradient and part to one sum per lane."""
    added: tl.tuple = ()
    for j in tl.static_range(J):
        for i in tl.static_range(I):
            added += (sums[j * I + i] + tl.sum(grads[j].to(tl.float32) * parts[i].to(tl.float32), 1),)
    return added


@triton.jit
def _part_gradient(
    grads: tl.tuple, weights: tl.tuple, MIXED: tl.constexpr, PART: tl.constexpr, J: tl.constexpr, I: tl.constexpr
) -> tl.tensor:
    if MIXED:
        gradient = weights[PART] * grads[0].to(tl.float32)
        for j in tl.static_range(1, J):
            gradient += weights[j * I + PART] * grads[j].to(tl.float32)
    else:
        gradient = grads[PART].to(tl.float32)
    return gradient


@triton.jit
def _mix_backward_kernel(
    grad_ptr: tl.tensor, grad_token: tl.tensor, grad_row: tl.tensor, pull_ptr: tl.tensor,
    weights_ptr: tl.tensor, weights_token: tl.tensor, weights_row: tl.tensor, weights_part: tl.tensor,
    base_ptr: tl.tensor, base_token: tl.tensor, base_branch: tl.tensor, outputs: tl.tuple, output_tokens: tl.tuple,
    dweights_ptr: tl.tensor, dbase_ptr: tl.tensor, doutputs: tl.tuple, stream_ptr: tl.tensor,
    J: tl.constexpr, M: tl.constexpr, K: tl.constexpr, D: tl.constexpr, LANES: tl.constexpr,
) -> None:  # fmt: skip
    I: tl.constexpr = M + K
    MIXED: tl.constexpr = weights_ptr is not None
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    weights: tl.tuple = ()
    dweights: tl.tuple = ()
    if MIXED:
        weights = load_weights(weights_ptr, weights_token, weights_row, weights_part, token, J, I)
        for _ in tl.static_range(I * J):
            dweights += (tl.zeros([LANES], tl.float32),)
    for start in range(0, D, LANES * VECTOR):
        at = start + column
        live = at < D
        parts = load_parts(base_ptr, base_token, base_branch, outputs, output_tokens, token, at, live, M, K)
        grads = _load_grads(
            grad_ptr, grad_token, grad_row, pull_ptr, stream_ptr, parts, weights, token, at, live, MIXED, J, I, D
        )
        if MIXED:
            dweights = _add_products(dweights, grads, parts, J, I)
        for i in tl.static_range(I):
            dpart = _part_gradient(grads, weights, MIXED, i, J, I)
            if i < M:
                tl.store(dbase_ptr + (token * M + i) * D + at, dpart, mask=live)
            else:
                tl.store(doutputs[i - M] + token * D + at, dpart, mask=live)
    if MIXED:
        for number in tl.static_range(I * J):
            tl.store(dweights_ptr + token * (I * J) + number, tl.sum(dweights[number], 0))
