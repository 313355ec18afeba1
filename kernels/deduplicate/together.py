"""`kernels.deduplicate` for a GPU: a few PyTorch operations, however many micro-batches there are.

N lookups (all micro-batches, one after the other), U unique rows, V segments (the lookups of one row in one
micro-batch), B micro-batches.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.gather import RowIndex


class Deduplicated(NamedTuple):
    """The unique rows, and the tensors of all micro-batches' indices, one micro-batch after the other."""

    unique_U: Tensor
    """Ascending, in the type of the ids."""
    rows_V: Tensor
    """This and the next three: int32, as in `RowIndex`."""
    segment_N: Tensor
    order_N: Tensor
    offsets_V: Tensor
    segments_B: Tensor
    """int64; the number of segments of each micro-batch."""

    def indices(self, sizes: Sequence[int], segments: Sequence[int]) -> tuple[RowIndex, ...]:
        """Every micro-batch's index.

        Args:
            sizes: lookups of each micro-batch.
            segments: `segments_B`, read by the caller, so that nothing here waits for the device.
        """
        lengths = (segments, sizes, sizes, segments)
        parts = [part.split(list(length)) for part, length in zip(self[1:5], lengths, strict=True)]
        # Copies, each in memory of its own: kernels would be recompiled for views with another alignment.
        return tuple(
            RowIndex(rows_V, segment_N, order_N, offsets_V, len(self.unique_U)).map(Tensor.clone)
            for rows_V, segment_N, order_N, offsets_V in zip(*parts, strict=True)
        )


def deduplicate_together(ids_N: Tensor, bounds_B: Tensor) -> Deduplicated:
    """Sorts by row, then by micro-batch, both stably. The host waits twice, where torch counts unique numbers.

    Its tensors take at most 84 bytes per lookup at a time, not counting the ids and the temporaries of torch's
    operations.

    Args:
        ids_N: int32 or int64; the row of every lookup.
        bounds_B: int64 [B + 1], on the same device: where each micro-batch's lookups start, and the end.
    """
    sorted_N, lookup_N = ids_N.sort(stable=True)
    unique_U, row_N = sorted_N.unique_consecutive(return_inverse=True)
    del sorted_N
    batch_N, turn_N = torch.searchsorted(bounds_B[1:], lookup_N, right=True, out_int32=True).sort(stable=True)
    lookup_N, row_N = lookup_N[turn_N], row_N[turn_N]
    del turn_N
    return Deduplicated(unique_U, *_segments(batch_N, row_N, lookup_N, bounds_B, len(unique_U)))


def _segments(
    batch_N: Tensor, row_N: Tensor, lookup_N: Tensor, bounds_B: Tensor, num_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All but the unique rows, from lookups that are sorted by micro-batch and place among the unique rows."""
    # One number for each pair of micro-batch and row: each of its values is a segment.
    key_N = torch.add(row_N, batch_N, alpha=num_rows)
    key_V, segment_N, count_V = key_N.unique_consecutive(return_inverse=True, return_counts=True)
    num_rows = max(1, num_rows)
    begins_B = torch.searchsorted(key_V, torch.arange(len(bounds_B), device=key_V.device) * num_rows)
    offsets_V = (count_V.cumsum(0) - count_V - bounds_B[key_V // num_rows]).to(torch.int32)
    order_N = (lookup_N - bounds_B[batch_N]).to(torch.int32)
    segment_N = (segment_N - begins_B[batch_N]).to(torch.int32)
    segment_N = torch.empty_like(segment_N).scatter_(0, lookup_N, segment_N)
    return (key_V % num_rows).to(torch.int32), segment_N, order_N, offsets_V, begins_B.diff()
