"""SplitMix64 inside Triton kernels: the words of kernels/splitmix64.py, bit for bit.

Keys come from the host, by `kernels.splitmix64.derived_key`, as arguments that are annotated with tl.uint64: otherwise
a key's type, and with it the compiled kernel, would depend on its magnitude.
"""

import triton
import triton.language as tl

from kernels.splitmix64 import GOLDEN_GAMMA

_GOLDEN_GAMMA = tl.constexpr(GOLDEN_GAMMA)


@triton.jit
def mix(state: tl.tensor) -> tl.tensor:
    """The finalizer, a bijection of 64-bit words: a uint64 block."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB
    return state ^ (state >> 31)


@triton.jit
def counter_keys(counters: tl.tensor, key: tl.tensor) -> tl.tensor:
    """One well-mixed uint64 word for every counter, under a key.

    Args:
        counters: a block of signed integers.
        key: uint64 scalar, or 0.
    """
    return mix(counters.to(tl.uint64) * _GOLDEN_GAMMA + key)
