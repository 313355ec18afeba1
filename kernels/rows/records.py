"""The plain read of rows' weights from their records, on a CPU. (On a GPU: `kernels.rows.records_triton`.)"""

import torch
from torch import Tensor


def read_rows(records_CW: Tensor, slots_U: Tensor, weights_UD: Tensor, *, bf16: bool = False) -> None:
    """Writes the rows' weights as they are stored, for optimizers that move no weight without a gradient.

    Args:
        records_CW: float32, rows contiguous; a window or a whole shard, with any state.
        slots_U: int64.
        weights_UD: float32, overwritten.
        bf16: whether the stored weights are bfloat16.
    """
    dim = weights_UD.shape[1]
    if bf16:
        weights_UD.copy_(records_CW.view(torch.bfloat16)[:, :dim].index_select(0, slots_U))
    else:
        torch.index_select(records_CW[:, :dim], 0, slots_U, out=weights_UD)
