"""The key and the factor with which all initial values of rows are drawn. See `kernels.records.row_init`."""

import math

import numpy as np

from kernels.splitmix64 import derived_key

_STD = math.sqrt((2**32 - 1) / 3)  # of a sum of four independent uniform 16-bit integers


def draw_key(seed: int) -> int:
    """The key of all initial values under a seed: an unsigned 64-bit integer."""
    return derived_key(seed + 1)


def draw_scale(std: float) -> float:
    """The factor of a centred sum: itself a float32, so that the product is rounded once on any device."""
    return float(np.float32(std / _STD))
