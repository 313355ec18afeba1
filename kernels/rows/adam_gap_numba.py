"""Steps of Adam without a gradient, one by one or all at once, for a row in a processor's L1 cache.

The bits are those of `kernels.rows.adam` and `kernels.rows.adam_closed`, whose docstrings say what is computed and why
the shortcuts keep them.
"""

from typing import NamedTuple

import numpy as np

from kernels.numba_intrinsics import compiled, fma, inlined
from kernels.rows.adam_rates import AdamRates

_CHECK_EVERY = 16  # steps between two checks whether a row's weights have come to rest
_CHECK_MOMENTS_EVERY = 256  # the same for its moments, which need many more
_LEAST_ROOT = np.float32(2.0**-62)  # below which the second moment is a denormal
_LEAST_MOVE = np.float32(2.0**-26)  # of a weight: less than half of the distance to the next float


class Constants(NamedTuple):
    """What stays the same for all rows and steps, as float32."""

    lerp: np.float32
    from_gradient: bool
    beta2: np.float32
    one_minus_beta2: np.float32
    eps: np.float32
    rests: bool
    """Whether rows can come to rest at all, given the betas and eps."""
    peak_rate: np.float32
    beta1: float


def constants(rates: AdamRates) -> Constants:
    """Those of an optimizer."""
    beta1, beta2 = rates.betas
    # torch interpolates from the nearer end, which determines the rounding.
    far = np.float32(1 - beta1) >= 0.5
    return Constants(
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
def replay(weights, means, squares, constants, step_sizes, roots, last, now):  # type: ignore[no-untyped-def]
    """Applies the steps from last + 1 to now to a row's parts, in place."""
    resting = False
    zero = np.float32(0)
    for step in range(last + 1, now + 1):
        for column in range(weights.shape[0]):
            start = zero if constants.from_gradient else means[column]
            # Not zero - means, an extra operation: the product is the same, and so is the sign of a sum of zeros.
            means[column] = fma(-constants.lerp, means[column], start)
            squares[column] *= constants.beta2
        if not resting:
            _move(weights, means, squares, step_sizes[step], roots[step], constants.eps)
            if constants.rests and step % _CHECK_EVERY == 0:
                peak = constants.peak_rate / np.float32(1 - constants.beta1**step)
                resting = _rests(weights, means, squares, peak, constants.eps)
        elif step % _CHECK_MOMENTS_EVERY == 0 and _still(means, squares, constants):
            return


@compiled
def close(weights, means, squares, sums, offsets, decays, roots, moves):  # type: ignore[no-untyped-def]
    """Applies all steps of a gap at once, in place: the form of `kernels.rows.adam_closed.close_gaps`.

    Args: a row's parts; its `GapSums.sums` and the offsets; its `GapSums.decays`; two float32 [D], overwritten.
    """
    for column in range(len(roots)):
        roots[column] = np.sqrt(squares[column])
        moves[column] = 0
    for node in range(len(offsets)):
        _add_node(moves, roots, np.float32(sums[node]), offsets[node])
    for column in range(len(roots)):
        weights[column] += means[column] * moves[column]
    _scale(means, decays[0])
    _scale(squares, decays[1])


# Loops over few arrays: with more, the compiler gives up proving that they do not overlap, and does not vectorise.
@compiled
def _add_node(moves, roots, share, offset):  # type: ignore[no-untyped-def]
    for column in range(len(roots)):
        moves[column] += share / (roots[column] + offset)


@compiled
def _scale(values, factor):  # type: ignore[no-untyped-def]
    for column in range(len(values)):
        values[column] *= factor


@inlined
def _move(weights, means, squares, step_size, root, eps):  # type: ignore[no-untyped-def]
    """Moves a row's weights along its moments of a step."""
    if root == 1:  # as in all but the first few hundred steps: dividing by it takes a third of the time
        for column in range(weights.shape[0]):
            weights[column] += step_size * means[column] / (np.sqrt(squares[column]) + eps)
    else:
        for column in range(weights.shape[0]):
            weights[column] += step_size * means[column] / (np.sqrt(squares[column]) / root + eps)


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
