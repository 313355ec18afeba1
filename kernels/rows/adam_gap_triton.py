"""Steps of Adam without a gradient, one by one or all at once, for a row in a Triton program's registers.

The bits are those of `kernels.rows.adam` and `kernels.rows.adam_closed`, as `kernels.rows.adam_triton` says. A row is
brought up to date by itself, so it does not matter which others are in the call. The loop over its steps ends early,
like the reference's, by the same argument.
"""

import math
from typing import Any

import numpy as np
import triton
import triton.language as tl

from kernels.rows.adam_rates import AdamRates
from kernels.rows.records_triton import same_bits

_CHECK_EVERY = tl.constexpr(16)  # steps between two checks whether a row's weights have come to rest
_CHECK_MOMENTS_EVERY = tl.constexpr(64)  # the same for its moments
_LEAST_ROOT = tl.constexpr(2.0**-62)  # below which the second moment is a denormal
_LEAST_MOVE = tl.constexpr(2.0**-26)  # of a weight: less than half of the distance to the next float


def settings(rates: AdamRates) -> dict[str, Any]:
    """The arguments of a kernel that calls `move` and `replay`."""
    beta1, beta2 = rates.betas
    lerp = np.float32(1 - beta1)
    # torch interpolates from the nearer end, which determines the rounding.
    far = bool(lerp >= 0.5)
    return {
        "lerp": float(lerp - np.float32(far)),
        "beta2": beta2,
        "eps": rates.eps,
        "peak_rate": rates.peak_rate,
        "log2_beta1": math.log2(beta1) if beta1 else -math.inf,
        "FAR": far,
        "RESTS": beta1**2 <= beta2 * (1 - 1e-5) and rates.eps >= _LEAST_ROOT.value,
    }


@triton.jit
def _decay(
    means: tl.tensor, squares: tl.tensor, lerp: tl.tensor, beta2: tl.tensor, FAR: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """A step without gradient, on the moments: means.lerp_(0, 1 - beta1) and squares.mul_(beta2)."""
    # Not 0 - means, an extra operation: the product is the same, and so is the sign of a sum of zeros.
    start = 0.0 if FAR else means
    return tl.fma(-lerp, means, start), squares * beta2


@triton.jit
def move(
    weights: tl.tensor, means: tl.tensor, squares: tl.tensor, scalars: tl.tensor, step: tl.tensor, eps: tl.tensor
) -> tl.tensor:
    """The weights after a step, from the moments after it."""
    step_size, root = tl.load(scalars + 2 * step), tl.load(scalars + 2 * step + 1)
    denominator = tl.sqrt_rn(squares)
    if root != 1.0:  # after some hundred steps it is
        denominator = tl.div_rn(denominator, root)
    return weights + tl.div_rn(step_size * means, denominator + eps)


@triton.jit
def _at_rest(
    weights: tl.tensor,
    means: tl.tensor,
    squares: tl.tensor,
    inside: tl.tensor,
    eps: tl.tensor,
    peak_step_size: tl.tensor,
) -> tl.tensor:
    """1 if no later step without gradient changes the weights, else 0: see `kernels.rows.adam._count_resting`."""
    bound = tl.div_rn(tl.abs(means), tl.sqrt_rn(squares) + eps) + _LEAST_ROOT
    rests = (4.0 * peak_step_size * bound <= tl.abs(weights) * _LEAST_MOVE) | (means == 0.0)
    return tl.min((rests | ~inside).to(tl.int32), axis=0)


@triton.jit
def replay(
    weights: tl.tensor,
    means: tl.tensor,
    squares: tl.tensor,
    inside: tl.tensor,
    scalars: tl.tensor,
    last: tl.tensor,
    now: tl.tensor,
    lerp: tl.tensor,
    beta2: tl.tensor,
    eps: tl.tensor,
    peak_rate: tl.tensor,
    log2_beta1: tl.tensor,
    FAR: tl.constexpr,
    RESTS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The row after the steps from last + 1 to now, none of which has a gradient for it."""
    # A row that never had a gradient has moments of 0, which move nothing.
    step = tl.where(last > 0, last, now) + 1
    resting = 0
    while (step <= now) & (resting == 0):
        end = tl.minimum(now, (step + _CHECK_EVERY - 1) // _CHECK_EVERY * _CHECK_EVERY)
        for missed in range(step, end + 1):
            means, squares = _decay(means, squares, lerp, beta2, FAR)
            weights = move(weights, means, squares, scalars, missed, eps)
        if RESTS:
            peak_step_size = peak_rate / (1.0 - tl.exp2(end.to(tl.float32) * log2_beta1))
            resting = _at_rest(weights, means, squares, inside, eps, peak_step_size)
        step = end + 1
    still = 0
    while (step <= now) & (still == 0):
        end = tl.minimum(now, step + _CHECK_MOMENTS_EVERY - 1)
        before_means, before_squares = means, squares
        for _ in range(step, end + 1):
            means, squares = _decay(means, squares, lerp, beta2, FAR)
        # A moment's magnitude never grows, so one that is what it was has not changed in between and never will.
        kept = same_bits(means, before_means) & same_bits(squares, before_squares)
        still = tl.min((kept | ~inside).to(tl.int32), axis=0)
        step = end + 1
    return weights, means, squares


@triton.jit
def close(
    weights: tl.tensor,
    means: tl.tensor,
    squares: tl.tensor,
    sums: tl.tensor,
    offsets: tl.tensor,
    decays: tl.tensor,
    NODES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The row after all steps of its gap at once: the form of `kernels.rows.adam_closed.close_gaps`.

    Args: the row; pointers to its `GapSums.sums`, the offsets and its `GapSums.decays`.
    """
    roots = tl.sqrt_rn(squares)
    moves = tl.zeros_like(roots)
    for node in tl.static_range(NODES):
        moves += tl.div_rn(tl.load(sums + node).to(tl.float32), roots + tl.load(offsets + node))
    return weights + means * moves, means * tl.load(decays), squares * tl.load(decays + 1)
