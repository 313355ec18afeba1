"""Optimizers with one number of state per row, on records in their slots: the Triton form of `kernels.rows.rowwise`.

Weights are read by `kernels.rows.records_triton.read_rows`: a step without gradient moves none.

The bits are those of `kernels.rows.rowwise`, NaNs' payloads apart: the same IEEE operations in the same order, the
mean of squares included, and fused multiply-adds where the reference has them and nowhere else.
"""

from typing import Any

import torch
import triton

from kernels.rows.records_triton import row_layout, step_arguments, tile_rows
from kernels.rows.row_update import RowUpdate
from kernels.rows.rowwise_kernel_triton import _update_kernel


def rowwise_adagrad(update: RowUpdate, *, lr: float, eps: float) -> None:
    """One step of row-wise Adagrad, as `kernels.rows.rowwise.rowwise_adagrad` defines it.

    Raises:
        ValueError: tensors do not fit together, or bf16 rows come without ids.
    """
    _run(update, lr=lr, beta2=0.0, one_minus_beta2=0.0, eps=eps, ADAGRAD=True, DECAYS=False)


def rowwise_rmsprop(update: RowUpdate, *, lr: float, beta2: float, eps: float, decays: bool = True) -> None:
    """One step of row-wise RMSprop, as `kernels.rows.rowwise.rowwise_rmsprop` defines it.

    Args:
        update: the rows and their gradients.
        lr, beta2, eps: as there.
        decays: whether the accumulator first decays for the steps that a row missed; False for the lazy variant.

    Raises:
        ValueError: tensors do not fit together, or bf16 rows come without ids.
    """
    _run(update, lr=lr, beta2=beta2, one_minus_beta2=1 - beta2, eps=eps, ADAGRAD=False, DECAYS=decays)


def _run(update: RowUpdate, **rule: Any) -> None:
    layout = row_layout(update.grad_UD.shape[1], update.bf16)
    arguments = step_arguments(update, layout, state_words=1)
    if not update.grad_UD.numel():
        return
    block, num_rows = layout["BLOCK"], len(update.slots_U)
    rows, lanes = tile_rows(block), min(32, max(1, block // 8))
    tile = {"ROWS": rows, "CHUNKS": block // lanes, "LANES": lanes, "LEVELS": block.bit_length() - 1}
    with torch.cuda.device_of(update.records_CW):
        _update_kernel[(triton.cdiv(num_rows, rows),)](
            *arguments, num_rows, **rule, **tile, **layout, enable_fp_fusion=False
        )
