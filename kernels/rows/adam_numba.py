"""Adam on float32 records in their slots, in one pass over memory, on a CPU.

The bits are those of `kernels.rows.adam`, whose docstrings say what is computed and why the shortcuts keep them; here a
row's operations follow one another while it sits in the processor's nearest cache, not pass by pass over many rows.

A record is a row of float32 words: weights, first moments, second moments (D each), and the version, an int32.

Shape suffixes: C slots, U rows of a step, W words of a record (3 D + 1), D columns of a row, T steps.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.numba_intrinsics import ask_ahead, compiled, fma
from kernels.rows.adam_rates import AdamRates
from kernels.threads import split_rows

_CHECK_EVERY = 16  # steps between two looks whether a row's weights have come to rest
_CHECK_MOMENTS_EVERY = 256  # the same for its moments, which need many more
_LEAST_ROOT = np.float32(2.0**-62)  # below which the second moment is a denormal
_LEAST_MOVE = np.float32(2.0**-26)  # of a weight: less than half of the distance to the next float


def read_rows(
    records_CW: Tensor, slots_U: Tensor, rates: AdamRates, weights_UD: Tensor, caught_up_UX: Tensor | None
) -> None:
    """Writes the rows' weights with the effect of all applied steps. The slots are left as they are.

    Args:
        records_CW: float32; a window or a whole shard.
        slots_U: int64.
        rates: of all applied steps.
        weights_UD: float32, overwritten.
        caught_up_UX: float32 [U, W], overwritten: the records of the rows that missed steps, after the replay of these
            (`update_rows` goes on from there); None for lazy Adam, which replays none.
    """
    if caught_up_UX is None:
        torch.index_select(records_CW[:, : weights_UD.shape[1]], 0, slots_U, out=weights_UD)
        return
    arguments = (
        *_arrays(records_CW, slots_U, weights_UD, caught_up_UX),
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
    *,
    gradient_scale: float = 1.0,
) -> None:
    """Applies the last of the applied steps to the rows, and sets their version to its number.

    Args:
        records_CW: float32; a window or a whole shard.
        slots_U: int64, unique.
        rates: of all applied steps, this one included.
        grad_UD: float32.
        caught_up_UX: what `read_rows` wrote before this step, with no update since.
        gradient_scale: multiplied with the gradient first.
    """
    replays, caught_up_UX = caught_up_UX is not None, records_CW[:0] if caught_up_UX is None else caught_up_UX
    arrays = _arrays(records_CW, slots_U, grad_UD, caught_up_UX)
    step = len(rates)
    arguments = (*arrays, _constants(rates), np.float32(gradient_scale), *rates.scalars().numpy()[step], step, replays)
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


def _arrays(records_CW: Tensor, slots_U: Tensor, *others: Tensor) -> tuple[np.ndarray, ...]:
    # One more view of the records, of the versions in their last words.
    versions_CW = records_CW.view(torch.int32)
    return tuple(tensor.numpy() for tensor in (records_CW, versions_CW, slots_U, *others))


@compiled
def _read(records, versions, slots, weights, caught_up, constants, step_sizes, roots, now, start, end):  # type: ignore[no-untyped-def]
    dim = weights.shape[1]
    for row in range(start, end):
        ask_ahead(records, slots, row, end)
        slot = slots[row]
        last = versions[slot, 3 * dim]
        # A row that never had a gradient has moments of 0, which move nothing.
        if last == 0 or last >= now:
            weights[row] = records[slot, :dim]
            continue
        record = caught_up[row]
        for word in range(3 * dim):
            record[word] = records[slot, word]
        _replay(record[:dim], record[dim : 2 * dim], record[2 * dim : 3 * dim], constants, step_sizes, roots, last, now)
        weights[row] = record[:dim]


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
def _update(  # type: ignore[no-untyped-def]
    records, versions, slots, grads, caught_up, constants, scale, step_size, root, step, replays, start, end
):
    dim = grads.shape[1]
    for row in range(start, end):
        ask_ahead(records, slots, row, end)
        slot = slots[row]
        record = records[slot]
        if replays and 0 < versions[slot, 3 * dim] < step - 1:
            for word in range(3 * dim):
                record[word] = caught_up[row, word]
        parts = record[:dim], record[dim : 2 * dim], record[2 * dim : 3 * dim]
        _step(*parts, grads[row], constants, scale, step_size, root)
        versions[slot, 3 * dim] = step


@compiled
def _step(weights, means, squares, grads, constants, scale, step_size, root):  # type: ignore[no-untyped-def]
    # A function of few arrays: more, and the compiler gives up proving that they do not overlap, and vectors with it.
    for column in range(weights.shape[0]):
        grad = grads[column] * scale
        start = grad if constants.from_gradient else means[column]
        means[column] = fma(constants.lerp, grad - means[column], start)
        squares[column] = fma(constants.one_minus_beta2 * grad, grad, squares[column] * constants.beta2)
        weights[column] += step_size * means[column] / (np.sqrt(squares[column]) / root + constants.eps)
