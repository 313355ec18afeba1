"""Adds rows to some of a table's rows, each of which is named at most once.

Shape suffixes: U rows of the table, V rows that are added, D columns.
"""

from torch import Tensor


def add_rows(table_UD: Tensor, rows_V: Tensor, added_VD: Tensor) -> None:
    """Adds `added_VD[v]` to row `rows_V[v]`, in place: the same bits on CPU and GPU, subnormal numbers included.

    Args:
        table_UD: fp32 or fp64, contiguous.
        rows_V: int32; no row twice.
        added_VD: of the table's dtype.
    """
    if table_UD.is_cuda:
        from kernels.gather.add_rows_triton import add_rows_on_gpu

        add_rows_on_gpu(table_UD, rows_V, added_VD)
    else:
        # With 32-bit indices torch adds row by row, which takes three times as long.
        table_UD.index_add_(0, rows_V.long(), added_VD)
