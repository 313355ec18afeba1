"""The key of the random numbers with which rows are rounded. See `kernels.rows.stochastic_rounding`."""

from typing import Literal

from kernels.splitmix64 import derived_key

Part = Literal["weights", "state"]
"""The part of a row that is rounded: the state is all of its optimizer's numbers, one after another."""


def rounding_key(seed: int, step: int, part: Part = "weights") -> int:
    """The key of all random numbers of an update, for this part of rows: an unsigned 64-bit integer. Any integers."""
    key = derived_key(step, derived_key(seed + 1))
    return key if part == "weights" else derived_key(1, key)
