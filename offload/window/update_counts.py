"""How often each row of a shard was updated, one byte per row in host memory: it tells which rows host memory stores.

Each operation is one pass over a step's rows; with compiled loops, without the GIL.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels import compiled_loops
from offload.host.memory import advise, map_anonymous
from offload.host.numa import home_nodes, place
from offload.window.directory import Rows, Slots

MOST = 255
"""Where a count stops: so many updates, or more."""


def add_update(counts_R: Tensor, rows_U: Tensor) -> None:
    """One more update of each of the rows (int64, unique), in place; counts (uint8) are on any device."""
    if counts_R.device.type == "cpu" and compiled_loops.available():
        from offload.window.update_counts_numba import add

        add(counts_R.numpy(), rows_U.numpy(), MOST)
        return
    counts_U = counts_R.index_select(0, rows_U)
    counts_R.index_copy_(0, rows_U, counts_U.clamp_(max=MOST - 1).add_(1))


class UpdateCounts:
    """The counts of a shard's rows, at first all zero. Rows given at once are unique.

    Args:
        num_rows: rows of the shard.
        device: the memory is near it, as the table's is.

    Raises:
        Unavailable: the system refuses the memory.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        memory = map_anonymous(max(1, num_rows))  # a mapping of zero bytes is refused
        counts = torch.frombuffer(memory, dtype=torch.uint8)
        place(counts, home_nodes(device))
        advise(memory, "MADV_HUGEPAGE")  # in such a page a row's byte is one of millions
        self.counts_R: Tensor = counts[:num_rows]
        """uint8 [R]."""
        self._counts: NDArray[np.uint8] = self.counts_R.numpy()

    def add(self, rows: Rows) -> None:
        """One more update of each of the rows."""
        add_update(self.counts_R, torch.from_numpy(rows))

    def updated_first(self, rows: Rows, slots: Slots) -> tuple[Rows, Slots, int]:
        """The rows with their slots, those ever updated first, each part in its order; and how many those are."""
        if compiled_loops.available():
            from offload.window.update_counts_numba import updated_first

            sorted_rows, sorted_slots = np.empty_like(rows), np.empty_like(slots)
            return sorted_rows, sorted_slots, int(updated_first(self._counts, rows, slots, sorted_rows, sorted_slots))
        fresh = self._counts[rows] == 0
        order = np.argsort(fresh, kind="stable")
        return rows[order], slots[order], len(rows) - int(np.count_nonzero(fresh))
