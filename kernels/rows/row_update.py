"""What every optimizer's kernels are given about a step's rows, on a CPU and on a GPU.

Shape suffixes: C slots, W words of a record, U rows of a step, D columns of a row.
"""

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowUpdate:
    """One step on rows in their slots.

    Attributes:
        records_CW: float32, rows contiguous; a window or a whole shard.
        slots_U: int64, unique, on the device of the records.
        grad_UD: float32, of any strides.
        row_ids_U: int64, job-wide; needed where anything is rounded.
        step: number of this step among the applied ones, from 1: the rows' version afterwards.
        bf16: whether the stored weights are bfloat16, which are rounded stochastically by (seed, row id, step).
        bf16_state: whether the stored state is, likewise.
        seed: of the rounding.
        gradient_scale: the gradient is first multiplied by it.
    """

    records_CW: Tensor
    slots_U: Tensor
    grad_UD: Tensor
    row_ids_U: Tensor | None = None
    _: KW_ONLY
    step: int
    bf16: bool = False
    bf16_state: bool = False
    seed: int = 0
    gradient_scale: float = 1.0

    def rounding_ids(self) -> Tensor:
        """The row ids, or any int64 [U] where nothing is rounded.

        Raises:
            ValueError: something is rounded, and there are no ids.
        """
        if not (self.bf16 or self.bf16_state):
            return self.slots_U
        ids_U = rounded_by(self.row_ids_U)
        if ids_U.dtype != torch.int64 or ids_U.shape != self.slots_U.shape:
            raise ValueError(f"expected {len(self.slots_U)} row ids of int64, not {ids_U.dtype} {list(ids_U.shape)}")
        return ids_U


def rounded_by(row_ids_U: Tensor | None) -> Tensor:
    """The ids that key the rounding of bf16 weights or state.

    Raises:
        ValueError: there are none.
    """
    if row_ids_U is None:
        raise ValueError("rows with bf16 weights or state are rounded by their ids, but none are given")
    return row_ids_U
