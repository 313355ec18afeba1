"""The rows of a step in the form that loops compiled by Numba for a CPU take.

A record is a row of 32-bit words: weights, then optimizer state (each fp32, or two bf16 a word), and the version, an
int32.

Shape suffixes: C slots, U rows of a step, W words of a record, D columns of a row, R words of random fields of a row.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.numba_intrinsics import inlined
from kernels.rows.row_update import RowUpdate
from kernels.rows.stochastic_rounding_numba import load_bf16, rounding_keys, store_rounded


class RowStep(NamedTuple):
    """One step on rows in their slots.

    Attributes:
        records: float32 [C, W].
        versions: the same memory as int32 [C, W]; a version is the last word.
        halves: the same memory as uint16 [C, 2 W], for parts that are bfloat16.
        slots: int64 [U], unique.
        grads: float32 [U, D].
        scale: the gradient is first multiplied by it.
        step: the rows' version afterwards.
        bf16: whether the stored weights are bfloat16.
        bf16_state: whether the stored state is bfloat16.
        ids: uint64 [U], by which bf16 rows are rounded.
        key, word_keys: of the rounding of their weights: uint64, and uint64 [R].
        state_key, state_word_keys: of that of their state, likewise.
    """

    records: NDArray[np.float32]
    versions: NDArray[np.int32]
    halves: NDArray[np.uint16]
    slots: NDArray[np.int64]
    grads: NDArray[np.float32]
    scale: np.float32
    step: int
    bf16: bool
    bf16_state: bool
    ids: NDArray[np.uint64]
    key: np.uint64
    word_keys: NDArray[np.uint64]
    state_key: np.uint64
    state_word_keys: NDArray[np.uint64]


def row_step(update: RowUpdate, state_size: int = 0) -> RowStep:
    """The same step as NumPy arrays, without copies. `state_size`: numbers of state that are rounded.

    Raises:
        ValueError: bf16 rows come without ids.
    """
    records_CW, dim = update.records_CW, update.grad_UD.shape[1]
    return RowStep(
        records_CW.numpy(),
        records_CW.view(torch.int32).numpy(),
        records_CW.view(torch.int16).numpy().view(np.uint16),
        update.slots_U.numpy(),
        update.grad_UD.numpy(),
        np.float32(update.gradient_scale),
        update.step,
        update.bf16,
        update.bf16_state,
        update.rounding_ids().numpy().view(np.uint64),
        *rounding_keys(dim, seed=update.seed, step=update.step),
        *rounding_keys(state_size, seed=update.seed, step=update.step, part="state"),
    )


@inlined
def unpack(records, halves, slot, bf16, bf16_state, weights, state):  # type: ignore[no-untyped-def]
    """Writes a record's weights [D] and state as float32."""
    dim, size = len(weights), len(state)
    first = (dim + 1) // 2 if bf16 else dim
    if bf16:
        load_bf16(halves[slot], weights)
    else:
        for column in range(dim):
            weights[column] = records[slot, column]
    if bf16_state:
        load_bf16(halves[slot, 2 * first :], state)
    else:
        for number in range(size):
            state[number] = records[slot, first + number]


@inlined
def pack(weights, state, rows, row):  # type: ignore[no-untyped-def]
    """Stores the float32 weights [D] and state of a row of a `RowStep` in its slot, and rounds what is bfloat16."""
    dim, slot = len(weights), rows.slots[row]
    first = (dim + 1) // 2 if rows.bf16 else dim
    if rows.bf16:
        store_rounded(weights, rows.halves[slot], rows.ids[row], rows.key, rows.word_keys)
    else:
        for column in range(dim):
            rows.records[slot, column] = weights[column]
    if rows.bf16_state:
        halves = rows.halves[slot, 2 * first :]
        store_rounded(state, halves, rows.ids[row], rows.state_key, rows.state_word_keys)
    else:
        for number in range(len(state)):
            rows.records[slot, first + number] = state[number]
