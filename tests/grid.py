"""Grids of parameters: `make test` takes each value once, `make test-long` every combination."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
from _pytest.mark import ParameterSet


def grid(*axes: Sequence[Any]) -> list[ParameterSet]:
    """Every combination of the axes' values, for `parametrize`; those are `long` that repeat values of others.

    Two axes whose lengths have a common divisor always take the same steps together: what must be combined belongs
    into one axis.
    """
    longest = max(map(len, axes))
    once = {tuple(number % len(axis) for axis in axes) for number in range(longest)}
    return [
        pytest.param(*values, marks=() if numbers in once else pytest.mark.long)
        for numbers, values in zip(product(*(range(len(axis)) for axis in axes)), product(*axes), strict=True)
    ]
