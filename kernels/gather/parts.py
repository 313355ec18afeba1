"""Sums rows that come in parts, one from each of several ranks: one by one, in rank order.

Shape suffixes: A parts, O rows, D columns.
"""

from torch import Tensor
from torch.nn.functional import embedding_bag


def sum_parts(parts_AD: Tensor, order_A: Tensor, starts_O: Tensor) -> Tensor:
    """Returns the sum [O, D] of every row's parts, in the parts' dtype; zeros for rows without any.

    A row's parts are added to zero one by one, in the given order: the same bits on every run, at any number of
    threads, on CPU and GPU. On a GPU this is one launch, however many parts a row has.

    Args:
        parts_AD: fp32 or fp64.
        order_A: int32; the parts sorted by row.
        starts_O: int32; where every row's parts start in `order_A`.
    """
    if parts_AD.is_cuda:
        from kernels.gather.parts_triton import sum_parts_in_order

        return sum_parts_in_order(parts_AD, order_A, starts_O)
    if parts_AD.numel() == 0:
        return parts_AD.new_zeros(len(starts_O), parts_AD.shape[1])
    # One thread sums a bag, in order.
    return embedding_bag(order_A, parts_AD, starts_O, mode="sum")
