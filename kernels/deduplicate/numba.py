"""`kernels.deduplicate` on one CPU core: a sort by radix and one pass over what it sorted."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from kernels.deduplicate.radix_sort_numba import sort_rows
from kernels.numba_intrinsics import compiled

Ints = NDArray[np.int32]


def deduplicate_compiled(ids_N: Ints, sizes: Sequence[int]) -> tuple[NDArray[np.int64], list[tuple[Ints, Ints, Ints]]]:
    """The unique rows, and for each micro-batch of `sizes` lookups what a `RowIndex` holds."""
    bounds = list(accumulate(sizes, initial=0))
    unique_U, index_N, order_N, offsets_BU = _group(*sort_rows(ids_N), np.array(bounds))
    parts = [slice(*pair) for pair in pairwise(bounds)]
    return unique_U, [(index_N[p], order_N[p], offsets_U) for p, offsets_U in zip(parts, offsets_BU, strict=True)]


@compiled
def _group(sorted_rows, order, bounds):  # type: ignore[no-untyped-def]
    """`bounds` are where micro-batches begin in the order of lookups, and where the last one ends."""
    unique = 0
    for place in range(len(order)):
        unique += place == 0 or sorted_rows[place] != sorted_rows[place - 1]
    batches = len(bounds) - 1
    rows = np.empty(unique, np.int64)
    index, grouped = np.empty_like(order), np.empty_like(order)
    offsets = np.empty((batches, unique), np.int32)
    ends = bounds[:-1].copy()  # of what each micro-batch has got so far
    unique, batch = -1, 0
    for place in range(len(order)):
        if place == 0 or sorted_rows[place] != sorted_rows[place - 1]:
            unique, batch = unique + 1, 0
            rows[unique] = sorted_rows[place]
            for each in range(batches):
                offsets[each, unique] = ends[each] - bounds[each]
        lookup = order[place]
        index[lookup] = unique
        while lookup >= bounds[batch + 1]:  # the lookups of a row ascend
            batch += 1
        grouped[ends[batch]] = lookup - bounds[batch]
        ends[batch] += 1
    return rows, index, grouped, offsets
