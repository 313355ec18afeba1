"""Initial values of table rows, from a counter-based generator.

U rows, D columns of a row.
"""

import math

import numpy as np
import torch
from torch import Tensor

# SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014): the increment, and
# the shifts and factors of the finalizer.
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31

_EVEN_FIELDS = 0x0000FFFF0000FFFF
_MEAN = 2 * 0xFFFF
_STD = math.sqrt((2**32 - 1) / 3)  # of a sum of four independent uniform 16-bit integers

_CHUNK = 1 << 16  # values drawn at a time: the int64 temporaries stay in a core's cache


def initial_rows(row_ids_U: Tensor, dim: int, *, seed: int, std: float) -> Tensor:
    """Nearly normal values with mean 0 and standard deviation `std`: float32 [U, dim].

    A value depends on (seed, row id, column) alone, and has the same bits on every device: the sum of the four 16-bit
    fields of a 64-bit hash, centred in exact integer arithmetic, is rounded once when it is scaled. (Such a sum has
    an Irwin-Hall distribution: excess kurtosis -0.3, nothing beyond 3.47 standard deviations.)

    Args:
        row_ids_U: int64 row ids, any values, on the device wanted.
        dim: columns of a row.
        seed: any integer, taken modulo 2**64. Tables that share row ids need distinct seeds.
        std: standard deviation; 0 gives zeros.
    """
    row_keys_U = _mix(row_ids_U * _signed(_GOLDEN_GAMMA) + _signed(_seed_key(seed)))
    column_keys_D = _mix(torch.arange(1, dim + 1, device=row_ids_U.device) * _signed(_GOLDEN_GAMMA))
    # A scale that is itself a float32 is multiplied with one rounding wherever this runs.
    scale = float(np.float32(std / _STD))
    values_UD = torch.empty(row_ids_U.shape[0], dim, dtype=torch.float32, device=row_ids_U.device)
    rows = max(1, _CHUNK // max(1, dim))
    for keys, values in zip(row_keys_U.split(rows), values_UD.split(rows), strict=True):
        values.copy_(_centred_sum(_mix(keys[:, None] ^ column_keys_D))).mul_(scale)
    return values_UD


def _seed_key(seed: int) -> int:
    # Close seeds must not give shifted copies of each other's rows, as seed + row id would.
    key = torch.tensor([_signed((seed + 1) * _GOLDEN_GAMMA)])
    return int(_mix(key))


def _signed(value: int) -> int:
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value


def _mix(state: Tensor) -> Tensor:
    # In place. int64 products wrap, as uint64 ones do; torch has few operations on uint64 itself.
    for shift, factor in _ROUNDS:
        state.bitwise_xor_(_shift_right(state, shift)).mul_(_signed(factor))
    return state.bitwise_xor_(_shift_right(state, _LAST_SHIFT))


def _shift_right(value: Tensor, shift: int) -> Tensor:
    return (value >> shift).bitwise_and_((1 << (64 - shift)) - 1)


def _centred_sum(hashes: Tensor) -> Tensor:
    pairs = (hashes >> 16).bitwise_and_(_EVEN_FIELDS).add_(hashes.bitwise_and_(_EVEN_FIELDS))
    return (pairs >> 32).add_(pairs.bitwise_and_(0xFFFFFFFF)).sub_(_MEAN)
