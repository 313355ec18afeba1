"""The rows that a step's lookups read, each once, and every micro-batch's index into them.

N lookups (all micro-batches, one after the other), U unique rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import compiled_loops
from kernels.gather import RowIndex


def deduplicate(rows: Sequence[Tensor]) -> tuple[Tensor, tuple[RowIndex, ...]]:
    """Sorts once, however many micro-batches there are.

    Args:
        rows: for each of at least one micro-batch, the row of every lookup: int64 of any shape, on the CPU, none
            negative.

    Returns:
        the unique rows, ascending, int64 [U]; and for each micro-batch the index of its lookups into them.
    """
    ids_N = torch.cat([part.flatten() for part in rows])
    sizes = [part.numel() for part in rows]
    # Rows of a module fit into 32 bits in all but the largest tables, and those are sorted by radix.
    if not compiled_loops.available() or (ids_N.numel() and int(ids_N.max()) >= 2**31):
        return deduplicate_reference(ids_N, sizes)
    from kernels.deduplicate.numba import deduplicate_compiled

    unique_U, indices = deduplicate_compiled(ids_N.to(torch.int32).numpy(), sizes)
    return torch.from_numpy(unique_U), tuple(RowIndex(*map(torch.from_numpy, index)) for index in indices)


def deduplicate_reference(ids_N: Tensor, sizes: Sequence[int]) -> tuple[Tensor, tuple[RowIndex, ...]]:
    """`deduplicate` in PyTorch's operations, of int64 rows; micro-batches have `sizes` lookups each."""
    sorted_N, order_N = ids_N.sort(stable=True)
    unique_U, places_N = sorted_N.unique_consecutive(return_inverse=True)
    index_N = torch.empty_like(places_N).scatter_(0, order_N, places_N)
    indices, end = [], 0
    for index, size in zip(index_N.split(sizes), sizes, strict=True):
        start, end = end, end + size
        # A part of a sorted order is itself sorted: no micro-batch needs a sort of its own.
        order = order_N[(order_N >= start) & (order_N < end)] - start
        counts = torch.bincount(index, minlength=len(unique_U))
        parts = index, order, counts.cumsum(0) - counts
        indices.append(RowIndex(*(part.to(torch.int32) for part in parts)))
    return unique_U, tuple(indices)
