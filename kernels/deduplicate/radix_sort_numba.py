"""A stable sort of table rows on one CPU core, in passes over 11 bits."""

import numpy as np
from numpy.typing import NDArray

from kernels.numba_intrinsics import compiled

_BITS = 11
_BINS = 1 << _BITS
PLACE_BITS = np.uint64(32)


def sort_rows(rows_N: NDArray[np.int64], highest: int) -> NDArray[np.uint64]:
    """Sorts integers from 0 to `highest`, below 2**32; equal ones keep their order.

    Returns:
        row and original position of each, in one word: the position in its lower `PLACE_BITS`.
    """
    return _sort(rows_N, -(-max(1, highest.bit_length()) // _BITS))


@compiled
def _sort(rows, passes):  # type: ignore[no-untyped-def]
    ends = np.zeros((passes, _BINS + 1), np.int32)
    for row in rows:
        for turn in range(passes):
            ends[turn, ((row >> (turn * _BITS)) & (_BINS - 1)) + 1] += 1
    for turn in range(passes):
        for digit in range(_BINS):
            ends[turn, digit + 1] += ends[turn, digit]
    words, sorted_words = np.empty(len(rows), np.uint64), np.empty(len(rows), np.uint64)
    for place in range(len(rows)):
        first = rows[place] & (_BINS - 1)
        words[ends[0, first]] = (np.uint64(rows[place]) << PLACE_BITS) | np.uint64(place)
        ends[0, first] += 1
    for turn in range(1, passes):
        shift = PLACE_BITS + np.uint64(turn * _BITS)
        for word in words:
            later = (word >> shift) & np.uint64(_BINS - 1)
            sorted_words[ends[turn, later]] = word
            ends[turn, later] += 1
        words, sorted_words = sorted_words, words
    return words
