"""Stochastic rounding of table rows to bfloat16, with bits that depend on (seed, row, step) alone.

A weight kept in bfloat16 has no room for steps under 2^-9 of its size: rounding to nearest would drop them all.
Rounding up with the probability of the part that is cut off keeps them on average, without a second copy in fp32.

U rows, D columns of a row, F 16-bit fields of a row's random words.
"""

import torch
from torch import Tensor

from kernels.splitmix64 import counter_keys, derived_key, mix_

_FIELDS = 4  # 16-bit fields of a 64-bit word
_EXPONENT = 0x7F800000  # all ones in an infinity and in a NaN
_CHUNK = 1 << 16  # values rounded at a time: the temporaries stay in a core's cache


def stochastic_round_bf16(values_UD: Tensor, row_ids_U: Tensor, *, seed: int, step: int) -> Tensor:
    """Rounds each value to one of its two bfloat16 neighbours, such that its expectation is the value: bf16 [U, D].

    The 16 bits that bfloat16 has no room for are the distance to the neighbour nearer to zero, in 2^-16 of the gap.
    A random 16-bit integer is added to them and they are cut off: the carry takes the other neighbour with just that
    probability. What is a bfloat16 already stays as it is, as do infinities and NaNs; values beyond the largest
    bfloat16 may become infinite, as they do when rounded to nearest. All in exact integer arithmetic: the same bits
    on every device, in any order and company.

    Args:
        values_UD: float32.
        row_ids_U: int64 job-wide row ids, on the device of the values.
        seed: of the tables; any integer, taken modulo 2**64.
        step: number of the update, from 1.
    """
    rounded_UD = torch.empty(values_UD.shape, dtype=torch.bfloat16, device=values_UD.device)
    if values_UD.numel() == 0:
        return rounded_UD
    rows = max(1, _CHUNK // values_UD.shape[1])
    key = derived_key(step, derived_key(seed + 1))
    parts = (values_UD.split(rows), row_ids_U.split(rows), rounded_UD.view(torch.int16).split(rows))
    for values, row_ids, rounded in zip(*parts, strict=True):
        bits = values.contiguous().view(torch.int32)
        up = bits + _random_fields(row_ids, values.shape[1], key)
        # A NaN's payload must neither carry into the sign nor be cut down to infinity's: torch keeps it a NaN.
        nearest = values.to(torch.bfloat16).view(torch.int16)
        finite = bits.bitwise_and(_EXPONENT) != _EXPONENT
        rounded.copy_(torch.where(finite, up.bitwise_right_shift_(16).to(torch.int16), nearest))
    return rounded_UD


def _random_fields(row_ids_U: Tensor, dim: int, key: int) -> Tensor:
    """Uniform integers in [0, 2^16): int32 [U, D]."""
    words = torch.arange(1, -(-dim // _FIELDS) + 1, device=row_ids_U.device)
    hashes = mix_(counter_keys(row_ids_U, key)[:, None] ^ counter_keys(words))
    return hashes.view(torch.int16)[:, :dim].to(torch.int32).bitwise_and_(0xFFFF)
