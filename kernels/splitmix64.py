"""SplitMix64 on int64 tensors: the integer hash behind every random number that must not depend on order or device.

Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014. torch has few operations on uint64;
int64 products and sums wrap in the same way, and right shifts are made logical.
"""

from torch import Tensor

GOLDEN_GAMMA = 0x9E3779B97F4A7C15
ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
LAST_SHIFT = 31


def mix_(state: Tensor) -> Tensor:
    """The finalizer, a bijection of 64-bit words: int64, in place."""
    for shift, factor in ROUNDS:
        state.bitwise_xor_(_shift_right(state, shift)).mul_(signed(factor))
    return state.bitwise_xor_(_shift_right(state, LAST_SHIFT))


def counter_keys(counters: Tensor, key: int = 0) -> Tensor:
    """One well-mixed int64 word for every int64 counter, under a key."""
    return mix_(counters * signed(GOLDEN_GAMMA) + signed(key))


def derived_key(counter: int, key: int = 0) -> int:
    """A key of its own for every (counter, key): close ones must not give shifted copies of each other's words."""
    state = (counter * GOLDEN_GAMMA + key) % 2**64
    for shift, factor in ROUNDS:
        state = (state ^ state >> shift) * factor % 2**64
    return state ^ state >> LAST_SHIFT


def signed(value: int) -> int:
    """The int64 with the bits of `value` modulo 2**64."""
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value


def _shift_right(value: Tensor, shift: int) -> Tensor:
    return (value >> shift).bitwise_and_((1 << (64 - shift)) - 1)
