"""Adam on records in their slots, in one pass over them: the Triton form of `kernels.rows.adam`.

A program has one row in registers: it loads the record, replays the steps that the row missed, applies this step's
gradient, and stores the record. (`read_rows` replays the same steps and stores weights alone.)

The bits are those of `kernels.rows.adam`, NaNs' payloads apart: the same IEEE operations in the same order, roots and
quotients correctly rounded, denormals kept, and fused multiply-adds where the reference has them and nowhere else
(`enable_fp_fusion=False` forbids the compiler to make more). A row is replayed by itself, so it does not matter which
others are in the call. Its loop ends early like the reference's, and by the same argument. Parts of records that are
bfloat16 are unpacked to fp32 when they are loaded, and rounded where they are stored.

Shape suffixes: C slots, W words of a record, U rows of a step, D columns of a row, T steps.
"""

import math
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.rows import records_triton as placed
from kernels.rows.adam_rates import AdamRates
from kernels.rows.records_triton import load_gradients, load_weights, same_bits, store_weights
from kernels.rows.rounding_key import rounding_key
from kernels.rows.stochastic_rounding_triton import as_bf16, as_fp32, stochastic_round

_CHECK_EVERY = tl.constexpr(16)  # steps between two looks whether a row's weights have come to rest
_CHECK_MOMENTS_EVERY = tl.constexpr(64)  # the same for its moments
_LEAST_ROOT = tl.constexpr(2.0**-62)  # below which the second moment is a denormal
_LEAST_MOVE = tl.constexpr(2.0**-26)  # of a weight: less than half of the distance to the next float
# Moments of the columns that a row has not, up to the next power of two. Roots and quotients of zeros, as of denormals,
# go a longer way on a GPU, and what one column of a warp needs all of them wait for.
_IDLE = tl.constexpr(1.0)


def read_rows(
    records_CW: Tensor,
    slots_U: Tensor,
    rates: AdamRates,
    weights_UD: Tensor,
    *,
    bf16: bool = False,
    bf16_state: bool = False,
    replays: bool = True,
) -> None:
    """Writes the rows' weights with the effect of all applied steps. The slots are left as they are.

    Args:
        records_CW: float32, rows contiguous; a window or a whole shard.
        slots_U: int64, on the device of the records.
        rates: of all applied steps.
        weights_UD: float32, overwritten.
        bf16: whether the stored weights are bfloat16.
        bf16_state: whether the stored moments are.
        replays: False for lazy Adam, which replays no steps.

    Raises:
        ValueError: tensors do not fit together.
    """
    if not replays:
        placed.read_rows(records_CW, slots_U, weights_UD, bf16=bf16)
        return
    layout = _checked_layout(records_CW, slots_U, weights_UD, bf16, bf16_state)
    scalars_T2 = rates.scalars()
    if not weights_UD.numel():
        return
    with torch.cuda.device_of(records_CW):
        _read_kernel[(len(slots_U),)](
            records_CW,
            records_CW.stride(0),
            slots_U,
            slots_U.stride(0),
            weights_UD,
            *weights_UD.stride(),
            scalars_T2,
            len(rates),
            **_settings(rates),
            **layout,
            **_launch(layout["BLOCK"]),
        )


def update_rows(
    records_CW: Tensor,
    slots_U: Tensor,
    rates: AdamRates,
    grad_UD: Tensor,
    row_ids_U: Tensor | None = None,
    *,
    bf16: bool = False,
    bf16_state: bool = False,
    replays: bool = True,
    seed: int = 0,
    gradient_scale: float | Tensor = 1.0,
) -> None:
    """Applies the last of the applied steps to the rows, after those they missed, and sets their version to its number.

    Args:
        records_CW: float32, rows contiguous; a window or a whole shard.
        slots_U: int64, unique, on the device of the records.
        rates: of all applied steps, this one included.
        grad_UD: float32, of any strides.
        row_ids_U: int64, job-wide; bf16 rows need them.
        bf16: whether the stored weights are bfloat16, which are rounded stochastically by (seed, row id, step).
        bf16_state: whether the stored moments are, likewise.
        replays: False for lazy Adam, which replays no steps.
        seed: of the rounding.
        gradient_scale: multiplied with the gradient first: a number, or a float32 tensor of one element on the device,
            whose value nobody waits for.

    Raises:
        ValueError: tensors do not fit together, or bf16 rows come without ids.
    """
    layout = _checked_layout(records_CW, slots_U, grad_UD, bf16, bf16_state)
    row_ids_U = placed.rounding_ids(row_ids_U, slots_U, bf16 or bf16_state)
    scalars_T2, step = rates.scalars(), len(rates)
    if not grad_UD.numel():
        return
    with torch.cuda.device_of(records_CW):
        _update_kernel[(len(slots_U),)](
            records_CW,
            records_CW.stride(0),
            slots_U,
            slots_U.stride(0),
            grad_UD,
            *grad_UD.stride(),
            row_ids_U,
            row_ids_U.stride(0),
            scalars_T2,
            step,
            rounding_key(seed, step),
            rounding_key(seed, step, "state"),
            one_minus_beta2=1 - rates.betas[1],
            REPLAYS=replays,
            **placed.scaling(gradient_scale),
            **_settings(rates),
            **layout,
            **_launch(layout["BLOCK"]),
        )


