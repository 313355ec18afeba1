"""Rows' squared norms on a CPU, in one pass.

Shape suffixes: U rows, D columns of a row.
"""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kernels.numba_intrinsics import compiled, fma
from kernels.threads import split_rows

_LANES = 8


def squared_norms(rows_UD: Tensor) -> NDArray[np.float32]:
    """Every row's sum of squares [U]: of each eighth column on its own, then of these."""
    norms = np.empty(len(rows_UD), np.float32)
    rows = rows_UD.numpy()
    split_rows(len(norms), lambda start, end: _square(rows, norms, start, end))
    return norms


@compiled
def _square(rows, norms, start, end):  # type: ignore[no-untyped-def]
    dim = rows.shape[1]
    for row in range(start, end):
        a = b = c = d = e = f = g = h = np.float32(0)  # eight variables stay in registers, an array would not
        for column in range(0, dim - dim % _LANES, _LANES):
            a = fma(rows[row, column], rows[row, column], a)
            b = fma(rows[row, column + 1], rows[row, column + 1], b)
            c = fma(rows[row, column + 2], rows[row, column + 2], c)
            d = fma(rows[row, column + 3], rows[row, column + 3], d)
            e = fma(rows[row, column + 4], rows[row, column + 4], e)
            f = fma(rows[row, column + 5], rows[row, column + 5], f)
            g = fma(rows[row, column + 6], rows[row, column + 6], g)
            h = fma(rows[row, column + 7], rows[row, column + 7], h)
        for column in range(dim - dim % _LANES, dim):
            a = fma(rows[row, column], rows[row, column], a)
        norms[row] = ((a + e) + (c + g)) + ((b + f) + (d + h))
