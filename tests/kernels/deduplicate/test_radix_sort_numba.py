"""The stable sort of row ids."""

import numpy as np
import pytest

from kernels.deduplicate.radix_sort_numba import PLACE_BITS, sort_rows


@pytest.mark.parametrize("high", [1, 2, 2047, 2048, 2**22, 2**32 - 1])
@pytest.mark.parametrize("count", [0, 1, 1000])
def test_sorted_as_numpy_sorts_stably(high: int, count: int) -> None:
    rows = np.random.default_rng(0).integers(0, high, count)
    rows[: count // 2] = rows[count // 2 : count // 2 * 2]  # equal ones, whose order must stay
    before = rows.copy()
    words = sort_rows(rows, high)
    order = words.astype(np.uint32)
    assert np.array_equal(order, np.argsort(rows, kind="stable"))
    assert np.array_equal(words >> PLACE_BITS, rows[order])
    assert np.array_equal(rows, before)
