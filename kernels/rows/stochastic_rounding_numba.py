"""bf16 rows inside loops that Numba compiles: bits and integer arithmetic of `kernels.rows.stochastic_rounding`.

Shape suffix: D numbers of a part of a row: its weights, or its optimizer's state.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.numba_intrinsics import inlined
from kernels.rows.rounding_key import Part, rounding_key
from kernels.splitmix64 import counter_keys
from kernels.splitmix64_numba import counter_key, mix

_FIELDS = 4  # 16-bit fields of a 64-bit word
_FIELD, _FIELD_BITS = np.uint64(0xFFFF), np.uint64(16)
_EXPONENT, _FRACTION, _QUIET = np.uint32(0x7F800000), np.uint32(0x007FFFFF), np.uint32(0x00400000)


def rounding_keys(dim: int, *, seed: int, step: int, part: Part = "weights") -> tuple[np.uint64, NDArray[np.uint64]]:
    """The keys of an update's random numbers for a part of D numbers: the update's, and one for every `_FIELDS`."""
    words = torch.arange(1, -(-dim // _FIELDS) + 1)
    return np.uint64(rounding_key(seed, step, part)), counter_keys(words).numpy().view(np.uint64)


@inlined
def load_bf16(halves, values):  # type: ignore[no-untyped-def]
    """Writes a part of a record (uint16, the bits of bfloat16) as float32 [D]."""
    bits = values.view(np.uint32)
    for column in range(len(values)):
        bits[column] = np.uint32(halves[column]) << 16


@inlined
def store_rounded(values, halves, row_id, key, word_keys):  # type: ignore[no-untyped-def]
    """Rounds a part of a row (float32 [D]) stochastically into its record (uint16); an odd one's last half becomes 0.

    NaNs stay NaNs, with other payloads than torch's.
    """
    dim, bits, row_key = len(values), values.view(np.uint32), counter_key(row_id, key)
    for word in range(len(word_keys)):
        fields = mix(row_key ^ word_keys[word])
        for column in range(_FIELDS * word, min(_FIELDS * word + _FIELDS, dim)):
            halves[column] = _rounded(bits[column], np.uint32(fields & _FIELD)) >> 16
            fields >>= _FIELD_BITS
    if dim % 2:
        halves[dim] = 0


@inlined
def _rounded(bits, field):  # type: ignore[no-untyped-def]
    if bits & _EXPONENT != _EXPONENT:
        return bits + field
    # A NaN whose payload lies in the bits that are cut off would become an infinity.
    return bits | _QUIET if bits & _FRACTION else bits
