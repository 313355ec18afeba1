"""Fetches by kernels that reach into pinned host memory, write-backs by the GPU's copy engines and the CPU.

More rows leave the window than come in from host memory, as those that were never updated are drawn. Carried by a copy
engine they take nothing from the model's kernels but the time to gather them, for a core's time to put them in place.
"""

from torch import Tensor

from offload.transfers.copies import StreamCopy, WorkerCopy
from offload.transfers.staged import StagedTransfers
from offload.transfers.zero_copy import ZeroCopyTransfers


class MixedTransfers:
    """Two engines, one a direction, over the same records.

    Args:
        fetching, writing: the engines.
    """

    name = "mixed"
    stream_ordered = False  # a fetch reads host memory only when what was written back has landed there

    def __init__(self, fetching: ZeroCopyTransfers, writing: StagedTransfers) -> None:
        self._fetching, self._writing = fetching, writing

    def fetch(self, rows: Tensor, slots: Tensor, stored: int) -> StreamCopy:
        """See `Transfers.fetch`."""
        return self._fetching.fetch(rows, slots, stored)

    def write_back(self, slots: Tensor, rows: Tensor) -> WorkerCopy:
        """See `Transfers.write_back`."""
        return self._writing.write_back(slots, rows)

    def close(self) -> None:
        """See `Transfers.close`."""
        self._writing.close()
        self._fetching.close()
