"""SplitMix64 inside loops that Numba compiles: the words of `kernels.splitmix64`, as uint64."""

import numpy as np

from kernels.numba_intrinsics import compiled
from kernels.splitmix64 import GOLDEN_GAMMA, LAST_SHIFT, ROUNDS

_GOLDEN = np.uint64(GOLDEN_GAMMA)
(_SHIFT_1, _FACTOR_1), (_SHIFT_2, _FACTOR_2) = ((np.uint64(shift), np.uint64(factor)) for shift, factor in ROUNDS)
_SHIFT_3 = np.uint64(LAST_SHIFT)


@compiled
def mix(word):  # type: ignore[no-untyped-def]
    """The finalizer, a bijection of 64-bit words: uint64."""
    word = (word ^ (word >> _SHIFT_1)) * _FACTOR_1
    word = (word ^ (word >> _SHIFT_2)) * _FACTOR_2
    return word ^ (word >> _SHIFT_3)


@compiled
def counter_key(counter, key):  # type: ignore[no-untyped-def]
    """A well-mixed word for a counter, under a key: uint64."""
    return mix(counter * _GOLDEN + key)