def _checked_layout(
    records_CW: Tensor, slots_U: Tensor, rows_UD: Tensor, bf16: bool, bf16_state: bool
) -> dict[str, Any]:
    dim = rows_UD.shape[1]
    layout = placed.row_layout(dim, bf16) | {"STATE_WORDS": dim if bf16_state else 2 * dim}
    placed.check_rows(records_CW, slots_U, rows_UD, layout["WEIGHT_WORDS"] + layout["STATE_WORDS"] + 1)
    return layout


def _settings(rates: AdamRates) -> dict[str, Any]:
    beta1, beta2 = rates.betas
    lerp = np.float32(1 - beta1)
    # torch interpolates from the end that is nearer, which decides on the rounding.
    far = bool(lerp >= 0.5)
    return {
        "lerp": float(lerp - np.float32(far)),
        "beta2": beta2,
        "eps": rates.eps,
        "peak_rate": rates.peak_rate,
        "log2_beta1": math.log2(beta1) if beta1 else -math.inf,
        "FAR": far,
        "RESTS": beta1**2 <= beta2 * (1 - 1e-5) and rates.eps >= _LEAST_ROOT.value,
    }


def _launch(block: int) -> dict[str, Any]:
    return {"num_warps": max(1, min(8, block // 256)), "num_stages": 1, "enable_fp_fusion": False}


@triton.jit
def _load_moments(
    state: tl.tensor, columns: tl.tensor, inside: tl.tensor, DIM: tl.constexpr, STATE_WORDS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Both moments as fp32: bfloat16 if they take half the words."""
    if STATE_WORDS == DIM:
        halves = state.to(tl.pointer_type(tl.bfloat16))
        means = as_fp32(tl.load(halves + columns, mask=inside, other=_IDLE))
        squares = as_fp32(tl.load(halves + DIM + columns, mask=inside, other=_IDLE))
    else:
        means = tl.load(state + columns, mask=inside, other=_IDLE)
        squares = tl.load(state + DIM + columns, mask=inside, other=_IDLE)
    return means, squares


@triton.jit
def _decay(
    means: tl.tensor, squares: tl.tensor, lerp: tl.tensor, beta2: tl.tensor, FAR: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """A step without gradient, of the moments: means.lerp_(0, 1 - beta1) and squares.mul_(beta2)."""
    start = 0.0 if FAR else means
    return tl.fma(lerp, 0.0 - means, start), squares * beta2


@triton.jit
def _move(
    weights: tl.tensor, means: tl.tensor, squares: tl.tensor, scalars: tl.tensor, step: tl.tensor, eps: tl.tensor
) -> tl.tensor:
    step_size, root = tl.load(scalars + 2 * step), tl.load(scalars + 2 * step + 1)
    denominator = tl.sqrt_rn(squares)
    if root != 1.0:  # some hundred steps on, it is
        denominator = tl.div_rn(denominator, root)
    return weights + tl.div_rn(step_size * means, denominator + eps)


@triton.jit
def _at_rest(
    weights: tl.tensor,
    means: tl.tensor,
    squares: tl.tensor,
    inside: tl.tensor,
    eps: tl.tensor,
    peak_step_size: tl.tensor,
) -> tl.tensor:
    """1 if no later step without gradient changes the weights, else 0: see `kernels.rows.adam._count_resting`."""
    bound = tl.div_rn(tl.abs(means), tl.sqrt_rn(squares) + eps) + _LEAST_ROOT
    rests = (4.0 * peak_step_size * bound <= tl.abs(weights) * _LEAST_MOVE) | (means == 0.0)
    return tl.min((rests | ~inside).to(tl.int32), axis=0)


@triton.jit
def _replay(
    weights: tl.tensor,
    means: tl.tensor,
    squares: tl.tensor,
    inside: tl.tensor,
    scalars: tl.tensor,
    last: tl.tensor,
    now: tl.tensor,
    lerp: tl.tensor,
    beta2: tl.tensor,
    eps: tl.tensor,
    peak_rate: tl.tensor,
    log2_beta1: tl.tensor,
    FAR: tl.constexpr,
    RESTS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The row after the steps from last + 1 to now, none of which has a gradient for it."""
    # A row that never had a gradient has moments of 0, which move nothing.
    step = tl.where(last > 0, last, now) + 1
    resting = 0
    while (step <= now) & (resting == 0):
        end = tl.minimum(now, (step + _CHECK_EVERY - 1) // _CHECK_EVERY * _CHECK_EVERY)
        for missed in range(step, end + 1):
            means, squares = _decay(means, squares, lerp, beta2, FAR)
            weights = _move(weights, means, squares, scalars, missed, eps)
        if RESTS:
            peak_step_size = peak_rate / (1.0 - tl.exp2(end.to(tl.float32) * log2_beta1))
            resting = _at_rest(weights, means, squares, inside, eps, peak_step_size)
        step = end + 1
    still = 0
    while (step <= now) & (still == 0):
        end = tl.minimum(now, step + _CHECK_MOMENTS_EVERY - 1)
        before_means, before_squares = means, squares
        for _ in range(step, end + 1):
            means, squares = _decay(means, squares, lerp, beta2, FAR)
        # A moment's size never grows, so one that is what it was has not changed between, and never will.
        kept = same_bits(means, before_means) & same_bits(squares, before_squares)
        still = tl.min((kept | ~inside).to(tl.int32), axis=0)
        step = end + 1
    return weights, means, squares


# No alignment is told of records and of what lies beside them: then a warp's threads have neighbouring columns, not
# four each, of which unaligned records would be loaded with gaps.
@triton.jit(do_not_specialize=["slots", "now"], do_not_specialize_on_alignment=["records", "out"])
def _read_kernel(
    records: tl.tensor,
    record_stride: tl.tensor,
    slots: tl.tensor,
    slot_stride: tl.tensor,
    out: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    scalars: tl.tensor,
    now: tl.int32,
    lerp: tl.float32,
    beta2: tl.float32,
    eps: tl.float32,
    peak_rate: tl.float32,
    log2_beta1: tl.float32,
    FAR: tl.constexpr,
    RESTS: tl.constexpr,
    DIM: tl.constexpr,
    WEIGHT_WORDS: tl.constexpr,
    STATE_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    BF16: tl.constexpr,
) -> None:
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = columns < DIM
    record = records + tl.load(slots + row * slot_stride) * record_stride
    last = tl.load(record.to(tl.pointer_type(tl.int32)) + WEIGHT_WORDS + STATE_WORDS)
    weights = load_weights(record, columns, inside, BF16)
    if (last > 0) & (last < now):
        means, squares = _load_moments(record + WEIGHT_WORDS, columns, inside, DIM, STATE_WORDS)
        weights, _, _ = _replay(
            weights, means, squares, inside, scalars, last, now, lerp, beta2, eps, peak_rate, log2_beta1, FAR, RESTS
        )
    tl.store(out + row * row_stride + columns.to(tl.int64) * column_stride, weights, mask=inside)


@triton.jit(
    do_not_specialize=["slots", "row_ids", "scale", "step", "key", "state_key"],
    do_not_specialize_on_alignment=["records", "grads"],
)
def _update_kernel(
    records: tl.tensor,
    record_stride: tl.tensor,
    slots: tl.tensor,
    slot_stride: tl.tensor,
    grads: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    row_ids: tl.tensor,
    id_stride: tl.tensor,
    scalars: tl.tensor,
    step: tl.int32,
    key: tl.uint64,
    state_key: tl.uint64,
    scale: tl.tensor,
    lerp: tl.float32,
    beta2: tl.float32,
    one_minus_beta2: tl.float32,
    eps: tl.float32,
    peak_rate: tl.float32,
    log2_beta1: tl.float32,
    FAR: tl.constexpr,
    RESTS: tl.constexpr,
    REPLAYS: tl.constexpr,
    SCALE_ON_DEVICE: tl.constexpr,
    DIM: tl.constexpr,
    WEIGHT_WORDS: tl.constexpr,
    STATE_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    BF16: tl.constexpr,
) -> None:
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = columns < DIM
    record = records + tl.load(slots + row * slot_stride) * record_stride
    version = record.to(tl.pointer_type(tl.int32)) + WEIGHT_WORDS + STATE_WORDS
    places = grads + row * row_stride + columns.to(tl.int64) * column_stride
    grad = load_gradients(places, inside, scale, SCALE_ON_DEVICE)
    weights = load_weights(record, columns, inside, BF16)
    means, squares = _load_moments(record + WEIGHT_WORDS, columns, inside, DIM, STATE_WORDS)
    if REPLAYS:
        weights, means, squares = _replay(
            weights, means, squares, inside, scalars, tl.load(version), step - 1, lerp, beta2, eps, peak_rate,
            log2_beta1, FAR, RESTS
        )  # fmt: skip
    start = grad if FAR else means
    means = tl.fma(lerp, grad - means, start)
    squares = tl.fma(one_minus_beta2 * grad, grad, squares * beta2)
    weights = tl.where(inside, _move(weights, means, squares, scalars, step, eps), 0.0)
    row_id = row_ids + row * id_stride
    if BF16:
        weights = stochastic_round(weights, tl.load(row_id), columns, key)
    store_weights(record, columns, weights, columns >= 0, WEIGHT_WORDS, BF16)
    state = record + WEIGHT_WORDS
    if STATE_WORDS == DIM:
        halves = state.to(tl.pointer_type(tl.bfloat16))
        means = stochastic_round(means, tl.load(row_id), columns, state_key)
        squares = stochastic_round(squares, tl.load(row_id), DIM + columns, state_key)
        tl.store(halves + columns, as_bf16(means), mask=inside)
        tl.store(halves + DIM + columns, as_bf16(squares), mask=inside)
    else:
        tl.store(state + columns, means, mask=inside)
        tl.store(state + DIM + columns, squares, mask=inside)
    tl.store(version, step)
