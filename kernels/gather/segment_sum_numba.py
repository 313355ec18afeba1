"""`kernels.gather.segment_sum` compiled for a CPU, with the same bits.

The values are read once and from beginning to end, as they lie in memory, and added to the sums of their rows, which
are fewer and stay in the processor's caches. In the order of the rows the values would be read all over their memory,
with a page-table walk for each.

V segments: the lookups of one row, none of them empty, D columns, N lookups, T threads.
"""

import numpy as np
import torch
from torch import Tensor

from kernels import recycled
from kernels.gather.segment_sum import CHUNK, GROUP
from kernels.numba_intrinsics import ask, compiled
from kernels.threads import each_thread, threads_for

_AHEAD = 8  # lookups


def segment_sum(values_ND: Tensor, segment_N: Tensor, offsets_V: Tensor) -> Tensor:
    """The sums [V, D].

    Args:
        values_ND: float32, contiguous.
        segment_N: int32; the segment of every lookup.
        offsets_V: int32; where every segment would start, were the lookups sorted.
    """
    (num_lookups, dim), num_segments = values_ND.shape, len(offsets_V)
    sums_VD = recycled.empty((num_segments, dim), torch.float32)
    # A chunk after a segment's first lies here at its first lookup's place divided by CHUNK: no two are closer.
    later_ED = recycled.empty((-(-num_lookups // CHUNK), dim), torch.float32)
    values, segments, offsets = values_ND.numpy(), segment_N.numpy(), offsets_V.numpy()
    sums, later = sums_VD.numpy(), later_ED.numpy()
    parts = threads_for(num_lookups)
    left, counts = np.empty(num_lookups, np.int32), np.zeros(parts, np.int64)
    arguments = values, segments, offsets, _count(segments, num_segments, parts), left, counts, sums, later
    each_thread(parts, lambda part: _sum_part(*arguments, part))
    _sum_left(*arguments)
    _sum_groups(num_lookups, offsets, sums, later)
    return sums_VD


@compiled
def _count(segments, num_segments, parts):  # type: ignore[no-untyped-def]
    """How many of each segment's lookups come before each part of the lookups: [T, V]."""
    starts = np.zeros((parts, num_segments), np.int32)
    for part in range(1, parts):
        starts[part] = starts[part - 1]
        for lookup in range(len(segments) * (part - 1) // parts, len(segments) * part // parts):
            starts[part, segments[lookup]] += 1
    return starts


# What is done for a lookup is written out: a function of so many arrays is called, which takes as long as the sum.


@compiled
def _sum_part(values, segments, offsets, starts, left, counts, sums, later, part):  # type: ignore[no-untyped-def]
    """Sums the chunks that begin in this part of the lookups, up to its end; the others' lookups are left for later."""
    dim, mine = sums.shape[1], starts[part]
    turns = mine.copy()
    first, end = len(segments) * part // len(starts), len(segments) * (part + 1) // len(starts)
    num_left = first
    for lookup in range(first, end):
        ask(sums, segments[min(lookup + _AHEAD, end - 1)], dim)
        ask(values, min(lookup + _AHEAD, end - 1), dim)  # the processor itself stops at the end of each page
        segment = segments[lookup]
        turn = turns[segment]
        turns[segment] = turn + 1
        chunk = turn // CHUNK * CHUNK
        place = (offsets[segment] + chunk) // CHUNK
        if chunk < mine[segment]:
            left[num_left] = lookup
            num_left += 1
        elif turn == 0:
            for column in range(dim):
                sums[segment, column] = np.float32(0) + values[lookup, column]
        elif turn < CHUNK:
            for column in range(dim):
                sums[segment, column] += values[lookup, column]
        elif turn == chunk:
            for column in range(dim):
                later[place, column] = np.float32(0) + values[lookup, column]
        else:
            for column in range(dim):
                later[place, column] += values[lookup, column]
    counts[part] = num_left - first


@compiled
def _sum_left(values, segments, offsets, starts, left, counts, sums, later):  # type: ignore[no-untyped-def]
    """Adds what was left to the chunks that began in earlier parts."""
    dim = sums.shape[1]
    for part in range(1, len(starts)):
        first = len(segments) * part // len(starts)
        end = first + counts[part]
        for index in range(first, end):
            if index + _AHEAD < end:
                ask(values, left[index + _AHEAD], dim)
            lookup = left[index]
            segment = segments[lookup]
            chunk = starts[part, segment] // CHUNK * CHUNK
            place = (offsets[segment] + chunk) // CHUNK
            if chunk == 0:
                for column in range(dim):
                    sums[segment, column] += values[lookup, column]
            else:
                for column in range(dim):
                    later[place, column] += values[lookup, column]


@compiled
def _sum_groups(num_lookups, offsets, sums, later):  # type: ignore[no-untyped-def]
    """Sums the chunks of long segments in groups, each into the place of its first, until one is left."""
    for segment in range(len(offsets)):
        start = offsets[segment]
        stop = offsets[segment + 1] if segment + 1 < len(offsets) else num_lookups
        apart = CHUNK
        while start + apart < stop:
            for first in range(start, stop, GROUP * apart):
                # A first chunk's sum is one from zero already.
                for place in range(first + apart, min(first + GROUP * apart, stop), apart):
                    if first == start:
                        _add(sums, segment, later, place // CHUNK)
                    else:
                        _add(later, first // CHUNK, later, place // CHUNK)
            apart *= GROUP


@compiled
def _add(sums, target, parts, source):  # type: ignore[no-untyped-def]
    for column in range(sums.shape[1]):
        sums[target, column] += parts[source, column]
