"""Adam on records in their slots, in one pass over memory, on a CPU.

The bits are those of `kernels.rows.adam`, whose docstrings say what is computed and why the shortcuts keep them; here a
row's operations follow one another while it is in the processor's L1 cache, not pass by pass over many rows. bf16 parts
of records are rounded as `kernels.rows.stochastic_rounding` says, once an update.

A record is as `kernels.rows.records_numba` says; the state of a row is its first and then its second moments (D each).

Shape suffixes: C slots, U rows of a step, W words of a record, D columns of a row, S numbers of state.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.numba_intrinsics import AHEAD, ask, ask_ahead, ask_word, compiled, fma, inlined
from kernels.rows.adam_closed import GapSums
from kernels.rows.adam_gap_numba import close, constants, replay
from kernels.rows.adam_rates import AdamRates
from kernels.rows.caught_up import CaughtUp
from kernels.rows.records_numba import pack, row_step, unpack
from kernels.rows.row_update import RowUpdate
from kernels.threads import split_rows

_VERSIONS_AHEAD = 16  # rows


def find_rows(
    records_CW: Tensor,
    slots_U: Tensor,
    rates: AdamRates,
    got: CaughtUp,
    *,
    bf16: bool = False,
    bf16_state: bool = False,
) -> None:
    """Makes up for the steps that rows missed, beside their slots, and says where each row's values are.

    Args:
        records_CW: float32, rows contiguous; a window or a whole shard.
        slots_U: int64.
        rates: of all applied steps.
        got: overwritten, but for rows that missed none.
        bf16: whether the stored weights are bfloat16.
        bf16_state: whether the stored moments are.
    """
    assert got.state_US is not None
    assert got.places_U is not None
    arguments = (
        records_CW.numpy(),
        records_CW.view(torch.int32).numpy(),
        records_CW.view(torch.int16).numpy().view(np.uint16),
        slots_U.numpy(),
        bf16,
        bf16_state,
        got.weights_UD.numpy(),
        got.state_US.numpy(),
        got.places_U.numpy(),
        constants(rates),
        *rates.scalars().numpy().T,
        len(rates),
        rates.gaps is not None,
        *_gap_arrays(rates.gaps),
    )
    split_rows(len(slots_U), lambda start, end: _find(*arguments, start, end))


def update_rows(update: RowUpdate, rates: AdamRates, got: CaughtUp) -> None:
    """Applies the last of the applied steps to the rows.

    Args:
        update: the rows and their gradients; its step is `len(rates)`.
        rates: of all applied steps, this one included.
        got: what `find_rows` wrote before this step, with no update since.

    Raises:
        ValueError: bf16 rows come without ids.
    """
    weights_UD, state_US, _ = got
    catches_up = state_US is not None
    state_US = update.grad_UD[:0] if state_US is None else state_US
    rows = row_step(update, state_size=2 * update.grad_UD.shape[1])
    scalars = rates.scalars().numpy()[update.step]
    arguments = rows, weights_UD.numpy(), state_US.numpy(), constants(rates), *scalars, catches_up
    split_rows(len(rows.slots), lambda start, end: _update(*arguments, start, end))


def _gap_arrays(gaps: GapSums | None) -> tuple[NDArray[np.float64], NDArray[np.float32], NDArray[np.float32]]:
    if gaps is None:
        return np.empty((0, 0)), np.empty(0, np.float32), np.empty((0, 0), np.float32)
    return gaps.sums().numpy(), gaps.offsets_P.numpy(), gaps.decays().numpy()


@compiled
def _find(  # type: ignore[no-untyped-def]
    records, versions, halves, slots, bf16, bf16_state, weights, state, places, constants, step_sizes, roots, now,
    closed, sums, offsets, decays, start, end,
):  # fmt: skip
    dim, version = weights.shape[1], versions.shape[1] - 1
    roots_of_row, moves = np.empty(dim, np.float32), np.empty(dim, np.float32)
    for row in range(start, end):
        # Of a row that missed nothing, the version alone is read.
        if row + _VERSIONS_AHEAD < end:
            ask_word(versions, slots[row + _VERSIONS_AHEAD], version)
        if row + AHEAD < end and 0 < versions[slots[row + AHEAD], version] < now:
            ask(records, slots[row + AHEAD], version)
        slot = slots[row]
        last = versions[slot, version]
        # A row that never had a gradient has moments of 0, which move nothing.
        if last == 0 or last >= now:
            places[row] = slot
            continue
        places[row] = -1 - row
        unpack(records, halves, slot, bf16, bf16_state, weights[row], state[row])
        means, squares = state[row, :dim], state[row, dim:]
        if closed:
            close(weights[row], means, squares, sums[last], offsets, decays[now - last], roots_of_row, moves)
        else:
            replay(weights[row], means, squares, constants, step_sizes, roots, last, now)


@compiled
def _update(rows, weights, state, constants, step_size, root, catches_up, start, end):  # type: ignore[no-untyped-def]
    dim, last = rows.grads.shape[1], rows.records.shape[1] - 1
    unpacked = np.empty(3 * dim, np.float32)
    for row in range(start, end):
        ask_ahead(rows.records, rows.slots, row, end)
        slot = rows.slots[row]
        behind = catches_up and 0 < rows.versions[slot, last] < rows.step - 1
        if rows.bf16 or rows.bf16_state:
            if behind:
                _copy(weights[row], unpacked[:dim])
                _copy(state[row], unpacked[dim:])
            else:
                unpack(rows.records, rows.halves, slot, rows.bf16, rows.bf16_state, unpacked[:dim], unpacked[dim:])
            _step_row(unpacked, rows.grads[row], constants, rows.scale, step_size, root)
            pack(unpacked[:dim], unpacked[dim:], rows, row)
        else:
            record = rows.records[slot, :last]
            if behind:
                _copy(weights[row], record[:dim])
                _copy(state[row], record[dim:])
            _step_row(record, rows.grads[row], constants, rows.scale, step_size, root)
        rows.versions[slot, last] = rows.step


@inlined
def _copy(source, target):  # type: ignore[no-untyped-def]
    for number in range(len(target)):
        target[number] = source[number]


@inlined
def _step_row(values, grads, constants, scale, step_size, root):  # type: ignore[no-untyped-def]
    dim = len(grads)
    _step(values[:dim], values[dim : 2 * dim], values[2 * dim :], grads, constants, scale, step_size, root)


@inlined
def _step(weights, means, squares, grads, constants, scale, step_size, root):  # type: ignore[no-untyped-def]
    # A function of few arrays: with more, the compiler gives up proving that they do not overlap, and does not
    # vectorise.
    for column in range(weights.shape[0]):
        grad = grads[column] * scale
        start = grad if constants.from_gradient else means[column]
        means[column] = fma(constants.lerp, grad - means[column], start)
        squares[column] = fma(constants.one_minus_beta2 * grad, grad, squares[column] * constants.beta2)
        weights[column] += step_size * means[column] / (np.sqrt(squares[column]) / root + constants.eps)
