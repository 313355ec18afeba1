"""Sets of points in time, as sorted disjoint intervals [start, end): what overlaps, and for how long."""

from collections.abc import Iterable, Iterator
from itertools import pairwise

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Everything that lies in any of the intervals, which may overlap and come in any order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        elif end > start:
            merged.append((start, end))
    return merged


def length(disjoint: Iterable[Interval]) -> float:
    """The total length of disjoint intervals."""
    return sum(end - start for start, end in disjoint)


def overlap(one: list[Interval], other: list[Interval]) -> list[Interval]:
    """What lies in both of two results of `union`."""
    return list(_overlap(one, other))


def gaps(disjoint: list[Interval]) -> list[Interval]:
    """What lies between the intervals of a result of `union`."""
    return [(end, start) for (_, end), (start, _) in pairwise(disjoint)]


def _overlap(one: list[Interval], other: list[Interval]) -> Iterator[Interval]:
    mine, theirs = 0, 0
    while mine < len(one) and theirs < len(other):
        start, end = max(one[mine][0], other[theirs][0]), min(one[mine][1], other[theirs][1])
        if start < end:
            yield start, end
        if one[mine][1] < other[theirs][1]:
            mine += 1
        else:
            theirs += 1
