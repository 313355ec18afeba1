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
from kernels.numba_intrinsics import ask_ahead, compiled
from kernels.threads import each_thread, threads_for


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
    each_thread(parts, lambda part: _sum_left(*arguments, part))
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


@compiled
def _sum_part(values, segments, offsets, starts, left, counts, sums, later, part):  # type: ignore[no-untyped-def]
    """Sums the chunks that begin in this part of the lookups, up to its end; the others' lookups are left for later."""
    turns, parts = starts[part].copy(), len(starts)
    first, end = len(segments) * part // parts, len(segments) * (part + 1) // parts
    for lookup in range(first, end):
        ask_ahead(sums, segments, lookup, end)
        segment = segments[lookup]
        turn = turns[segment]
        turns[segment] += 1
        chunk = turn // CHUNK * CHUNK
        if chunk < starts[part, segment]:
            left[first + counts[part]] = lookup
            counts[part] += 1
        elif chunk:
            _put(later, (offsets[segment] + chunk) // CHUNK, values, lookup, turn == chunk)
        else:
            _put(sums, segment, values, lookup, turn == 0)


@compiled
def _sum_left(values, segments, offsets, starts, left, counts, sums, later, part):  # type: ignore[no-untyped-def]
    """Adds what was left to the chunks that began in earlier parts: those of this part of the segments."""
    parts = len(starts)
    first, end = len(offsets) * part // parts, len(offsets) * (part + 1) // parts
    for of_part in range(1, parts):
        begin = len(segments) * of_part // parts
        stop = begin + counts[of_part]
        for place in range(begin, stop):
            lookup = left[place]
            segment = segments[lookup]
            if first <= segment < end:
                ask_ahead(values, left, place, stop)
                chunk = starts[of_part, segment] // CHUNK * CHUNK
                if chunk:
                    _put(later, (offsets[segment] + chunk) // CHUNK, values, lookup, False)
                else:
                    _put(sums, segment, values, lookup, False)


@compiled
def _put(sums, target, values, lookup, first):  # type: ignore[no-untyped-def]
    if first:
        for column in range(sums.shape[1]):
            sums[target, column] = np.float32(0) + values[lookup, column]
    else:
        for column in range(sums.shape[1]):
            sums[target, column] += values[lookup, column]


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
