"""The kernel of `kernels.rows.rowwise_triton`: a program holds some rows in registers, and sums like the reference."""

import triton
import triton.language as tl

from kernels.rows.records_triton import load_weights, same_bits, store_weights
from kernels.rows.stochastic_rounding_triton import stochastic_round

_CHECK_EVERY = tl.constexpr(64)  # steps between two searches for values that decay no further


@triton.jit
def _folded_columns(places: tl.tensor, DIM: tl.constexpr, LEVELS: tl.constexpr) -> tl.tensor:
    """The column of the summand at each place of a complete binary tree; -1 for none.

    The reference folds the upper half of the columns onto the lower one until one is left; of an odd number, the last
    has no partner and moves to the middle. In the tree, the first fold is the places' highest bit.
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
def _folded_gradients(
    grad_rows: tl.tensor,
    column_stride: tl.tensor,
    present: tl.tensor,
    scale: tl.float32,
    LANES: tl.constexpr,
    CHUNKS: tl.constexpr,
    LEVELS: tl.constexpr,
    DIM: tl.constexpr,
) -> tl.tensor:
    """The scaled gradients at their places in the tree: [LANES, ROWS, CHUNKS]."""
    places = tl.arange(0, LANES)[:, None, None] + LANES * tl.arange(0, CHUNKS)[None, None, :]
    order = _folded_columns(places, DIM, LEVELS)
    pointers = grad_rows[None, :, None] + order.to(tl.int64) * column_stride
    return tl.load(pointers, mask=present[None, :, None] & (order >= 0), other=0.0) * scale


@triton.jit
def _mean_squares(
    grads: tl.tensor, LANES: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, DIM: tl.constexpr
) -> tl.tensor:
    """The mean over columns of the squares, summed in the order of `kernels.rows.rowwise._mean_square`: [ROWS].

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
        # A value's magnitude never grows: one that is what it was, though it had to decay, will never change again.
        changed = tl.max((same_bits(values, before) == 0).to(tl.int32), axis=0)
        done = tl.where(changed == 1, end, most)
    return values


@triton.jit(do_not_specialize=["slots", "row_ids", "num_rows", "step", "key"])
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
    step: tl.int32,
    key: tl.uint64,
    scale: tl.float32,
    num_rows: tl.int32,
    lr: tl.float32,
    beta2: tl.float32,
    one_minus_beta2: tl.float32,
    eps: tl.float32,
    ADAGRAD: tl.constexpr,
    DECAYS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
    LEVELS: tl.constexpr,
    DIM: tl.constexpr,
    WEIGHT_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    BF16: tl.constexpr,
) -> None:
    """See `kernels.rows.rowwise_triton`."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    # A thread has every LANES-th column of a row, so that most of a row's sum is its own.
    columns = tl.arange(0, CHUNKS)[None, :, None] * LANES + tl.arange(0, LANES)[None, None, :]
    present = rows < num_rows
    inside = present[:, None, None] & (columns < DIM)
    record = records + tl.load(slots + rows * slot_stride, mask=present, other=0) * record_stride
    version = (record + WEIGHT_WORDS + 1).to(tl.pointer_type(tl.int32))
    grad_rows = grads + rows * row_stride
    places = grad_rows[:, None, None] + columns.to(tl.int64) * column_stride
    grad = tl.load(places, mask=inside, other=0.0) * scale
    if DIM == BLOCK:
        folded = tl.permute(grad, (2, 0, 1))
    else:  # a second time, from the cache
        folded = _folded_gradients(grad_rows, column_stride, present, scale, LANES, CHUNKS, LEVELS, DIM)
    mean_squares = _mean_squares(folded, LANES, ROWS, CHUNKS, DIM)
    weights = load_weights(record[:, None, None], columns, inside, BF16)
    state = tl.load(record + WEIGHT_WORDS, mask=present, other=0.0)
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
    store_weights(record[:, None, None], columns, weights, present[:, None, None], WEIGHT_WORDS, BF16)
    tl.store(record + WEIGHT_WORDS, state, mask=present)
    tl.store(version, tl.zeros_like(rows).to(tl.int32) + step, mask=present)
