"""Stochastic gradient descent on records in their slots, in one pass over memory, on a CPU.

The bits are those of `kernels.rows.sgd`, and for bf16 rows of `kernels.rows.stochastic_rounding` after it.

Shape suffixes: C slots, U rows of a step, W words of a record, D columns of a row.
"""

import numpy as np
from torch import Tensor

from kernels.numba_intrinsics import ask_ahead, compiled
from kernels.rows.records_numba import row_step
from kernels.rows.stochastic_rounding_numba import load_bf16, store_rounded
from kernels.threads import split_rows


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
    gradient_scale: float = 1.0,
) -> None:
    """One step on the rows in these slots.

    Args:
        records_CW: float32, rows contiguous; a window or a whole shard.
        slots_U: int64, unique.
        grad_UD: float32.
        row_ids_U: int64, job-wide; bf16 rows need them.
        step: number of this step among the applied ones, from 1: the rows' version afterwards.
        lr: learning rate.
        bf16: whether the stored weights are bfloat16, which are rounded stochastically by (seed, row id, step).
        seed: of the rounding.
        gradient_scale: multiplied with the gradient first.

    Raises:
        ValueError: bf16 rows come without ids.
    """
    rows = row_step(
        records_CW, slots_U, grad_UD, row_ids_U, step=step, bf16=bf16, seed=seed, gradient_scale=gradient_scale
    )
    split_rows(len(slots_U), lambda start, end: _update(rows, np.float32(lr), start, end))


@compiled
def _update(rows, lr, start, end):  # type: ignore[no-untyped-def]
    dim = rows.grads.shape[1]
    loaded = np.empty(dim, np.float32)
    for row in range(start, end):
        ask_ahead(rows.records, rows.slots, row, end)
        slot = rows.slots[row]
        if rows.bf16:
            load_bf16(rows.halves[slot], loaded)
            _step(loaded, rows.grads[row], rows.scale, lr)
            store_rounded(loaded, rows.halves[slot], rows.ids[row], rows.key, rows.word_keys)
        else:
            _step(rows.records[slot, :dim], rows.grads[row], rows.scale, lr)
        rows.versions[slot, rows.versions.shape[1] - 1] = rows.step


@compiled
def _step(weights, grads, scale, lr):  # type: ignore[no-untyped-def]
    for column in range(len(weights)):
        weights[column] -= grads[column] * scale * lr
