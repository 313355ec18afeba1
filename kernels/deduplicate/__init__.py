"""The rows that a step's lookups read, each once, and every micro-batch's index into them.

N lookups (all micro-batches, one after the other), U unique rows.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kernels import compiled_loops
from kernels.gather import RowIndex, row_index


def deduplicate(rows: Sequence[Tensor]) -> tuple[Tensor, tuple[RowIndex, ...]]:
    """Sorts once for all micro-batches where compiled loops are available.

    Args:
        rows: for each micro-batch, of which there is at least one, the row of every lookup: int64 of any shape, on the
            CPU, none negative.

    Returns:
        the unique rows, ascending, int64 [U]; and for each micro-batch the index of its lookups into them.
    """
    ids_N = rows[0].flatten() if len(rows) == 1 else torch.cat([part.flatten() for part in rows])
    sizes = [part.numel() for part in rows]
    highest = int(ids_N.max()) if ids_N.numel() else 0
    # The radix sort takes rows of 32 bits, which those of all but the largest tables have.
    if not compiled_loops.available() or highest >= 2**32:
        return deduplicate_reference(ids_N, sizes)
    from kernels.deduplicate.numba import deduplicate_compiled

    unique_U, indices = deduplicate_compiled(ids_N.numpy(), highest, sizes)
    return torch.from_numpy(unique_U), tuple(_as_tensors(*index, len(unique_U)) for index in indices)


def _as_tensors(
    rows_V: np.ndarray, segment_N: np.ndarray, order_N: np.ndarray, offsets_V: np.ndarray, num_rows: int
) -> RowIndex:
    tensor = torch.from_numpy
    return RowIndex(tensor(rows_V), tensor(segment_N), tensor(order_N), tensor(offsets_V), num_rows)


def deduplicate_reference(ids_N: Tensor, sizes: Sequence[int]) -> tuple[Tensor, tuple[RowIndex, ...]]:
    """`deduplicate` in plain PyTorch, for int64 rows; `sizes` are the micro-batches' numbers of lookups."""
    unique_U, index_N = ids_N.unique(return_inverse=True)
    return unique_U, tuple(row_index(part, len(unique_U)) for part in index_N.split(sizes))
