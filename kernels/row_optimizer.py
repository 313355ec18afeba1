"""Optimizers of whole table rows, in place.

U rows, D columns of a row. All tensors are float32 and may be strided views of wider records; every value depends on
its own row alone and has the same bits whatever other rows are updated with it.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 1 << 18  # values replayed at a time: weights and moments stay in the processor's cache
_CHECK_EVERY = 16  # steps between two searches for rows whose weights have come to rest


def rowwise_adagrad(weights_UD: Tensor, sum_U1: Tensor, grad_UD: Tensor, *, lr: float, eps: float) -> None:
    """One step of Adagrad with one accumulator a row, the sum of the mean squares of the row's gradients.

    h += mean(g^2); w -= lr g / (sqrt(h) + eps). (The row-wise variant of FBGEMM's and TorchRec's embedding tables.)
    """
    # Folding halves fixes the order of additions, which a library reduction picks by shape, threads and device.
    sum_U1.add_(_fold_columns(grad_UD.square()).div_(grad_UD.shape[1]))
    weights_UD.sub_((grad_UD / (sum_U1.sqrt() + eps)).mul_(lr))


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
) -> None:
    """One step of Adam (Kingma and Ba, arXiv 1412.6980), with the bits of `torch.optim.Adam(foreach=False)` on CPU.

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
    """
    beta1, beta2 = betas
    exp_avg_UD.lerp_(grad_UD, 1 - beta1)
    exp_avg_sq_UD.mul_(beta2).addcmul_(grad_UD, grad_UD, value=1 - beta2)
    _move(_Rows(weights_UD, exp_avg_UD, exp_avg_sq_UD), step, lr, betas, eps)


def replay_adam(
    weights_UD: Tensor,
    exp_avg_UD: Tensor,
    exp_avg_sq_UD: Tensor,
    last_step_U: Tensor,
    learning_rates: Sequence[float],
    *,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Brings rows up to date with dense Adam: applies, bit for bit, the steps they missed for want of a gradient.

    A step without gradient still decays the moments and moves the weights along the old ones. Two shortcuts keep the
    bits: rows whose moments are all +0 are left alone, since such a step does not change them; and weights are no
    longer computed once no later step can change them (see `_count_resting`), while their moments go on to the end.

    Args:
        weights_UD: the rows, after their own last step. So are the moments.
        exp_avg_UD: first moments.
        exp_avg_sq_UD: second moments.
        last_step_U: integer; the applied step that each row is at, 0 for one that never had a gradient. Unchanged:
            afterwards every row is at step `len(learning_rates)`.
        learning_rates: those of all applied steps so far: `learning_rates[i]` was used at step i + 1.
        betas: as in `adam`, the same at every step.
        eps: as in `adam`, the same at every step.
    """
    parts = _Rows(weights_UD, exp_avg_UD, exp_avg_sq_UD)
    alive_U = (exp_avg_UD.view(torch.int32) != 0).any(1) | (exp_avg_sq_UD.view(torch.int32) != 0).any(1)
    rows = (alive_U & (last_step_U < len(learning_rates))).nonzero().squeeze(1)
    if rows.numel() == 0:
        return
    last_steps, by_age = last_step_U[rows].sort(stable=True)
    first = int(last_steps[0])
    # peaks[i] is the largest rate after step i, for every i from the first on: rates rise again in warm-up.
    peaks = [0.0] * first + list(accumulate(reversed(learning_rates[first:]), max, initial=0.0))[::-1]
    size = max(1, _BLOCK // weights_UD.shape[1])
    for block, block_steps in zip(rows[by_age].split(size), last_steps.split(size), strict=True):
        copies = _Rows(*(part.index_select(0, block) for part in parts))
        _replay_block(copies, block_steps.tolist(), learning_rates, peaks, betas, eps)
        for part, copy in zip(parts, copies, strict=True):
            part.index_copy_(0, block, copy)


class _Rows(NamedTuple):
    weights_UD: Tensor
    exp_avg_UD: Tensor
    exp_avg_sq_UD: Tensor

    def between(self, start: int, end: int) -> "_Rows":
        return _Rows(*(part[start:end] for part in self))


def _replay_block(
    rows: _Rows,
    last_steps: list[int],
    learning_rates: Sequence[float],
    peaks: Sequence[float],
    betas: tuple[float, float],
    eps: float,
) -> None:
    # Rows come sorted by their last step: those behind at a step are a prefix, and those at rest a prefix of it.
    zero = rows.exp_avg_UD.new_zeros(())
    resting = 0
    for step in range(last_steps[0] + 1, len(learning_rates) + 1):
        behind = bisect_left(last_steps, step)
        rows.exp_avg_UD[:behind].lerp_(zero, 1 - betas[0])
        rows.exp_avg_sq_UD[:behind].mul_(betas[1])
        moving = rows.between(resting, behind)
        _move(moving, step, learning_rates[step - 1], betas, eps)
        if step % _CHECK_EVERY == 0:
            resting += _count_resting(moving, peaks[step] / (1 - betas[0] ** step), betas, eps)


def _move(rows: _Rows, step: int, lr: float, betas: tuple[float, float], eps: float) -> None:
    # Operation for operation what torch.optim.Adam does, scalars as Python floats: its rounding is the contract.
    step_size = lr / (1 - betas[0] ** step)
    denominator_UD = (rows.exp_avg_sq_UD.sqrt() / (1 - betas[1] ** step) ** 0.5).add_(eps)
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
    return int(rests_U.int().cumprod(0).sum())


def _fold_columns(values_UD: Tensor) -> Tensor:
    while (width := values_UD.shape[1]) > 1:
        half = width // 2
        folded = values_UD[:, :half] + values_UD[:, half : 2 * half]
        values_UD = folded if width % 2 == 0 else torch.cat([folded, values_UD[:, -1:]], dim=1)
    return values_UD
