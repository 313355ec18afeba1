"""`kernels.deduplicate` on one CPU core: a radix sort and one pass over its result."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from kernels.deduplicate.radix_sort_numba import PLACE_BITS, sort_rows
from kernels.numba_intrinsics import compiled

Ints = NDArray[np.int32]

_PLACE = (np.uint64(1) << PLACE_BITS) - np.uint64(1)


def deduplicate_compiled(
    ids_N: NDArray[np.int64], highest: int, sizes: Sequence[int]
) -> tuple[NDArray[np.int64], list[tuple[Ints, Ints, Ints, Ints]]]:
    """The unique rows, from 0 to `highest`, and for each micro-batch of `sizes` lookups the tensors of a `RowIndex`."""
    bounds = np.array(list(accumulate(sizes, initial=0)))
    sorted_N = sort_rows(ids_N, highest)
    unique, counts = _count(sorted_N, bounds)
    unique_U, *parts = _group(sorted_N, bounds, unique, counts)
    lookups, segments = bounds[1:-1], np.cumsum(counts)[:-1]
    split = [np.split(part, where) for part, where in zip(parts, (segments, lookups, lookups, segments), strict=True)]
    return unique_U, list(zip(*split, strict=True))


# `bounds` are where micro-batches begin in the order of lookups, and where the last one ends.


@compiled
def _count(sorted_rows, bounds):  # type: ignore[no-untyped-def]
    """The number of unique rows, and of those that each micro-batch reads."""
    counts = np.zeros(len(bounds) - 1, np.int64)
    unique, batch, before = 0, 0, np.int64(-1)
    first, end = bounds[0], bounds[1]
    for word in sorted_rows:
        row, lookup = np.int64(word >> PLACE_BITS), np.int64(word & _PLACE)
        begins = row != before
        unique += begins
        if not first <= lookup < end:  # else the batch of the one before: no search
            batch, begins = int(np.searchsorted(bounds, lookup, side="right")) - 1, True
            first, end = bounds[batch], bounds[batch + 1]
        counts[batch] += begins
        before = row
    return unique, counts


@compiled
def _group(sorted_rows, bounds, unique, counts):  # type: ignore[no-untyped-def]
    unique_rows = np.empty(unique, np.int64)
    segments, grouped = np.empty(len(sorted_rows), np.int32), np.empty(len(sorted_rows), np.int32)
    rows, offsets = np.empty(counts.sum(), np.int32), np.empty(counts.sum(), np.int32)
    starts = np.cumsum(counts) - counts  # where each micro-batch's segments begin among all
    numbers = np.full(len(counts), -1, np.int32)  # of the latest segment of each
    ends = bounds[:-1].copy()  # of the lookups that each has got so far
    unique, batch, before = -1, 0, np.int64(-1)
    first, end = bounds[0], bounds[1]
    for word in sorted_rows:
        row, lookup = np.int64(word >> PLACE_BITS), np.int64(word & _PLACE)
        begins = row != before
        if begins:
            unique += 1
            unique_rows[unique] = row
        if not first <= lookup < end:
            batch, begins = int(np.searchsorted(bounds, lookup, side="right")) - 1, True
            first, end = bounds[batch], bounds[batch + 1]
        if begins:
            numbers[batch] += 1
            rows[starts[batch] + numbers[batch]] = unique
            offsets[starts[batch] + numbers[batch]] = ends[batch] - first
        segments[lookup] = numbers[batch]
        grouped[ends[batch]] = lookup - first
        ends[batch] += 1
        before = row
    return unique_rows, rows, segments, grouped, offsets
