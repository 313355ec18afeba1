"""Stochastic gradient descent on records in their slots: the Triton form of `kernels.rows.sgd`, with its bits.

Weights are read by `kernels.rows.records_triton.read_rows`: a step without gradient moves none.

Shape suffixes: C slots, W words of a record, U rows of a step, D columns of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.rows import records_triton as placed
from kernels.rows.records_triton import load_gradients, load_weights, store_weights
from kernels.rows.rounding_key import rounding_key
from kernels.rows.stochastic_rounding_triton import stochastic_round


def update_rows(
    records_CW: Tensor,
    slots_U: Tensor,
    grad_UD: Tensor,
    row_ids_U: Tensor | None = None,
    *,
    step: int,
    lr: float,
    bf16: bool = False,
    seed: int = 0,
    gradient_scale: float | Tensor = 1.0,
) -> None:
    """One step on the rows in these slots.

    Args:
        records_CW: float32, rows contiguous; a window or a whole shard.
        slots_U: int64, unique, on the device of the records.
        grad_UD: float32, of any strides.
        row_ids_U: int64, job-wide; bf16 rows need them.
        step: number of this step among the applied ones, from 1: the rows' version afterwards.
        lr: learning rate.
        bf16: whether the stored weights are bfloat16, which are rounded stochastically by (seed, row id, step).
        seed: of the rounding.
        gradient_scale: multiplied with the gradient first: a number, or a float32 tensor of one element on the device,
            whose value nobody waits for.

    Raises:
        ValueError: tensors do not fit together, or bf16 rows come without ids.
    """
    layout = placed.row_layout(grad_UD.shape[1], bf16)
    placed.check_rows(records_CW, slots_U, grad_UD, layout["WEIGHT_WORDS"] + 1)
    row_ids_U = placed.rounding_ids(row_ids_U, slots_U, bf16)
    if not grad_UD.numel():
        return
    rows = placed.tile_rows(layout["BLOCK"])
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
            step=step,
            key=rounding_key(seed, step),
            lr=lr,
            ROWS=rows,
            **placed.scaling(gradient_scale),
            **layout,
            enable_fp_fusion=False,
        )


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
    SCALE_ON_DEVICE: tl.constexpr,
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
    record = records + tl.load(slots + rows * slot_stride, mask=present, other=0) * record_stride
    places = grads + rows[:, None] * row_stride + columns.to(tl.int64) * column_stride
    weights = load_weights(record[:, None], columns, inside, BF16)
    weights -= load_gradients(places, inside, scale, SCALE_ON_DEVICE) * lr
    if BF16:
        ids = tl.load(row_ids + rows * id_stride, mask=present, other=0)
        weights = stochastic_round(weights, ids[:, None], columns, key)
    store_weights(record[:, None], columns, weights, present[:, None], WEIGHT_WORDS, BF16)
    version = (record + WEIGHT_WORDS).to(tl.pointer_type(tl.int32))
    tl.store(version, tl.zeros_like(rows).to(tl.int32) + step, mask=present)
