"""Stochastic gradient descent on records in their slots: the Triton form of `kernels.rows.sgd`, with its bits.

Weights are read by `kernels.rows.records_triton.read_rows`: a step without gradient moves none.
"""

import torch
import triton
import triton.language as tl

from kernels.rows.records_triton import load_weights, row_layout, step_arguments, store_weights, tile_rows
from kernels.rows.row_update import RowUpdate
from kernels.rows.stochastic_rounding_triton import stochastic_round


def update_rows(update: RowUpdate, *, lr: float) -> None:
    """One step.

    Raises:
        ValueError: tensors do not fit together, or bf16 rows come without ids.
    """
    layout = row_layout(update.grad_UD.shape[1], update.bf16)
    arguments = step_arguments(update, layout, state_words=0)
    if not update.grad_UD.numel():
        return
    num_rows, rows = len(update.slots_U), tile_rows(layout["BLOCK"])
    with torch.cuda.device_of(update.records_CW):
        _update_kernel[(triton.cdiv(num_rows, rows),)](
            *arguments, num_rows, lr=lr, ROWS=rows, **layout, enable_fp_fusion=False
        )


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
    weights -= tl.load(places, mask=inside, other=0.0) * scale * lr
    if BF16:
        ids = tl.load(row_ids + rows * id_stride, mask=present, other=0)
        weights = stochastic_round(weights, ids[:, None], columns, key)
    store_weights(record[:, None], columns, weights, present[:, None], WEIGHT_WORDS, BF16)
    version = (record + WEIGHT_WORDS).to(tl.pointer_type(tl.int32))
    tl.store(version, tl.zeros_like(rows).to(tl.int32) + step, mask=present)
