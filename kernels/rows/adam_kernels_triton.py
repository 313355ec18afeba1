"""The kernels of `kernels.rows.adam_triton`: a program holds one row in registers."""

import triton
import triton.language as tl

from kernels.rows.adam_gap_triton import close, move, replay
from kernels.rows.records_triton import load_weights, store_weights
from kernels.rows.stochastic_rounding_triton import as_bf16, as_fp32, stochastic_round

# Moments of the padding columns, up to the next power of two. Roots and quotients of zeros, as of denormals, take a
# slow path on a GPU, and all columns of a warp wait for the one that takes it.
_IDLE = tl.constexpr(1.0)


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
def _store_moments(
    state: tl.tensor,
    means: tl.tensor,
    squares: tl.tensor,
    row_id: tl.tensor,
    state_key: tl.uint64,
    columns: tl.tensor,
    inside: tl.tensor,
    DIM: tl.constexpr,
    STATE_WORDS: tl.constexpr,
) -> None:
    """The reverse of `_load_moments`: what is stored as bfloat16 is rounded."""
    if STATE_WORDS == DIM:
        halves = state.to(tl.pointer_type(tl.bfloat16))
        means = stochastic_round(means, tl.load(row_id), columns, state_key)
        squares = stochastic_round(squares, tl.load(row_id), DIM + columns, state_key)
        tl.store(halves + columns, as_bf16(means), mask=inside)
        tl.store(halves + DIM + columns, as_bf16(squares), mask=inside)
    else:
        tl.store(state + columns, means, mask=inside)
        tl.store(state + DIM + columns, squares, mask=inside)


# The compiler is told no alignment of records and of what lies beside them: then a warp's threads have adjacent
# columns, not four each, with which unaligned records would be loaded with gaps.
@triton.jit(do_not_specialize=["slots", "now"], do_not_specialize_on_alignment=["records", "out", "state_out"])
def _read_kernel(
    records: tl.tensor,
    record_stride: tl.tensor,
    slots: tl.tensor,
    slot_stride: tl.tensor,
    out: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    state_out: tl.tensor,
    state_stride: tl.tensor,
    scalars: tl.tensor,
    now: tl.int32,
    sums: tl.tensor,
    offsets: tl.tensor,
    decays: tl.tensor,
    lerp: tl.float32,
    beta2: tl.float32,
    eps: tl.float32,
    peak_rate: tl.float32,
    log2_beta1: tl.float32,
    FAR: tl.constexpr,
    RESTS: tl.constexpr,
    NODES: tl.constexpr,
    DIM: tl.constexpr,
    WEIGHT_WORDS: tl.constexpr,
    STATE_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    BF16: tl.constexpr,
) -> None:
    """See `kernels.rows.adam_triton.read_rows`."""
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = columns < DIM
    record = records + tl.load(slots + row * slot_stride) * record_stride
    last = tl.load(record.to(tl.pointer_type(tl.int32)) + WEIGHT_WORDS + STATE_WORDS)
    weights = load_weights(record, columns, inside, BF16)
    means, squares = _load_moments(record + WEIGHT_WORDS, columns, inside, DIM, STATE_WORDS)
    if NODES == 0:
        weights, means, squares = replay(
            weights, means, squares, inside, scalars, last, now, lerp, beta2, eps, peak_rate, log2_beta1, FAR, RESTS
        )
    elif (last > 0) & (last < now):
        weights, means, squares = close(
            weights, means, squares, sums + last * NODES, offsets, decays + 2 * (now - last), NODES
        )
    tl.store(out + row * row_stride + columns.to(tl.int64) * column_stride, weights, mask=inside)
    state = state_out + row * state_stride
    tl.store(state + columns, means, mask=inside)
    tl.store(state + DIM + columns, squares, mask=inside)


@triton.jit(
    do_not_specialize=["slots", "row_ids", "step", "key", "state_key"],
    do_not_specialize_on_alignment=["records", "grads", "caught_up", "caught_up_state"],
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
    step: tl.int32,
    key: tl.uint64,
    scale: tl.float32,
    state_key: tl.uint64,
    caught_up: tl.tensor,
    caught_up_stride: tl.tensor,
    caught_up_column_stride: tl.tensor,
    caught_up_state: tl.tensor,
    caught_up_state_stride: tl.tensor,
    scalars: tl.tensor,
    lerp: tl.float32,
    beta2: tl.float32,
    one_minus_beta2: tl.float32,
    eps: tl.float32,
    FAR: tl.constexpr,
    CAUGHT_UP: tl.constexpr,
    DIM: tl.constexpr,
    WEIGHT_WORDS: tl.constexpr,
    STATE_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    BF16: tl.constexpr,
) -> None:
    """See `kernels.rows.adam_triton.update_rows`."""
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = columns < DIM
    record = records + tl.load(slots + row * slot_stride) * record_stride
    places = grads + row * row_stride + columns.to(tl.int64) * column_stride
    grad = tl.load(places, mask=inside, other=0.0) * scale
    if CAUGHT_UP:
        there = caught_up + row * caught_up_stride + columns.to(tl.int64) * caught_up_column_stride
        weights = tl.load(there, mask=inside, other=0.0)
        means, squares = _load_moments(caught_up_state + row * caught_up_state_stride, columns, inside, DIM, 2 * DIM)
    else:
        weights = load_weights(record, columns, inside, BF16)
        means, squares = _load_moments(record + WEIGHT_WORDS, columns, inside, DIM, STATE_WORDS)
    start = grad if FAR else means
    means = tl.fma(lerp, grad - means, start)
    squares = tl.fma(one_minus_beta2 * grad, grad, squares * beta2)
    weights = tl.where(inside, move(weights, means, squares, scalars, step, eps), 0.0)
    row_id = row_ids + row * id_stride
    if BF16:
        weights = stochastic_round(weights, tl.load(row_id), columns, key)
    store_weights(record, columns, weights, columns >= 0, WEIGHT_WORDS, BF16)
    _store_moments(record + WEIGHT_WORDS, means, squares, row_id, state_key, columns, inside, DIM, STATE_WORDS)
    tl.store(record.to(tl.pointer_type(tl.int32)) + WEIGHT_WORDS + STATE_WORDS, step)
