"""Optimizers with one number of state per row, on records in their slots, in one pass over memory, on a CPU.

The bits are those of `kernels.rows.rowwise`, whose docstrings say what is computed, and for bf16 rows of
`kernels.rows.stochastic_rounding` after it.
"""

from typing import NamedTuple

import numpy as np

from kernels.numba_intrinsics import ask_ahead, compiled, fma, inlined
from kernels.rows.records_numba import row_step
from kernels.rows.row_update import RowUpdate
from kernels.rows.stochastic_rounding_numba import load_bf16, store_rounded
from kernels.threads import split_rows


def rowwise_adagrad(update: RowUpdate, *, lr: float, eps: float) -> None:
    """One step of row-wise Adagrad, as `kernels.rows.rowwise.rowwise_adagrad` defines it.

    Raises:
        ValueError: bf16 rows come without ids.
    """
    _run(update, _Rule(True, False, np.float32(lr), np.float32(0), np.float32(0), np.float32(eps)))


def rowwise_rmsprop(update: RowUpdate, *, lr: float, beta2: float, eps: float, decays: bool = True) -> None:
    """One step of row-wise RMSprop, as `kernels.rows.rowwise.rowwise_rmsprop` defines it.

    Args:
        update: the rows and their gradients.
        lr, beta2, eps: as there.
        decays: whether the accumulator first decays for the steps that a row missed; False for the lazy variant.

    Raises:
        ValueError: bf16 rows come without ids.
    """
    _run(update, _Rule(False, decays, np.float32(lr), np.float32(beta2), np.float32(1 - beta2), np.float32(eps)))


class _Rule(NamedTuple):
    adagrad: bool
    decays: bool
    lr: np.float32
    beta2: np.float32
    one_minus_beta2: np.float32
    eps: np.float32


def _run(update: RowUpdate, rule: _Rule) -> None:
    rows = row_step(update)
    split_rows(len(rows.slots), lambda start, end: _update(rows, rule, start, end))


@compiled
def _update(rows, rule, start, end):  # type: ignore[no-untyped-def]
    dim, last = rows.grads.shape[1], rows.records.shape[1] - 1
    loaded, scaled, squares = np.empty(dim, np.float32), np.empty(dim, np.float32), np.empty(dim, np.float32)
    for row in range(start, end):
        ask_ahead(rows.records, rows.slots, row, end)
        slot = rows.slots[row]
        for column in range(dim):
            scaled[column] = rows.grads[row, column] * rows.scale
        state = rows.records[slot, last - 1]
        if rule.decays:
            state = _decayed(state, rows.step - 1 - rows.versions[slot, last], rule.beta2)
        state = _accumulated(state, _mean_square(scaled, squares), rule)
        rows.records[slot, last - 1] = state
        root = np.sqrt(state) + rule.eps
        if rows.bf16:
            load_bf16(rows.halves[slot], loaded)
            _move(loaded, scaled, root, rule.lr, rule.adagrad)
            store_rounded(loaded, rows.halves[slot], rows.ids[row], rows.key, rows.word_keys)
        else:
            _move(rows.records[slot, :dim], scaled, root, rule.lr, rule.adagrad)
        rows.versions[slot, last] = rows.step


@inlined
def _decayed(value, times, factor):  # type: ignore[no-untyped-def]
    """The value multiplied `times` times by `factor`, rounded every time: see `kernels.rows.rowwise.decay`."""
    for _ in range(times):
        before = value
        value *= factor
        if not abs(value) < abs(before):  # nor will it ever change again
            return value
    return value


@inlined
def _accumulated(state, mean_square, rule):  # type: ignore[no-untyped-def]
    if rule.adagrad:
        return state + mean_square
    return fma(mean_square, rule.one_minus_beta2, state * rule.beta2)


@inlined
def _mean_square(grads, squares):  # type: ignore[no-untyped-def]
    """In the order of `kernels.rows.rowwise._mean_square`."""
    width = len(grads)
    for column in range(width):
        squares[column] = grads[column] * grads[column]
    while width > 1:
        half = width // 2
        for column in range(half):
            squares[column] += squares[half + column]
        if width % 2:
            squares[half] = squares[width - 1]
        width = half + width % 2
    return squares[0] / np.float32(len(grads))


@inlined
def _move(weights, grads, root, lr, adagrad):  # type: ignore[no-untyped-def]
    if adagrad:
        for column in range(len(weights)):
            weights[column] -= grads[column] / root * lr
    else:
        for column in range(len(weights)):
            weights[column] += -lr * grads[column] / root
