"""The rows of a step, as loops that Numba compiles for a CPU take them.

A record is a row of 32-bit words: weights (fp32, or two bf16 a word), optimizer state, and the version, an int32.

Shape suffixes: C slots, U rows of a step, W words of a record, D columns of a row, R words of random fields of a row.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.rows.stochastic_rounding_numba import rounding_keys


class RowStep(NamedTuple):
    """One step on rows in their slots.

    Attributes:
        records: float32 [C, W].
        versions: the same memory as int32 [C, W]; a version is the last word.
        halves: the same memory as uint16 [C, 2 W], for weights that are bfloat16.
        slots: int64 [U], unique.
        grads: float32 [U, D].
        scale: multiplied with the gradient first.
        step: the rows' version afterwards.
        bf16: whether the stored weights are bfloat16.
        ids: uint64 [U], that bf16 rows are rounded by.
        key, word_keys: of their rounding: uint64, and uint64 [R].
    """

    records: NDArray[np.float32]
    versions: NDArray[np.int32]
    halves: NDArray[np.uint16]
    slots: NDArray[np.int64]
    grads: NDArray[np.float32]
    scale: np.float32
    step: int
    bf16: bool
    ids: NDArray[np.uint64]
    key: np.uint64
    word_keys: NDArray[np.uint64]


def row_step(
    records_CW: Tensor,
    slots_U: Tensor,
    grad_UD: Tensor,
    row_ids_U: Tensor | None,
    *,
    step: int,
    bf16: bool,
    seed: int,
    gradient_scale: float,
) -> RowStep:
    """The same step in NumPy's arrays, without copies.

    Args:
        records_CW: float32, rows contiguous; a window or a whole shard.
        slots_U: int64, unique.
        grad_UD: float32.
        row_ids_U: int64, job-wide; bf16 rows need them.
        step: number of this step among the applied ones, from 1.
        bf16: whether the stored weights are bfloat16, which are rounded stochastically by (seed, row id, step).
        seed: of the rounding.
        gradient_scale: multiplied with the gradient first.

    Raises:
        ValueError: bf16 rows come without ids.
    """
    if bf16 and row_ids_U is None:
        raise ValueError("bf16 rows are rounded by their ids, but none are given")
    ids_U = slots_U if row_ids_U is None else row_ids_U
    return RowStep(
        records_CW.numpy(),
        records_CW.view(torch.int32).numpy(),
        records_CW.view(torch.int16).numpy().view(np.uint16),
        slots_U.numpy(),
        grad_UD.numpy(),
        np.float32(gradient_scale),
        step,
        bf16,
        ids_U.numpy().view(np.uint64),
        *rounding_keys(grad_UD.shape[1], seed=seed, step=step),
    )
