"""Stochastic gradient descent on records in their slots, in one pass over memory, on a CPU.

The bits are those of `kernels.rows.sgd`, and for bf16 rows of `kernels.rows.stochastic_rounding` after it.

A record is a row of 32-bit words: weights (fp32, or two bf16 a word) and the version, an int32.

Shape suffixes: C slots, U rows of a step, W words of a record, D columns of a row.
"""

import numpy as np
import torch
from torch import Tensor

from kernels.numba_intrinsics import ask_ahead, compiled
from kernels.rows.stochastic_rounding_numba import load_bf16, rounding_keys, store_rounded
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
    records = records_CW.numpy(), records_CW.view(torch.int32).numpy(), slots_U.numpy(), grad_UD.numpy()
    scalars = np.float32(gradient_scale), np.float32(lr), step
    if not bf16:
        split_rows(len(slots_U), lambda start, end: _update_fp32(*records, *scalars, start, end))
        return
    if row_ids_U is None:
        raise ValueError("bf16 rows are rounded by their ids, but none are given")
    halves = records_CW.view(torch.int16).numpy().view(np.uint16)
    rounding = row_ids_U.numpy().view(np.uint64), *rounding_keys(grad_UD.shape[1], seed=seed, step=step)
    split_rows(len(slots_U), lambda start, end: _update_bf16(*records, halves, *rounding, *scalars, start, end))


@compiled
def _update_fp32(records, versions, slots, grads, scale, lr, step, start, end):  # type: ignore[no-untyped-def]
    for row in range(start, end):
        ask_ahead(records, slots, row, end)
        slot = slots[row]
        _step(records[slot, : grads.shape[1]], grads[row], scale, lr)
        versions[slot, versions.shape[1] - 1] = step


@compiled
def _update_bf16(  # type: ignore[no-untyped-def]
    records, versions, slots, grads, halves, ids, key, word_keys, scale, lr, step, start, end
):
    weights = np.empty(grads.shape[1], np.float32)
    for row in range(start, end):
        ask_ahead(records, slots, row, end)
        slot = slots[row]
        load_bf16(halves[slot], weights)
        _step(weights, grads[row], scale, lr)
        store_rounded(weights, halves[slot], ids[row], key, word_keys)
        versions[slot, versions.shape[1] - 1] = step


@compiled
def _step(weights, grads, scale, lr):  # type: ignore[no-untyped-def]
    for column in range(len(weights)):
        weights[column] -= grads[column] * scale * lr
