"""Optimizers with one number of state a row, on records in their slots: the Triton form of `kernels.rows.rowwise`.

A program has some rows in registers: it loads their records, applies this step's gradients, and stores the records.
Weights are read by `kernels.rows.records_triton.read_rows`: a step without gradient moves none.

The bits are those of `kernels.rows.rowwise`, NaNs' payloads apart: the same IEEE operations in the same order, the
mean of squares included (see `_mean_squares`), and fused multiply-adds where the reference has them and nowhere else.

Shape suffixes: C slots, W words of a record, U rows of a step, D columns of a row.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.rows import records_triton as placed
from kernels.rows.records_triton import load_gradients, load_weights, same_bits, store_weights
from kernels.rows.rounding_key import rounding_key
from kernels.rows.stochastic_rounding_triton import stochastic_round

_CHECK_EVERY = tl.constexpr(64)  # steps between two looks for values that decay no further


def rowwise_adagrad(
    records_CW: Tensor,
    slots_U: Tensor,
    grad_UD: Tensor,
    row_ids_U: Tensor | None = None,
    *,
    step: int,
    lr: float,
    eps: float,
    bf16: bool = False,
    seed: int = 0,
    gradient_scale: float | Tensor = 1.0,
) -> None:
    """One step of row-wise Adagrad on the rows in these slots, as `kernels.rows.rowwise.rowwise_adagrad` defines it.

    Args:
        records_CW: float32, rows contiguous; a window or a whole shard.
        slots_U: int64, unique, on the device of the records.
        grad_UD: float32, of any strides.
        row_ids_U: int64, job-wide; bf16 rows need them.
        step: number of this step among the applied ones, from 1: the rows' version afterwards.
        lr: learning rate.
        eps: added to the root of the accumulator.
        bf16: whether the stored weights are bfloat16, which are rounded stochastically by (seed, row id, step).
        seed: of the rounding.
        gradient_scale: multiplied with the gradient first: a number, or a float32 tensor of one element on the device,
            whose value nobody waits for.

    Raises:
        ValueError: tensors do not fit together, or bf16 rows come without ids.
    """
    options: dict[str, Any] = {"beta2": 0.0, "one_minus_beta2": 0.0, "ADAGRAD": True, "DECAYS": False}
    options |= {"step": step, "lr": lr, "eps": eps, "key": rounding_key(seed, step), **placed.scaling(gradient_scale)}
    _update(records_CW, slots_U, grad_UD, row_ids_U, bf16, options)


def rowwise_rmsprop(
    records_CW: Tensor,
    slots_U: Tensor,
    grad_UD: Tensor,
    row_ids_U: Tensor | None = None,
    *,
    step: int,
    lr: float,
    beta2: float,
    eps: float,
    decays: bool = True,
    bf16: bool = False,
    seed: int = 0,
    gradient_scale: float | Tensor = 1.0,
) -> None:
    """One step of row-wise RMSprop on the rows in these slots, as `kernels.rows.rowwise.rowwise_rmsprop` defines it.

    Args:
        records_CW: float32, rows contiguous; a window or a whole shard.
        slots_U: int64, unique, on the device of the records.
        grad_UD: float32, of any strides.
        row_ids_U: int64, job-wide; bf16 rows need them.
        step: number of this step among the applied ones, from 1: the rows' version afterwards.
        lr: learning rate.
        beta2: decay of the accumulator, per step.
        eps: added to the root of the accumulator.
        decays: whether the accumulator first decays for the steps that a row missed; False for the lazy variant.
        bf16: whether the stored weights are bfloat16, which are rounded stochastically by (seed, row id, step).
        seed: of the rounding.
        gradient_scale: multiplied with the gradient first: a number, or a float32 tensor of one element on the device,
            whose value nobody waits for.

    Raises:
        ValueError: tensors do not fit together, or bf16 rows come without ids.
    """
    options: dict[str, Any] = {"beta2": beta2, "one_minus_beta2": 1 - beta2, "ADAGRAD": False, "DECAYS": decays}
    options |= {"step": step, "lr": lr, "eps": eps, "key": rounding_key(seed, step), **placed.scaling(gradient_scale)}
    _update(records_CW, slots_U, grad_UD, row_ids_U, bf16, options)


def _update(
    records_CW: Tensor,
    slots_U: Tensor,
    grad_UD: Tensor,
    row_ids_U: Tensor | None,
    bf16: bool,
    options: dict[str, Any],
) -> None:
    layout = placed.row_layout(grad_UD.shape[1], bf16)
    placed.check_rows(records_CW, slots_U, grad_UD, layout["WEIGHT_WORDS"] + 2)
    row_ids_U = placed.rounding_ids(row_ids_U, slots_U, bf16)
    if not grad_UD.numel():
        return
    rows, lanes = placed.tile_rows(layout["BLOCK"]), min(32, max(1, layout["BLOCK"] // 8))
    with torch.cuda.device_of(records_CW):
        _update_kernel[(triton.cdiv(len(slots_U), rows),)](
            records_CW,
            records_CW.stride(0),
            slots_U,
            slots_U.stride(0),
            grad_UD,
            *grad_UD.stride(),
            row_ids_U,
            row_ids_U.stride(0),
            len(slots_U),
            ROWS=rows,
            CHUNKS=layout["BLOCK"] // lanes,
            LANES=lanes,
            LEVELS=layout["BLOCK"].bit_length() - 1,
            **options,
            **layout,
            enable_fp_fusion=False,
        )


@triton.jit
def _folded_columns(places: tl.tensor, DIM: tl.constexpr, LEVELS: tl.constexpr) -> tl.tensor:
    """In which column the summand at each place of a complete binary tree stands; -1 for none.

    The reference folds the upper half of the columns onto the lower one until one is left; of an odd number, the last
    has no partner and comes to stand in the middle. As a tree, the first fold is the places' highest bit.
    """
    columns = tl.zeros_like(places)
    missing = places < 0
    for above in tl.static_range(LEVELS):
        # From the root down: from the columns after a fold to those before it.
        width = (DIM + 2 ** (LEVELS - 1 - above) - 1) // 2 ** (LEVELS - 1 - above)
        half = width // 2
        upper = (places >> above) & 1
        alone = columns == half
        missing |= alone & (upper == 1)
        columns = tl.where(alone, width - 1, columns + upper * half)
    return tl.where(missing, -1, columns)


@triton.jit
def _mean_squares(
    grads: tl.tensor, LANES: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, DIM: tl.constexpr
) -> tl.tensor:
    """The mean over columns of the squares, added up in the order of `kernels.rows.rowwise._mean_square`: [ROWS].

    Args:
        grads: [LANES, ROWS, CHUNKS]. Place LANES * chunk + lane of the tree has the column that `_folded_columns` says,
            or 0 where there is none, which changes no sum.
        LANES: lower digits of the places.
        ROWS: rows of the block.
        CHUNKS: higher digits of the places.
        DIM: columns of a row.
    """
    sums = grads * grads
    for level in tl.static_range(CHUNKS.bit_length() - 1):
        sums = tl.sum(tl.reshape(sums, (LANES, ROWS, 2, CHUNKS >> (level + 1))), axis=2)
    sums = tl.reshape(sums, (LANES, ROWS))
    for level in tl.static_range(LANES.bit_length() - 1):
        sums = tl.sum(tl.reshape(sums, (2, LANES >> (level + 1), ROWS)), axis=0)
    return tl.div_rn(tl.reshape(sums, (ROWS,)), DIM + 0.0)


@triton.jit
def _decayed(values: tl.tensor, times: tl.tensor, factor: tl.tensor) -> tl.tensor:
    """Each value multiplied `times` times by `factor`, rounded every time: see `kernels.rows.rowwise.decay`."""
    done, most = 0, tl.max(times, axis=0)
    while done < most:
        before, end = values, tl.minimum(most, done + _CHECK_EVERY)
        for time in range(done, end):
            values = tl.where(time < times, values * factor, values)
        # A value's size never grows: one that is what it was, though it had to decay, never will change again.
        changed = tl.max((same_bits(values, before) == 0).to(tl.int32), axis=0)
        done = tl.where(changed == 1, end, most)
    return values


@triton.jit(do_not_specialize=["slots", "row_ids", "scale", "num_rows", "step", "key"])
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
    num_rows: tl.int32,
    step: tl.int32,
    key: tl.uint64,
    scale: tl.tensor,
    lr: tl.float32,
    beta2: tl.float32,
    one_minus_beta2: tl.float32,
    eps: tl.float32,
    ADAGRAD: tl.constexpr,
    DECAYS: tl.constexpr,
    SCALE_ON_DEVICE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
    LEVELS: tl.constexpr,
    DIM: tl.constexpr,
    WEIGHT_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    BF16: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    # A thread has every LANES-th column of a row, so that most of a row's sum is its own.
    columns = tl.arange(0, CHUNKS)[None, :, None] * LANES + tl.arange(0, LANES)[None, None, :]
    present = rows < num_rows
    record = records + tl.load(slots + rows * slot_stride, mask=present, other=0) * record_stride
    version = (record + WEIGHT_WORDS + 1).to(tl.pointer_type(tl.int32))
    present_rows, record_rows = present[:, None, None], record[:, None, None]
    grad_rows = grads + rows * row_stride
    inside = present_rows & (columns < DIM)
    grad = load_gradients(
        grad_rows[:, None, None] + columns.to(tl.int64) * column_stride, inside, scale, SCALE_ON_DEVICE
    )
    if DIM == BLOCK:
        folded = tl.permute(grad, (2, 0, 1))
    else:  # a second time, from the cache
        places = tl.arange(0, LANES)[:, None, None] + LANES * tl.arange(0, CHUNKS)[None, None, :]
        order = _folded_columns(places, DIM, LEVELS)
        folded = load_gradients(
            grad_rows[None, :, None] + order.to(tl.int64) * column_stride,
            present[None, :, None] & (order >= 0),
            scale,
            SCALE_ON_DEVICE,
        )
    weights = load_weights(record_rows, columns, inside, BF16)
    state = tl.load(record + WEIGHT_WORDS, mask=present, other=0.0)
    mean_squares = _mean_squares(folded, LANES, ROWS, CHUNKS, DIM)
    if ADAGRAD:
        state += mean_squares
        weights -= tl.div_rn(grad, (tl.sqrt_rn(state) + eps)[:, None, None]) * lr
    else:
        if DECAYS:
            times = tl.where(present, step - 1 - tl.load(version, mask=present, other=0), 0)
            state = _decayed(state, times, beta2)
        state = tl.fma(mean_squares, one_minus_beta2, state * beta2)
        weights += tl.div_rn((0.0 - lr) * grad, (tl.sqrt_rn(state) + eps)[:, None, None])
    if BF16:
        ids = tl.load(row_ids + rows * id_stride, mask=present, other=0)
        weights = stochastic_round(weights, ids[:, None, None], columns, key)
    store_weights(record_rows, columns, weights, present_rows, WEIGHT_WORDS, BF16)
    tl.store(record + WEIGHT_WORDS, state, mask=present)
    tl.store(version, tl.zeros_like(rows).to(tl.int32) + step, mask=present)
