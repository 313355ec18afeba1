"""Stochastic gradient descent on records in their slots, in one pass over memory, on a CPU.

The bits are those of `kernels.rows.sgd`, and for bf16 rows of `kernels.rows.stochastic_rounding` after it.
"""

import numpy as np

from kernels.numba_intrinsics import ask_ahead, compiled, inlined
from kernels.rows.records_numba import row_step
from kernels.rows.row_update import RowUpdate
from kernels.rows.stochastic_rounding_numba import load_bf16, store_rounded
from kernels.threads import split_rows


def update_rows(update: RowUpdate, *, lr: float) -> None:
    """One step.

    Raises:
        ValueError: bf16 rows come without ids.
    """
    rows = row_step(update)
    split_rows(len(rows.slots), lambda start, end: _update(rows, np.float32(lr), start, end))


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


@inlined
def _step(weights, grads, scale, lr):  # type: ignore[no-untyped-def]
    for column in range(len(weights)):
        weights[column] -= grads[column] * scale * lr
