"""Optimizers with one number of state per row, in place. (Adam: `kernels.rows.adam`.)

U rows, D columns of a row. All tensors are float32 and may be strided views of wider records; every value depends on
its own row alone and has the same bits whatever other rows are updated with it.
"""

from bisect import bisect_right

import torch
from torch import Tensor

from kernels import ieee

_CHECK_EVERY = 64  # steps between two searches for values that decay no further


def rowwise_adagrad(
    weights_UD: Tensor,
    sum_U1: Tensor,
    grad_UD: Tensor,
    *,
    lr: float,
    eps: float,
    scratch_UD: Tensor | None = None,
) -> None:
    """One step of Adagrad with one accumulator per row, the sum of the mean squares of the row's gradients.

    h += mean(g^2); w -= lr g / (sqrt(h) + eps). (The row-wise variant of FBGEMM's and TorchRec's embedding tables.) A
    step without gradient changes nothing: rows at rest equal those of dense row-wise Adagrad.

    Args:
        weights_UD: the rows.
        sum_U1: accumulators.
        grad_UD: gradients.
        lr: learning rate.
        eps: added to the root of the accumulator.
        scratch_UD: overwritten; allocated if not given.
    """
    scratch_UD = torch.empty_like(grad_UD) if scratch_UD is None else scratch_UD
    sum_U1.add_(_mean_square(grad_UD, scratch_UD))
    weights_UD.sub_(torch.div(grad_UD, ieee.sqrt(sum_U1) + eps, out=scratch_UD).mul_(lr))


def rowwise_rmsprop(
    weights_UD: Tensor,
    mean_square_U1: Tensor,
    grad_UD: Tensor,
    *,
    lr: float,
    beta2: float,
    eps: float,
    scratch_UD: Tensor | None = None,
) -> None:
    """One step of RMSprop with one accumulator per row, the running mean of the mean squares of the row's gradients.

    v = beta2 v + (1 - beta2) mean(g^2); w -= lr g / (sqrt(v) + eps). (Tieleman and Hinton's RMSprop, lecture 6e of
    Neural networks for machine learning, 2012.) As in `torch.optim.RMSprop`, v is not corrected for its start at 0:
    a row's first step, or one after a long rest, is 1 / sqrt(1 - beta2) times as long as one among equal gradients
    (4.5 times for 0.95). Adam moves a row as far in the end, over the steps after a single gradient.

    On its own this is the lazy variant, in which v keeps its value while a row rests. After `decay` for the missed
    steps it is dense RMSprop. The weights rest either way: a step without gradient does not move them.

    Args:
        weights_UD: the rows.
        mean_square_U1: accumulators.
        grad_UD: gradients.
        lr: learning rate.
        beta2: decay of the accumulator, per step.
        eps: added to the root of the accumulator.
        scratch_UD: overwritten; allocated if not given.
    """
    scratch_UD = torch.empty_like(grad_UD) if scratch_UD is None else scratch_UD
    mean_square_U1.mul_(beta2).add_(_mean_square(grad_UD, scratch_UD), alpha=1 - beta2)
    weights_UD.addcdiv_(grad_UD, ieee.sqrt(mean_square_U1).add_(eps), value=-lr)


def decay(values_U: Tensor, times_U: Tensor, factor: float) -> Tensor:
    """Each value multiplied `times` times by `factor`, rounded every time: the bits of decaying it step by step.

    A power would be rounded once, and differ from dense stepping in the last bits. The multiplications end as soon as
    none changes a value any more, at zero or at a denormal that rounding gives back (after about 1,700 steps with
    0.95).

    Args:
        values_U: float32.
        times_U: integer, how often; nothing happens for 0 and less.
        factor: in [0, 1).
    """
    sorted_U, order_U = times_U.sort()
    times, decayed_U = sorted_U.tolist(), values_U[order_U]
    for done in range(max(times, default=0)):
        moving = decayed_U[bisect_right(times, done) :]
        if done % _CHECK_EVERY == 0 and torch.equal(moving * factor, moving):
            break
        moving.mul_(factor)
    return torch.empty_like(values_U).index_copy_(0, order_U, decayed_U)


def _mean_square(grad_UD: Tensor, scratch_UD: Tensor) -> Tensor:
    # Folding halves fixes the order of additions, which a library reduction picks by shape, threads and device.
    width = grad_UD.shape[1]
    torch.square(grad_UD, out=scratch_UD)
    while width > 1:
        half = width // 2
        scratch_UD[:, :half].add_(scratch_UD[:, half : 2 * half])
        if width % 2:
            scratch_UD[:, half].copy_(scratch_UD[:, width - 1])
        width = half + width % 2
    return scratch_UD[:, :1].div_(grad_UD.shape[1])
