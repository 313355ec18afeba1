"""Stochastic rounding of table rows to bfloat16, with bits that depend on (seed, row, step, part) alone.

A weight kept in bfloat16 cannot take steps under 2^-9 of its size: rounding to nearest would drop them all. Rounding up
with the probability of the part that is cut off keeps them on average, without a second copy in fp32.

The optimizer's state is rounded in the same way: otherwise a moment in bfloat16 that decays by less than 2^-9 of itself
per step would never move.

U rows, D columns of a row.
"""

import math

import torch
from torch import Tensor

from kernels.rows.rounding_key import Part, rounding_key
from kernels.splitmix64 import counter_keys, mix_

_FIELDS = 4  # 16-bit fields of a 64-bit word
_CHUNK = 1 << 17  # values rounded at a time: the temporaries stay in a core's cache


def stochastic_round_bf16_(
    values_UD: Tensor, row_ids_U: Tensor, *, seed: int, step: int, part: Part = "weights"
) -> None:
    """Rounds each value, in place, to one of its two bfloat16 neighbours, such that its expectation is the value.

    The 16 bits that bfloat16 lacks are the distance to the neighbour nearer to zero, in 2^-16 of the gap. A random
    16-bit integer is added to them and they are cut off: the carry selects the other neighbour with exactly that
    probability. What is already a bfloat16 stays as it is, as do infinities and NaNs; values beyond the largest
    bfloat16 may become infinite, as they do when rounded to nearest. All in exact integer arithmetic: the same bits on
    every device, in any order and among any other rows.

    Args:
        values_UD: float32, of any strides; afterwards values that bfloat16 can represent.
        row_ids_U: int64 job-wide row ids, on the device of the values.
        seed: of the tables; any integer, taken modulo 2**64.
        step: number of the update, from 1.
        part: the part of the rows that the values are: all of their weights, or all of their optimizer's state.
    """
    if values_UD.is_cuda:
        from kernels.rows.stochastic_rounding_triton import stochastic_round_bf16_ as on_gpu_

        on_gpu_(values_UD, row_ids_U, seed=seed, step=step, part=part)
        return
    if values_UD.numel() == 0:
        return
    rows = max(1, _CHUNK // values_UD.shape[1])
    key = rounding_key(seed, step, part)
    for values, row_ids in zip(values_UD.split(rows), row_ids_U.split(rows), strict=True):
        bits = _random_fields(row_ids, values.shape[1], key).add_(values.view(torch.int32))
        rounded = bits.bitwise_and_(~0xFFFF).view(torch.float32)
        values.copy_(rounded if _known_finite(values) else torch.where(values.isfinite(), rounded, _keep(values)))


def _known_finite(values: Tensor) -> bool:
    # Nearly always true, and cheaper to check than to select for.
    return math.isfinite(values.abs().max())


def _keep(values: Tensor) -> Tensor:
    # A NaN's payload must neither carry into the sign nor be cut down to infinity's: torch keeps it a NaN.
    return values.to(torch.bfloat16).float()


def _random_fields(row_ids_U: Tensor, dim: int, key: int) -> Tensor:
    """Uniform integers in [0, 2^16): int32 [U, D]."""
    words = torch.arange(1, -(-dim // _FIELDS) + 1, device=row_ids_U.device)
    hashes = mix_(counter_keys(row_ids_U, key)[:, None] ^ counter_keys(words))
    return hashes.view(torch.int16)[:, :dim].to(torch.int32).bitwise_and_(0xFFFF)
