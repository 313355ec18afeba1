"""Row records in their slots, as arguments of Triton kernels and inside them; and the plain read of their weights.

A record is a row of 32-bit words: weights, then optimizer state (each fp32, or two bf16 a word), and last the version,
an int32 that counts applied steps; 0 marks a row that was never updated.

Shape suffixes: C slots, W words of a record, U rows of a step, D columns of a row.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.rows.rounding_key import rounding_key
from kernels.rows.row_update import RowUpdate
from kernels.rows.stochastic_rounding_triton import as_bf16, as_fp32

TILE = 2048  # elements that a program of four warps has at a time


def read_rows(records_CW: Tensor, slots_U: Tensor, weights_UD: Tensor, *, bf16: bool = False) -> None:
    """Writes the rows' weights as they are stored, for optimizers that move no weight without a gradient.

    Args:
        records_CW: float32, rows contiguous; a window or a whole shard, with any state.
        slots_U: int64, on the device of the records.
        weights_UD: float32, overwritten.
        bf16: whether the stored weights are bfloat16.

    Raises:
        ValueError: tensors do not fit together.
    """
    check_rows(records_CW, slots_U, weights_UD)
    layout = row_layout(weights_UD.shape[1], bf16)
    if not weights_UD.numel():
        return
    rows = tile_rows(layout["BLOCK"])
    with torch.cuda.device_of(records_CW):
        _read_kernel[(triton.cdiv(len(slots_U), rows),)](
            records_CW,
            records_CW.stride(0),
            slots_U,
            slots_U.stride(0),
            weights_UD,
            *weights_UD.stride(),
            len(slots_U),
            ROWS=rows,
            **layout,
        )


def check_rows(records_CW: Tensor, slots_U: Tensor, rows_UD: Tensor, words: int | None = None) -> None:
    """Refuses what a kernel would misread.

    Args:
        records_CW: the records.
        slots_U: the rows' slots.
        rows_UD: gradients or weights beside them.
        words: that a record must have (W).

    Raises:
        ValueError: tensors do not fit together, in one line.
    """
    if records_CW.dtype != torch.float32 or records_CW.stride(1) != 1:
        raise ValueError(f"records must be float32 with contiguous rows, not {records_CW.dtype}, {records_CW.stride()}")
    if words is not None and records_CW.shape[1] != words:
        raise ValueError(f"records of {words} words are expected, these have {records_CW.shape[1]}")
    if slots_U.dtype != torch.int64 or slots_U.ndim != 1:
        raise ValueError(f"slots must be one row of int64, not {slots_U.dtype} {list(slots_U.shape)}")
    if rows_UD.dtype != torch.float32 or rows_UD.shape[0] != len(slots_U):
        raise ValueError(f"{len(slots_U)} rows of float32 are expected, not {rows_UD.dtype} {list(rows_UD.shape)}")


def row_layout(dim: int, bf16: bool) -> dict[str, Any]:
    """What all kernels here know about a record at compile time."""
    weight_words = (dim + 1) // 2 if bf16 else dim
    # The last half of an odd bf16 row's last word is written too.
    block = triton.next_power_of_2(max(1, 2 * weight_words if bf16 else dim))
    return {"DIM": dim, "WEIGHT_WORDS": weight_words, "BLOCK": block, "BF16": bf16}


def tile_rows(block: int) -> int:
    """Rows of `block` columns that one program takes."""
    return max(1, TILE // block)


def step_arguments(update: RowUpdate, layout: dict[str, Any], state_words: int) -> tuple[Any, ...]:
    """The first arguments of every kernel that updates rows: `records` to `scale`.

    Args:
        update: the rows and their gradients.
        layout: from `row_layout`.
        state_words: words of a record's state.

    Raises:
        ValueError: tensors do not fit together, or bf16 rows come without ids.
    """
    records_CW, slots_U, grad_UD = update.records_CW, update.slots_U, update.grad_UD
    check_rows(records_CW, slots_U, grad_UD, layout["WEIGHT_WORDS"] + state_words + 1)
    ids_U = update.rounding_ids()
    return (
        records_CW,
        records_CW.stride(0),
        slots_U,
        slots_U.stride(0),
        grad_UD,
        *grad_UD.stride(),
        ids_U,
        ids_U.stride(0),
        update.step,
        rounding_key(update.seed, update.step),
        update.gradient_scale,
    )


@triton.jit
def load_weights(records: tl.tensor, columns: tl.tensor, inside: tl.tensor, BF16: tl.constexpr) -> tl.tensor:
    """The weights as fp32; 0 outside.

    Args:
        records: pointers to records, broadcastable to the block.
        columns: of the weights, broadcastable to the block.
        inside: whether they exist.
        BF16: whether the stored weights are bfloat16.
    """
    if BF16:
        weights = as_fp32(tl.load(records.to(tl.pointer_type(tl.bfloat16)) + columns, mask=inside, other=0.0))
    else:
        weights = tl.load(records + columns, mask=inside, other=0.0)
    return weights


@triton.jit
def store_weights(
    records: tl.tensor,
    columns: tl.tensor,
    weights: tl.tensor,
    present: tl.tensor,
    WEIGHT_WORDS: tl.constexpr,
    BF16: tl.constexpr,
) -> None:
    """Stores fp32 weights, for bf16 rows values that bfloat16 has; 0 goes into an odd bf16 row's last half word.

    Args:
        records: pointers to records, broadcastable to the block.
        columns: of the weights, broadcastable to the block.
        weights: the block, 0 outside of rows.
        present: whether the rows exist, broadcastable to the block.
        WEIGHT_WORDS: words that they take.
        BF16: whether the stored weights are bfloat16.
    """
    if BF16:
        places = records.to(tl.pointer_type(tl.bfloat16)) + columns
        tl.store(places, as_bf16(weights), mask=present & (columns < 2 * WEIGHT_WORDS))
    else:
        tl.store(records + columns, weights, mask=present & (columns < WEIGHT_WORDS))


@triton.jit
def same_bits(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """Whether fp32 values are the same to the bit, NaNs and signs of zeros included."""
    return a.to(tl.int32, bitcast=True) == b.to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize=["slots", "num_rows"])
def _read_kernel(
    records: tl.tensor,
    record_stride: tl.tensor,
    slots: tl.tensor,
    slot_stride: tl.tensor,
    weights: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    num_rows: tl.int32,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    WEIGHT_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    BF16: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)[None, :]
    present = rows < num_rows
    inside = present[:, None] & (columns < DIM)
    places = records + tl.load(slots + rows * slot_stride, mask=present, other=0) * record_stride
    block = load_weights(places[:, None], columns, inside, BF16)
    tl.store(weights + rows[:, None] * row_stride + columns.to(tl.int64) * column_stride, block, mask=inside)
