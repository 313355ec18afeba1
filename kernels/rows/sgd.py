"""Plain stochastic gradient descent on table rows, in place.

U rows, D columns of a row. All tensors are float32 and may be strided views of wider records.
"""

import torch
from torch import Tensor


def sgd(weights_UD: Tensor, grad_UD: Tensor, *, lr: float, scratch_UD: Tensor | None = None) -> None:
    """One step: w -= lr g (Robbins and Monro, A stochastic approximation method, 1951), rounded twice.

    `torch.optim.SGD` may round once, with a fused multiply-add, depending on the processor; where the product is exact,
    as for a learning rate that is a power of two, the bits are the same. A step without gradient changes nothing.

    Args:
        weights_UD: the rows.
        grad_UD: gradients.
        lr: learning rate.
        scratch_UD: overwritten; allocated if not given.
    """
    weights_UD.sub_(torch.mul(grad_UD, lr, out=scratch_UD))
