"""Rows with the steps that they missed, handed from a read to the update that follows.

Shape suffixes: U rows of a step, D columns of a row, S numbers of state.
"""

from typing import NamedTuple

from torch import Tensor


class CaughtUp(NamedTuple):
    """Memory that a read fills and the update of the same rows starts from, so that no missed step is computed twice.

    The records themselves stay as they are until the update: a step that is skipped leaves no trace, and what is
    stored as bfloat16 is rounded once.

    Attributes:
        weights_UD: float32; of all rows, or, on a CPU, at least of those that missed steps.
        state_US: float32, rows contiguous; of the rows that missed steps, at least. None for optimizers that make up
            for none.
        places_U: int64; on a CPU with state: the row's slot, where it missed no step, and otherwise -1 - u.
    """

    weights_UD: Tensor
    state_US: Tensor | None
    places_U: Tensor | None = None
