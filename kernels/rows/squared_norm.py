"""The squared norm of the rows' gradients, which decides on the clip of a step.

Shape suffixes: U rows, D columns of a row.
"""

import torch
from torch import Tensor

from kernels import compiled_loops


def squared_norm(rows_UD: Tensor) -> Tensor:
    """fp64 scalar, on the rows' device: the sum of all rows' sums of squares (fp32). On a CPU it has the same bits at
    any number of threads.

    Args:
        rows_UD: fp32.
    """
    if rows_UD.is_cuda or not compiled_loops.available():
        return torch.linalg.vecdot(rows_UD, rows_UD).sum(dtype=torch.float64)
    from kernels.rows.squared_norm_numba import squared_norms

    return torch.tensor(squared_norms(rows_UD).sum(dtype="float64"), dtype=torch.float64)
