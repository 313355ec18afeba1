"""Adam on table rows, in place, and the replay of the steps that rows missed for want of a gradient.

U rows, D columns of a row. All tensors are float32 and may be strided views of wider records; every value depends on
its own row alone and has the same bits whatever other rows are updated with it. When the caller passes blocks of rows
that fit into the processor's cache, only a little scratch is streamed through memory.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import ieee
from kernels.rows.rate_history import RateHistory

_CHECK_EVERY = 16  # steps between two searches for rows whose weights have come to rest
_CHECK_MOMENTS_EVERY = 256  # the same for the moments, which need many more
_COPY_FROM = 3  # missed steps from which contiguous copies pay


def adam(
    weights_UD: Tensor,
    exp_avg_UD: Tensor,
    exp_avg_sq_UD: Tensor,
    grad_UD: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    scratch_UD: Tensor | None = None,
) -> None:
    """One step of Adam (Kingma and Ba, arXiv 1412.6980), with the bits of `torch.optim.Adam(fused=True)` on CPUs.

    These are IEEE operations in a fixed order, so that other devices and kernels can have the same bits:
    m = fma(1 - beta1, g - m, m), v = fma((1 - beta2) g, g, beta2 v), w = w + (-lr / c1 m) / (sqrt(v) / c2 + eps), where
    c1 = 1 - beta1^step and c2 = sqrt(1 - beta2^step), and scalars are rounded to float32 before they are used. (torch's
    loop over a tensor's last elements, which fill no vector register, may round differently.)

    On its own this is lazy Adam: rows without a gradient rest, moments included, and only the bias correction knows
    of the steps they missed. After `replay_adam` it is dense Adam.

    Args:
        weights_UD: the rows.
        exp_avg_UD: first moments.
        exp_avg_sq_UD: second moments.
        grad_UD: gradients.
        step: number of this step among the applied ones, from 1.
        lr: learning rate.
        betas: decay of the first and of the second moments, per step.
        eps: added to the root of the corrected second moments.
        scratch_UD: overwritten; if given, nothing is allocated.
    """
    beta1, beta2 = betas
    exp_avg_UD.lerp_(grad_UD, 1 - beta1)
    exp_avg_sq_UD.mul_(beta2).addcmul_(grad_UD, grad_UD, value=1 - beta2)
    scratch_UD = torch.empty_like(grad_UD) if scratch_UD is None else scratch_UD
    _move(_Rows(weights_UD, exp_avg_UD, exp_avg_sq_UD, scratch_UD), step, lr, betas, eps)


def replay_adam(
    weights_UD: Tensor,
    exp_avg_UD: Tensor,
    exp_avg_sq_UD: Tensor,
    last_steps: Sequence[int],
    rates: RateHistory,
    *,
    betas: tuple[float, float],
    eps: float,
    scratch_4UD: Tensor | None = None,
) -> None:
    """Brings rows up to date with dense Adam: applies, bit for bit, the steps they missed for want of a gradient.

    A step without gradient still decays the moments and moves the weights along the old ones. Two shortcuts keep the
    bits: weights are no longer computed once no later step can change them (see `_count_resting`), and neither are
    moments that a step leaves unchanged.

    Args:
        weights_UD: the rows, each after its own last step. So are the moments.
        exp_avg_UD: first moments.
        exp_avg_sq_UD: second moments.
        last_steps: U integers, ascending: the applied step that each row is at.
        rates: of all applied steps so far; afterwards every row is at step `len(rates)`.
        betas: as in `adam`, the same at every step.
        eps: as in `adam`, the same at every step.
        scratch_4UD: float32 [4, U, D], overwritten; allocated if not given.
    """
    if not last_steps or last_steps[0] >= len(rates):
        return
    parts = (weights_UD, exp_avg_UD, exp_avg_sq_UD)
    scratch_4UD = weights_UD.new_empty(4, *weights_UD.shape) if scratch_4UD is None else scratch_4UD
    if len(rates) - last_steps[0] < _COPY_FROM:
        _replay(_Rows(*parts, scratch_4UD[3]), last_steps, rates, betas, eps)
        return
    copies = _Rows(*scratch_4UD)
    for part, copy in zip(parts, copies, strict=False):
        copy.copy_(part)
    _replay(copies, last_steps, rates, betas, eps)
    for part, copy in zip(parts, copies, strict=False):
        part.copy_(copy)


class _Rows(NamedTuple):
    weights_UD: Tensor
    exp_avg_UD: Tensor
    exp_avg_sq_UD: Tensor
    scratch_UD: Tensor

    def between(self, start: int, end: int) -> "_Rows":
        return _Rows(*(part[start:end] for part in self))


def _replay(rows: _Rows, last_steps: Sequence[int], rates: RateHistory, betas: tuple[float, float], eps: float) -> None:
    # Rows come sorted by their last step: those behind at a step are a prefix, those whose weights rest a prefix of
    # it, and those whose moments rest too a prefix of that.
    zero = rows.exp_avg_UD.new_zeros(())
    resting = still = 0
    step = last_steps[0] + 1
    bounds = None
    while step <= len(rates):
        behind = bisect_left(last_steps, step)
        if bounds != (still, resting, behind):
            bounds = still, resting, behind
            decaying, moving = rows.between(still, behind), rows.between(resting, behind)
        decaying.exp_avg_UD.lerp_(zero, 1 - betas[0])
        decaying.exp_avg_sq_UD.mul_(betas[1])
        _move(moving, step, rates[step], betas, eps)
        if step % _CHECK_EVERY == 0:
            resting += _count_resting(moving, rates.peak_after(step) / (1 - betas[0] ** step), betas, eps)
        if step % _CHECK_MOMENTS_EVERY == 0:
            still += _count_still(rows.between(still, resting), betas)
        if still == len(last_steps):
            return
        step = step + 1 if still < bisect_left(last_steps, step + 1) else last_steps[still] + 1


def _move(rows: _Rows, step: int, lr: float, betas: tuple[float, float], eps: float) -> None:
    # Operation for operation what torch's fused Adam does, scalars as Python floats: its rounding is the contract.
    step_size = lr / (1 - betas[0] ** step)
    denominator_UD = ieee.sqrt(rows.exp_avg_sq_UD, out=rows.scratch_UD)
    denominator_UD.div_((1 - betas[1] ** step) ** 0.5).add_(eps)
    rows.weights_UD.addcdiv_(rows.exp_avg_UD, denominator_UD, value=-step_size)


def _count_resting(rows: _Rows, peak_step_size: float, betas: tuple[float, float], eps: float) -> int:
    """How many of the first rows have weights that no later step without gradient can change, however many follow.

    Such a step moves a weight by s |m| / (sqrt(v) / c + eps), where c <= 1 and s is at most `peak_step_size`. |m|
    falls by beta1 a step and sqrt(v) by sqrt(beta2), so with beta1^2 < beta2 the quotient only falls. Denormals round
    coarsely, but v is denormal only where sqrt(v) < 2^-62 <= eps, which costs a factor of 2, and a denormal m adds
    less than 2^-62 to the quotient. Another factor of 2 outweighs all other rounding. A move under 2^-26 of a weight
    is less than half of its distance to the next float: rounding gives the weight back.
    """
    if betas[0] ** 2 > betas[1] * (1 - 1e-5) or eps < 2.0**-62:
        return 0
    bound_UD = rows.exp_avg_UD.abs().div_(rows.exp_avg_sq_UD.sqrt().add_(eps)).add_(2.0**-62)
    bound_UD.mul_(4 * peak_step_size)
    rests_U = ((bound_UD <= rows.weights_UD.abs() * 2.0**-26) | (rows.exp_avg_UD == 0)).all(1)
    return _count_first(rests_U)


def _count_still(rows: _Rows, betas: tuple[float, float]) -> int:
    # At zero, or at a denormal that rounding gives back: one step more changes nothing, so none ever will.
    decayed = rows.exp_avg_UD.lerp(rows.exp_avg_UD.new_zeros(()), 1 - betas[0])
    still_UD = decayed.view(torch.int32) == rows.exp_avg_UD.view(torch.int32)
    decayed = rows.exp_avg_sq_UD * betas[1]
    still_UD &= decayed.view(torch.int32) == rows.exp_avg_sq_UD.view(torch.int32)
    return _count_first(still_UD.all(1))


def _count_first(flags_U: Tensor) -> int:
    return int(flags_U.int().cumprod(0).sum())
