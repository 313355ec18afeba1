"""Adam on records in their slots, in one pass over memory, on a CPU.

The bits are those of `kernels.rows.adam`, whose docstrings say what is computed and why the shortcuts keep them; here a
row's operations follow one another while it sits in the processor's nearest cache, not pass by pass over many rows.
bf16 parts of records are rounded as `kernels.rows.stochastic_rounding` says, once an update.

A record is as `kernels.rows.records_numba` says; the state of a row is its first and then its second moments (D each).

Shape suffixes: C slots, U rows of a step, W words of a record, D columns of a row, X numbers of a row in fp32 (3 D), T
steps.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.numba_intrinsics import ask_ahead, compiled, fma
from kernels.rows.adam_rates import AdamRates
from kernels.rows.records import read_rows as read_stored_rows
from kernels.rows.records_numba import pack, row_step, unpack
from kernels.rows.stochastic_rounding_numba import load_bf16
from kernels.threads import split_rows

_CHECK_EVERY = 16  # steps between two looks whether a row's weights have come to rest
_CHECK_MOMENTS_EVERY = 256  # the same for its moments, which need many more
_LEAST_ROOT = np.float32(2.0**-62)  # below which the second moment is a denormal
_LEAST_MOVE = np.float32(2.0**-26)  # of a weight: less than half of the distance to the next float


def read_rows(
    records_CW: Tensor,
    slots_U: Tensor,
    rates: AdamRates,
    weights_UD: Tensor,
    caught_up_UX: Tensor | None,
    *,
    bf16: bool = False,
    bf16_state: bool = False,
) -> None:
    """Writes the rows' weights with the effect of all applied steps. The slots are left as they are.

    Args:
        records_CW: float32, rows contiguous; a window or a whole shard.
        slots_U: int64.
        rates: of all applied steps.
        weights_UD: float32, overwritten.
        caught_up_UX: float32, overwritten: weights and moments of the rows that missed steps, after the replay of these
            (`update_rows` goes on from there); None for lazy Adam, which replays none.
        bf16: whether the stored weights are bfloat16.
        bf16_state: whether the stored moments are.
    """
    if caught_up_UX is None:
        read_stored_rows(records_CW, slots_U, weights_UD, bf16=bf16)
        return
    arguments = (
        records_CW.numpy(),
        records_CW.view(torch.int32).numpy(),
        records_CW.view(torch.int16).numpy().view(np.uint16),
        slots_U.numpy(),
        bf16,
        bf16_state,
        weights_UD.numpy(),
        caught_up_UX.numpy(),
        _constants(rates),
        *rates.scalars().numpy().T,
        len(rates),
    )
    split_rows(len(slots_U), lambda start, end: _read(*arguments, start, end))


def update_rows(
    records_CW: Tensor,
    slots_U: Tensor,
    rates: AdamRates,
    grad_UD: Tensor,
    caught_up_UX: Tensor | None,
    row_ids_U: Tensor | None = None,
    *,
    bf16: bool = False,
    bf16_state: bool = False,
    seed: int = 0,
    gradient_scale: float = 1.0,
) -> None:
    """Applies the last of the applied steps to the rows, and sets their version to its number.

    Args:
        records_CW: float32, rows contiguous; a window or a whole shard.
        slots_U: int64, unique.
        rates: of all applied steps, this one included.
        grad_UD: float32.
        caught_up_UX: what `read_rows` wrote before this step, with no update since.
        row_ids_U: int64, job-wide; bf16 rows need them.
        bf16: whether the stored weights are bfloat16, which are rounded stochastically by (seed, row id, step).
        bf16_state: whether the stored moments are, likewise.
        seed: of the rounding.
        gradient_scale: multiplied with the gradient first.

    Raises:
        ValueError: bf16 rows come without ids.
    """
    replays, step = caught_up_UX is not None, len(rates)
    caught_up_UX = grad_UD[:0] if caught_up_UX is None else caught_up_UX
    rows = row_step(
        records_CW, slots_U, grad_UD, row_ids_U, step=step, bf16=bf16, seed=seed, gradient_scale=gradient_scale,
        bf16_state=bf16_state, state_size=2 * grad_UD.shape[1],
    )  # fmt: skip
    arguments = rows, caught_up_UX.numpy(), _constants(rates), *rates.scalars().numpy()[step], replays
    split_rows(len(slots_U), lambda start, end: _update(*arguments, start, end))


class _Constants(NamedTuple):
    """What stays the same for all rows and steps, as float32."""

    lerp: np.float32
    from_gradient: bool
    beta2: np.float32
    one_minus_beta2: np.float32
    eps: np.float32
    rests: bool
    """Whether rows come to rest at all, by the betas and eps."""
    peak_rate: np.float32
    beta1: float


def _constants(rates: AdamRates) -> _Constants:
    beta1, beta2 = rates.betas
    # torch interpolates from the end that is nearer, which decides on the rounding.
    far = np.float32(1 - beta1) >= 0.5
    return _Constants(
        np.float32(1 - beta1) - np.float32(far),
        bool(far),
        np.float32(beta2),
        np.float32(1 - beta2),
        np.float32(rates.eps),
        bool(beta1**2 <= beta2 * (1 - 1e-5) and rates.eps >= _LEAST_ROOT),
        np.float32(rates.peak_rate),
        beta1,
    )


@compiled
def _read(  # type: ignore[no-untyped-def]
    records, versions, halves, slots, bf16, bf16_state, weights, caught_up, constants, step_sizes, roots, now, start,
    end,
):  # fmt: skip
    dim = weights.shape[1]
    for row in range(start, end):
        ask_ahead(records, slots, row, end)
        slot = slots[row]
        last = versions[slot, versions.shape[1] - 1]
        # A row that never had a gradient has moments of 0, which move nothing.
        if last == 0 or last >= now:
            if bf16:
                load_bf16(halves[slot], weights[row])
            else:
                weights[row] = records[slot, :dim]
            continue
        values = caught_up[row]
        unpack(records, halves, slot, bf16, bf16_state, values[:dim], values[dim : 3 * dim])
        _replay(values[:dim], values[dim : 2 * dim], values[2 * dim : 3 * dim], constants, step_sizes, roots, last, now)
        weights[row] = values[:dim]


@compiled
def _replay(weights, means, squares, constants, step_sizes, roots, last, now):  # type: ignore[no-untyped-def]
    resting = False
    zero = np.float32(0)
    for step in range(last + 1, now + 1):
        for column in range(weights.shape[0]):
            start = zero if constants.from_gradient else means[column]
            means[column] = fma(constants.lerp, zero - means[column], start)
            squares[column] *= constants.beta2
        if not resting:
            step_size, root = step_sizes[step], roots[step]
            for column in range(weights.shape[0]):
                weights[column] += step_size * means[column] / (np.sqrt(squares[column]) / root + constants.eps)
            if constants.rests and step % _CHECK_EVERY == 0:
                peak = constants.peak_rate / np.float32(1 - constants.beta1**step)
                resting = _rests(weights, means, squares, peak, constants.eps)
        elif step % _CHECK_MOMENTS_EVERY == 0 and _still(means, squares, constants):
            return


@compiled
def _rests(weights, means, squares, peak_step_size, eps):  # type: ignore[no-untyped-def]
    """Whether no later step without gradient changes the weights: see `kernels.rows.adam._count_resting`."""
    for column in range(weights.shape[0]):
        bound = abs(means[column]) / (np.sqrt(squares[column]) + eps) + _LEAST_ROOT
        moves = np.float32(4) * peak_step_size * bound > abs(weights[column]) * _LEAST_MOVE
        if moves and means[column] != 0:
            return False
    return True


@compiled
def _still(means, squares, constants):  # type: ignore[no-untyped-def]
    """Whether no later step without gradient changes the moments."""
    zero = np.float32(0)
    for column in range(means.shape[0]):
        start = zero if constants.from_gradient else means[column]
        if fma(constants.lerp, zero - means[column], start) != means[column]:
            return False
        if squares[column] * constants.beta2 != squares[column]:
            return False
    return True


@compiled
def _update(rows, caught_up, constants, step_size, root, replays, start, end):  # type: ignore[no-untyped-def]
    dim, last = rows.grads.shape[1], rows.records.shape[1] - 1
    unpacked = np.empty(3 * dim, np.float32)
    for row in range(start, end):
        ask_ahead(rows.records, rows.slots, row, end)
        slot = rows.slots[row]
        behind = replays and 0 < rows.versions[slot, last] < rows.step - 1
        if rows.bf16 or rows.bf16_state:
            if behind:
                _copy(caught_up[row], unpacked)
            else:
                unpack(rows.records, rows.halves, slot, rows.bf16, rows.bf16_state, unpacked[:dim], unpacked[dim:])
            _step_row(unpacked, rows.grads[row], constants, rows.scale, step_size, root)
            pack(unpacked[:dim], unpacked[dim:], rows, row)
        else:
            record = rows.records[slot, :last]
            if behind:
                _copy(caught_up[row], record)
            _step_row(record, rows.grads[row], constants, rows.scale, step_size, root)
        rows.versions[slot, last] = rows.step


@compiled
def _copy(source, target):  # type: ignore[no-untyped-def]
    for number in range(len(target)):
        target[number] = source[number]


@compiled
def _step_row(values, grads, constants, scale, step_size, root):  # type: ignore[no-untyped-def]
    dim = len(grads)
    _step(values[:dim], values[dim : 2 * dim], values[2 * dim :], grads, constants, scale, step_size, root)


@compiled
def _step(weights, means, squares, grads, constants, scale, step_size, root):  # type: ignore[no-untyped-def]
    # A function of few arrays: more, and the compiler gives up proving that they do not overlap, and vectors with it.
    for column in range(weights.shape[0]):
        grad = grads[column] * scale
        start = grad if constants.from_gradient else means[column]
        means[column] = fma(constants.lerp, grad - means[column], start)
        squares[column] = fma(constants.one_minus_beta2 * grad, grad, squares[column] * constants.beta2)
        weights[column] += step_size * means[column] / (np.sqrt(squares[column]) / root + constants.eps)
