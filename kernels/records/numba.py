"""Copies whole row records row by row on a CPU, straight from source to destination.

Arguments and bits as in `kernels.records`. On one thread, without a buffer, and without the GIL.
"""

import numpy as np
import torch
from torch import Tensor

from kernels.numba_intrinsics import ask_ahead, compiled
from kernels.records.draws import draw_key, draw_scale
from kernels.splitmix64 import counter_keys
from kernels.splitmix64_numba import counter_key, mix

_MEAN = 2 * 0xFFFF
_FIELD, _FIELD_BITS = np.uint64(0xFFFF), np.uint64(16)


def copy_records(from_RW: Tensor, rows_U: Tensor, to_CW: Tensor, slots_U: Tensor) -> None:
    """Copies records of rows (int64) to slots (int64)."""
    _copy(from_RW.numpy(), rows_U.numpy(), to_CW.numpy(), slots_U.numpy())


def draw_fp32_records(
    window_CW: Tensor, slots_U: Tensor, row_ids_U: Tensor, *, dim: int, seed: int, std: float
) -> None:
    """Writes the records of rows that were never updated to slots (int64).

    Args:
        row_ids_U: int64; the rows' job-wide ids.
    """
    column_keys_D = counter_keys(torch.arange(1, dim + 1)).numpy().view(np.uint64)
    ids_U = row_ids_U.numpy().view(np.uint64)
    key, scale = np.uint64(draw_key(seed) % 2**64), np.float32(draw_scale(std))
    _draw_all(window_CW.numpy(), slots_U.numpy(), ids_U, column_keys_D, key, scale)


@compiled
def _copy(source, rows, target, slots):  # type: ignore[no-untyped-def]
    for place in range(len(rows)):
        ask_ahead(source, rows, place, len(rows))
        ask_ahead(target, slots, place, len(rows))
        row, slot = rows[place], slots[place]
        # Not by slices: assigning these, Numba first makes sure that they do not overlap.
        for word in range(source.shape[1]):
            target[slot, word] = source[row, word]


@compiled
def _draw_all(target, slots, ids, column_keys, key, scale):  # type: ignore[no-untyped-def]
    for place in range(len(slots)):
        ask_ahead(target, slots, place, len(slots))
        slot = slots[place]
        _draw(target[slot, : len(column_keys)], counter_key(ids[place], key), column_keys, scale)
        target[slot, len(column_keys) :] = np.float32(0.0)


@compiled
def _draw(weights, row_key, column_keys, scale):  # type: ignore[no-untyped-def]
    """See `kernels.records.row_init`: the four 16-bit fields of a hash are added up, centred and scaled."""
    for column in range(len(column_keys)):
        word = mix(row_key ^ column_keys[column])
        total = np.uint64(0)
        for field in range(4):
            total += (word >> (np.uint64(field) * _FIELD_BITS)) & _FIELD
        weights[column] = np.float32(np.int32(total) - np.int32(_MEAN)) * scale
